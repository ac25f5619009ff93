"""Compiles `cpu.cpp` for this processor when it is first needed, and loads its operators.

Knows compilers and caches. Knows nothing of what the operators do.
"""

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
_NATIVE = {"x86_64": "-march=native", "AMD64": "-march=native", "aarch64": "-mcpu=native", "arm64": "-mcpu=native"}
ADVICE = "Install a C++ compiler and ninja (Debian: apt install g++ ninja-build)."


class Operators:
    """The operators of one build: torch's own callables, without the Python that `torch.ops` has around each."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        packet = getattr(self._namespace, name)
        operator = getattr(packet, "_op", packet)
        setattr(self, name, operator)  # found at once from now on
        return operator


@functools.cache
def operators() -> Operators | None:
    """The operators, or `None`, with a line in the log, where they cannot be compiled.

    ERNIE_SERVE_PORTABLE=1 leaves out what only some processors have.
    """
    try:
        return load(portable=os.environ.get("ERNIE_SERVE_PORTABLE") == "1")
    except (ImportError, OSError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        logger.warning(
            "The CPU's own operators cannot be compiled; plain torch serves, slower. %s (%s)", ADVICE, reason
        )
        return None


def is_compiled() -> bool:
    """Whether the operators are there without compiling."""
    name, _ = _build(os.environ.get("ERNIE_SERVE_PORTABLE") == "1", ())
    return (_folder(name) / "whole").exists()


def load(*, portable: bool = False, extra_flags: tuple[str, ...] = ()) -> Operators:
    """Compile, or find in the cache, one build of the source, and load it into this process."""
    name, flags = _build(portable, extra_flags)
    if not hasattr(getattr(torch.ops, name), "linear"):
        _compile(name, flags)
    return Operators(getattr(torch.ops, name))


def _build(portable: bool, extra_flags: tuple[str, ...]) -> tuple[str, list[str]]:
    """A build's name, which says all that it depends on, and its flags."""
    native = "" if portable else _NATIVE.get(platform.machine(), "")
    flags = [*FLAGS, *extra_flags, *([native] if native else ["-DERNIE_PORTABLE"])]
    name = f"ernie_serve_cpu_{_fingerprint(flags)}"
    return name, [*flags, f"-DERNIE_NAMESPACE={name}"]


def _folder(name: str) -> Path:
    """Where a build is kept."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        from torch.utils import cpp_extension  # slow to import

        root = cpp_extension.get_default_build_root()
    return Path(root) / name


def _compile(name: str, flags: list[str]) -> None:
    from torch.utils import cpp_extension  # slow to import, and needs setuptools

    folder = _folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "ours").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        # torch's own lock is a file that outlives a killed process, and is then waited for without end. Whoever holds
        # ours knows that nobody holds that one.
        (folder / "lock").unlink(missing_ok=True)
        began = time.monotonic()
        library, whole = folder / f"{name}.so", folder / "whole"
        if whole.exists() and library.exists():  # ninja would compile again for a copy of the source elsewhere
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # torch does not type it
            return
        if lacking := [name for name, path in tools().items() if path is None]:
            raise OSError(f"there is no {' and no '.join(lacking)} on PATH")  # torch would warn at length, and then try
        logger.info("Compiling the CPU's operators for this processor; this is done once and takes a minute.")
        os.environ["PATH"] = tools_path()
        cpp_extension.load(
            name,
            [str(SOURCE)],
            extra_cflags=flags,
            extra_ldflags=flags,
            build_directory=str(folder),
            is_python_module=False,
        )
        whole.touch()
        logger.debug("Loaded %s in %.1f s", folder, time.monotonic() - began)


def tools() -> dict[str, str | None]:
    """What compiles, by the names it is looked for: the compiler, then ninja. `None` for what is not there."""
    compiler = next(iter(os.environ.get("CXX", "").split()), "c++")  # torch takes `ccache g++` too
    return {name: shutil.which(name, path=tools_path()) for name in (compiler, "ninja")}


def tools_path() -> str:
    """PATH, and the folder beside Python, where pip puts ninja whether or not PATH has it."""
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(dict.fromkeys([*folders, str(Path(sys.executable).parent)]))


def _fingerprint(flags: list[str]) -> str:
    """Of all that a build depends on: the processor, torch, the flags, the source."""
    parts = [platform.machine(), _processor(), torch.__version__, *flags, SOURCE.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(next((line for line in lines if line.startswith(name)), "") for name in ("flags", "Features"))
