"""Triton kernels of the decode step, one a file: imported only where a GPU, or Triton's interpreter, runs them.

A file has its kernels and one function that launches them. Nothing here reads a number back to the host, so that
every launch can be part of a CUDA graph. How each is meant is the verb of the same name in `reference.py`.
"""
