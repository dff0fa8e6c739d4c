"""Parsing and printing only."""
