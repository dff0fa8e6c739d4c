"""Tether: the whole of RLHF in one library and one command."""

__version__ = "0.1.0"
