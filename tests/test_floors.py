"""The floors of the house: who may import whom, and who stays free of torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "ernie_serve"
_ORDER = (
    "__main__ > cli > settings_command > vllm_flags > cli_billing > usage_table > bookkeeping > bench > doctor > "
    "quantizing > launch > http_server > engine_process > banner > api > "
    "billing > text > worker > model > kernels > engine > grammar"
)
FLOORS = _ORDER.split(" > ")
BASEMENT = {"messages", "config", "errors", "logs", "leaving", "bundled"}
FREE_OF_TORCH = [
    "api",
    "text",
    "engine",
    "billing",
    "grammar",
    "launch",
    "cli",
    "settings_command",
    "vllm_flags",
    "cli_billing",
    "usage_table",
    "bookkeeping",
    "bench",
    "model/config.py",
    "model/hub.py",
    "model/download.py",
]


def _modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def _imported_rooms(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The rooms of ernie_serve that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} has a relative import"
    return {name.split(".")[1] for name in names if name.startswith("ernie_serve.")}


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if room in ("__init__", "bundled"):
        assert not _imported_rooms(path)
        return
    allowed = BASEMENT | {room}
    if room in FLOORS:
        allowed |= set(FLOORS[FLOORS.index(room) + 1 :])
    else:
        assert room in BASEMENT, f"{room} has no floor: give it one in docs/architecture.md and here"
    if room in ("kernels", "model", "worker"):
        allowed -= {"engine"}
    rooms = {name for name in _imported_rooms(path) if (ROOT / name).exists() or (ROOT / f"{name}.py").exists()}
    assert rooms <= allowed, f"{path.name} in {room} imports {sorted(rooms - allowed)}"


def test_the_api_process_imports_no_torch() -> None:
    modules = []
    for name in FREE_OF_TORCH:
        path = ROOT / name
        files = (
            [path]
            if path.suffix
            else [path.with_suffix(".py")]
            if path.with_suffix(".py").exists()
            else path.rglob("*.py")
        )
        modules += [".".join(f.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__") for f in files]
    assert len(modules) > 10
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nassert 'torch' not in sys.modules, 'torch is imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
