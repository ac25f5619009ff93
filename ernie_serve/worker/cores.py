"""How many cores this process may use.

Knows masks and quotas of the system. Knows nothing of threads or of what runs on them.
"""

import os
from pathlib import Path, PurePosixPath


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of this process's mask, or as many as its control groups' quota buys, if that is less; at least 1."""
    mask = len(os.sched_getaffinity(0))
    return max(1, min(mask, *(int(quota) for quota in _quotas(root)), mask))


def _quotas(root: Path) -> list[float]:
    """Cores' worth of time that each control group above this process grants, version 1 or 2."""
    found = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            if "cpu" in controllers.split(","):
                folder = root / "sys/fs/cgroup/cpu" / group
                words = [_text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()]
            elif not controllers:
                words = _text(root / "sys/fs/cgroup" / group / "cpu.max").split()
            else:
                continue
            if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
                found.append(int(words[0]) / int(words[1]))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
