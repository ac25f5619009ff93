"""How much oneDNN, which torch brings for a CPU, may remember of the products it has prepared.

Knows the names of its bounds. Knows nothing of who multiplies what.
"""

from collections.abc import MutableMapping

_NUM_PREPARED = "256"
"""A step of a small model has about 50 shapes; what is remembered of each takes 0.7 MB, where AVX-512 is."""


def remember_little(environ: MutableMapping[str, str]) -> None:
    """Bound both caches of a torch that is loaded later, unless `environ` says otherwise.

    Every number of rows is a shape of its own, also in each expert. By themselves oneDNN and torch each remember 1,024:
    hundreds of MB, which no plan of memory counts, and which come only while serving.
    """
    environ.setdefault("LRU_CACHE_CAPACITY", _NUM_PREPARED)  # torch's
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in environ:  # its older name
        environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _NUM_PREPARED)
