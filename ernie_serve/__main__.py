"""`python -m ernie_serve` is the command line, as is `ernie-serve`.

Knows only that loading it takes a while, in which Ctrl-C ends the process at once: raised as an exception it would be
lost in a library's callback, or be shown with its traceback.
"""

import signal


def main() -> None:
    """Load the command line, and run it."""
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_heard:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ernie_serve.cli import program

    if is_heard:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    program()


if __name__ == "__main__":
    main()
