"""What the terminal is told, as it is read where it is no terminal."""

import asyncio
import io

import pytest
from rich.console import Console

from ernie_serve import banner
from ernie_serve.messages import EngineInfo


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    monkeypatch.setattr(banner, "console", Console(file=written, width=80, highlight=False))
    return written


def test_a_path_is_told_to_its_end(told: io.StringIO) -> None:
    path = "/srv/" + 3 * "a-folder-with-a-name-that-is-quite-long/" + "billing.db"
    info = EngineInfo(
        device="cpu",
        dtype="float32",
        weight_bytes=1,
        kv_bytes=1,
        block_size=16,
        num_blocks=1,
        max_model_len=16,
        max_num_seqs=1,
        max_num_batched_tokens=16,
        load_seconds=0.0,
    )
    banner.show_ready(
        info, url="http://here", names=("m",), max_output_tokens=None, num_keys=0, billing=f"on; SQLite {path}"
    )
    assert path in "".join(line.strip("│ ") for line in told.getvalue().splitlines())


def test_a_log_begins_where_something_is_done(told: io.StringIO) -> None:
    steps = [(0.0, "starting"), (0.05, "weights"), (0.1, "weights"), (0.19, "weights"), (1.0, "weights"), (1.0, "done")]
    left = iter([*steps, None])
    now = next(left)

    def loading() -> bool:
        return now is not None

    def progress() -> tuple[float, str]:
        nonlocal now
        assert now is not None
        seen, now = now, next(left)
        return seen

    asyncio.run(banner.show_loading(progress, loading))
    assert told.getvalue().splitlines() == ["weights: 10 %", "weights: 100 %", "done: 100 %"]
