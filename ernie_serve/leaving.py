"""How a process of ours ends: at once.

Knows nothing of what it did. Taking modules down one by one keeps whoever pressed Ctrl-C waiting, half a second for
torch and as long for what serves HTTP, and nothing in them is of use to anybody: the kernel takes it all back.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn


def leave_after(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` to its end, write out what it said, and end the process with its exit code.

    An exception that nobody expects ends it as ever, with a traceback. The first process of a container, of which the
    kernel keeps signals that nobody listens to, ends at SIGTERM like any other until somebody listens.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _frame: os._exit(128 + number))
    try:
        code = main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise  # Python prints it
        code = ended.code
    logging.shutdown()
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError, AttributeError):  # whoever read it is gone, or it was closed
        pass
    except OSError as error:
        code = code or 1
        print(f"ernie-serve: Nothing more can be written: {error.strerror}.", file=sys.stderr)
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()
    os._exit(code or 0)
