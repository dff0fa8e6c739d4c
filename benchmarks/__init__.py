"""Tether beside TRL and plain transformers, step for step: ``make bench``."""
