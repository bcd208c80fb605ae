"""What runs, ladders and fits produced when these numbers were taken, and must still produce."""
