"""Where log lines go and what they look like. No line ever holds a prompt, an answer or a key."""

import logging
import os
import sys


def log_to_stderr(level: str) -> None:
    """Log this process to standard error at `level`; libraries that talk much are kept to warnings."""
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, stream=sys.stderr)
    for noisy in ("alembic", "asyncio", "filelock", "httpcore", "httpx", "huggingface_hub", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))


def fill_standard_files() -> None:
    """Have /dev/null where standard input, output or error is closed.

    Otherwise the next files that are opened get these numbers: the event loop, which ends the process with SIGABRT when
    it closes one of them, and what the engine process takes for its own outputs.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
