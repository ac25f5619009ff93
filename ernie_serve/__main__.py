"""`python -m ernie_serve` is the command line."""

from ernie_serve.cli import program

program()
