"""Where log lines go and what they look like. No line ever holds a prompt, an answer or a key."""

import logging
import sys


def log_to_stderr(level: str) -> None:
    """Log this process to standard error at `level`; libraries that talk much are kept to warnings."""
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=form, stream=sys.stderr)
    for noisy in ("alembic", "asyncio", "filelock", "httpcore", "httpx", "huggingface_hub", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
