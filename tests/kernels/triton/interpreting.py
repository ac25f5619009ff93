"""Triton's interpreter, without work that changes nothing and takes most of its time.

- A launch replaces the functions of `triton.language` by the interpreter's. Each call of a jitted function in it, and
  `tl.sum` or `tl.zeros` is one, looks through the whole module and replaces them once more.
- Each sum and product of integers is computed again in 64 bits, with two comparisons, for an assertion that is then
  not made, since `debug` is off.
- The dtype of numpy that stands for one of Triton's is looked up in a table that is built for it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def without_idle_work() -> Iterator[None]:
    """Within this, kernels give the same, and fail at the same."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "or sums that overflow are told"
    scalar = functools.cache(interpreter._get_np_dtype)

    def np_dtype(of: Any) -> np.dtype:
        return scalar(of.scalar) if not isinstance(of.scalar, tl.pointer_type) else np.dtype(np.uint64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter, "_get_np_dtype", np_dtype)
        patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
        yield


def _once_a_launch(patch_lang: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the functions of each module that a kernel, or what it calls, sees, when it is first seen."""
    seen: dict[Callable[..., Any], set[str]] = {}
    done: set[str] = set()

    def patch(fn: Callable[..., Any]) -> Any:
        if fn not in seen:
            seen[fn] = {each.__name__ for each in fn.__globals__.values() if each is tl or each is tl.core}
        if seen[fn] and seen[fn] <= done:
            return None  # a call's, which nobody restores
        scope = patch_lang(fn)
        done.update(seen[fn])
        restore = scope.restore

        def restored() -> None:
            """At the end of a launch."""
            restore()
            done.clear()

        scope.restore = restored
        return scope

    return patch
