"""Load, heads, adapters, packed forward, log-probs."""
