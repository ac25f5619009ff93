"""A small, exact and fast inference server for the ERNIE 4.5 text models."""
