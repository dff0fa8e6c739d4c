"""Everything in this process: the default."""
