"""(outputs, batch) -> sum and count. Pure: torch, ``core`` and nothing else."""
