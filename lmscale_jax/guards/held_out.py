"""Guard while a ladder trains: an arm that is far better than all others is probably wrong."""

# Nats per token. No change of an architecture has been worth as much at one size; a model that sees
# the targets is better by all of them.
TOO_GOOD = 1.0


def suspect_arm(losses: dict[str, float]) -> tuple[str, str] | None:
    """Returns (an arm, the next best) where its best held-out loss of a rung is too good.

    Args:
      losses: {arm: lowest loss of its finished runs}, nats per token.
    """
    if len(losses) < 2:
        return None
    best, second = sorted(losses, key=losses.get)[:2]
    return (best, second) if losses[second] - losses[best] > TOO_GOOD else None
