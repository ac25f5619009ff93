"""A folder that appears when it is whole, or not at all.

Knows files, disks and renaming. Knows nothing of what is written.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ernie_serve.errors import CheckpointError


@contextmanager
def new_folder(folder: Path, num_bytes: int = 0) -> Iterator[Path]:
    """A folder beside `folder` to write to; on leaving it has that name, and everything in it is on the disk.

    Whatever ends the writing before, an error or Ctrl-C, takes what was written with it; what a process leaves that is
    killed, the next that writes the same folder takes away. Raises `CheckpointError` when the folder is there already
    and not empty, or is just being written, or cannot be made, or its disk has no room for `num_bytes`, before anything
    is written, and when the disk is full later.
    """
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a new folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder.")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        with _claimed(unfinished, folder):
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


@contextmanager
def _claimed(unfinished: Path, folder: Path) -> Iterator[None]:
    """Have `unfinished` alone, made anew; an error takes it away.

    The lock is a file beside it, which ends with the process: a folder with an open file in it cannot be renamed
    everywhere. Where a file system has no locks, what is there already may be another's.
    """
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    name = folder.with_name(f".{folder.name}.lock")
    lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        is_alone = _is_alone(lock, name)
        if is_alone is False:
            raise CheckpointError(f"{folder} is being written by another process; wait for it, or name a new folder.")
        try:
            if os.path.lexists(unfinished):
                if is_alone is None or unfinished.is_symlink() or unfinished.stat().st_uid != os.geteuid():
                    told = f"{unfinished} is there already, and whose it is is not known"
                    raise CheckpointError(f"{told}; take it away, or name a new folder.")
                shutil.rmtree(unfinished)
            unfinished.mkdir()
            try:
                yield
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        finally:
            name.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _is_alone(handle: int, path: Path) -> bool | None:
    """Whether this open file could be locked and is still the one of that name; `None` where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
