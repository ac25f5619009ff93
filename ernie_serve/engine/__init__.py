"""Requests and blocks, in plain Python. No torch."""
