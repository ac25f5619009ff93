"""How many cores this process may use, and how many of them a model is given.

Knows masks and quotas of the system, and of a model its bytes of weights.
"""

import os
from pathlib import Path

from ernie_serve.worker.groups import groups_of, text_of

FOR_ONE_THREAD = 64 << 20
"""Bytes of weights: a model of fewer has products so small that a second thread is more waiting than help."""


def threads_for(weight_bytes: int) -> int:
    """Threads of a model of so many bytes, where nobody says how many."""
    return 1 if weight_bytes < FOR_ONE_THREAD else usable_cores()


def usable_cores(root: Path = Path("/")) -> int:
    """Cores of this process's mask, or as many as its control groups' quota buys, if that is less; at least 1."""
    mask = len(os.sched_getaffinity(0))
    return max(1, min(mask, *(int(quota) for quota in _quotas(root)), mask))


def _quotas(root: Path) -> list[float]:
    """Cores' worth of time that each control group above this process grants."""
    found = []
    for folder, is_second in groups_of("cpu", root):
        names = ("cpu.max",) if is_second else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = " ".join(text_of(folder / name) for name in names).split()
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return found
