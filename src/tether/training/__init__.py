"""The offline and the online loop."""
