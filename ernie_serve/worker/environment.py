"""What the libraries that torch brings for a CPU are told in the environment, before they are loaded.

Knows the names of their settings. Knows nothing of what runs there.
"""

import platform
from collections.abc import MutableMapping

_NUM_PREPARED = "256"
"""A step of a small model has about 50 shapes; what is remembered of each takes 0.7 MB, where AVX-512 is."""


def prepare(environ: MutableMapping[str, str]) -> None:
    """Have a torch that is loaded later wait shortly and remember little, where `environ` says nothing of it.

    GNU's OpenMP lets idle threads look for work for some milliseconds: where other programs want the cores too, they
    take the time of the very thread that they wait for. Between two operators of a step lie 25 to 50 us; these sleep
    after about 0.1 ms.

    Every number of rows is a shape of its own, also in each expert. By themselves oneDNN and torch each remember 1,024
    prepared products: hundreds of MB, which no plan of memory counts, and which come only while serving.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "5000" if platform.machine() == "x86_64" else "50000")
    environ.setdefault("LRU_CACHE_CAPACITY", _NUM_PREPARED)  # torch's
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in environ:  # its older name
        environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _NUM_PREPARED)
