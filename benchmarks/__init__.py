"""Times beside PyTorch. Nothing here is needed to train, and no test asserts a time."""
