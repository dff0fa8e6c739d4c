"""Kernels in C++, compiled on the user's machine when they are first needed, and kept.

Nothing here is required: without a compiler, or on another kind of CPU, the passes go through PyTorch.
"""
