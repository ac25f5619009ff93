"""A folder that appears when it is whole, or not at all.

Knows files, disks and renaming. Knows nothing of what is written.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ernie_serve.errors import CheckpointError


@contextmanager
def new_folder(folder: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A folder beside `folder` to write to; on leaving it has that name, and everything in it is on the disk.

    Whatever ends the writing before, an error or Ctrl-C, takes what was written with it. Raises `CheckpointError` when
    the folder is there already and not empty, or cannot be made, or its disk has no room for `num_bytes`, before
    anything is written, and when the disk is full later.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder.")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        if num_bytes > (free := shutil.disk_usage(unfinished).free):
            raise CheckpointError(
                f"{folder} needs {num_bytes / 1e9:.1f} GB; its disk has {free / 1e9:.1f} GB free. "
                "Free some, or name a folder on a larger disk."
            )
        yield unfinished
        for path in unfinished.iterdir():
            _to_disk(path)
        _to_disk(unfinished)
        unfinished.replace(folder)
        _to_disk(folder.parent)
    except OSError as error:
        remedy = " Free some room, or name a folder on a larger disk." if error.errno == errno.ENOSPC else ""
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}.{remedy}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
