"""What a token is drawn from after the cuts, in plain Python."""


def nucleus(probs: list[float], top_p: float, top_k: int) -> list[float]:
    """The reference: sort, keep, renormalise, in plain Python."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    order = order[: top_k or len(order)]
    mass, kept = sum(probs[i] for i in order), []
    reached = 0.0
    for i in order:
        kept.append(i)
        reached += probs[i] / mass
        if reached >= top_p:
            break
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]
