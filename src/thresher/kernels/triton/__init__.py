"""Kernels for GPUs, in Triton. Nothing here imports triton before a call needs it, but for the files of bodies."""
