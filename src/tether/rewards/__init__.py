"""Rollouts to numbers."""
