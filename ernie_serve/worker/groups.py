"""The control groups of this process, version 1 or 2.

Knows where their files lie. Knows nothing of what is limited in them.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def groups_of(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """The folder of each control group above this process that may have a limit, and whether it is of version 2."""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            yield root / "sys/fs/cgroup" / (controller if controllers else "") / group, not controllers


def text_of(path: Path) -> str:
    """What a file of the system says; nothing where it is not there."""
    try:
        return path.read_text()
    except OSError:
        return ""
