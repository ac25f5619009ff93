"""Our engine beside llama.cpp: the full 21B geometry in 4 bits on this machine's cores, measured in turns.

llama.cpp is built from the source distribution of llama-cpp-python on PyPI, for this processor; both sides get random
weights of the same geometry. Both models do not fit into memory together, so each turn is a process that loads,
measures and ends. Everything is kept in a cache folder and made once; `--prepare` does no more than that.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LLAMA = "0.3.36"
SCRIPTS = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie_serve" / "bench_cpu"
PARTS = {
    "decode_1": "decode, 1 stream",
    "decode_16": "aggregate decode, 16 streams",
    "prefill_512": "prefill, 512 tokens",
}

console = Console(stderr=True, highlight=False)


class Llama:
    """llama.cpp's own benchmarks over a random model."""

    def __init__(self, cache: Path, model: Path, threads: int) -> None:
        self.build = cache / "llama.cpp"
        self.python = cache / "venv" / "bin" / "python"
        self.model = model
        self.threads = threads

    def prepare(self, layers: int, jobs: int) -> None:
        """Build the programs and write the model, where they are not there yet."""
        if not self.python.exists():
            run(sys.executable, "-m", "venv", self.python.parent.parent)
        run(
            self.python,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "gguf",
            "numpy",
            "scikit-build-core",
        )
        if not (self.build / "bin" / "llama-batched-bench").exists():
            self._compile(jobs)
        if not self.model.exists():
            partial = self.model.with_suffix(".partial")
            run(self.python, SCRIPTS / "random_gguf.py", partial, "--layers", str(layers))
            partial.rename(self.model)

    def _compile(self, jobs: int) -> None:
        sources = self.build.with_name("sdist")
        if not sources.exists():
            with tempfile.TemporaryDirectory(dir=sources.parent) as folder:
                pip = [self.python, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
                path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
                options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", folder]
                run(*pip, *options, f"llama-cpp-python=={LLAMA}", environ={"PATH": path})
                (archive,) = Path(folder).glob("*.tar.gz")
                shutil.unpack_archive(archive, folder, filter="data")
                archive.unlink()
                Path(folder).rename(sources)
                Path(folder).mkdir()  # for the context to remove
        (source,) = sources.glob("llama_cpp_python-*/vendor/llama.cpp")
        off = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_UI", "LLAMA_CURL", "LLAMA_OPENSSL")
        on = ("GGML_NATIVE", "GGML_OPENMP")
        flags = [f"-D{name}=OFF" for name in off] + [f"-D{name}=ON" for name in on]
        run("cmake", "-S", source, "-B", self.build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *flags)
        run("ninja", "-C", self.build, f"-j{jobs}", "llama-bench", "llama-batched-bench")

    def turn(self) -> dict[str, float]:
        """Tokens a second of each part, and the peak of memory."""
        common = ("-m", self.model, "-t", str(self.threads), "-lm", "none")
        single, peak = child(
            self.build / "bin" / "llama-bench", *common, "-p", "512", "-n", "64", "-r", "1", "-o", "json"
        )
        found = {("prefill_512" if each["n_prompt"] else "decode_1"): each["avg_ts"] for each in json.loads(single)}
        lengths = ("-npp", "16", "-ntg", "16", "-npl", "16", "-c", "1024", "--output-format", "jsonl")
        batched, _ = child(self.build / "bin" / "llama-batched-bench", *common, *lengths)
        (line,) = [json.loads(line) for line in batched.splitlines() if line.startswith("{")]
        return found | {"decode_16": line["speed_tg"], "peak_rss_gib": peak}

    def depths(self, depths: list[int]) -> dict[int, float]:
        """Tokens a second of one stream after so many tokens, which are really computed: this takes long."""
        common = (
            "-m",
            self.model,
            "-t",
            str(self.threads),
            "-lm",
            "none",
            "-p",
            "0",
            "-n",
            "16",
            "-r",
            "1",
            "-o",
            "json",
        )
        said, _ = child(self.build / "bin" / "llama-bench", *common, "-d", ",".join(map(str, depths)))
        return {each["n_depth"]: each["avg_ts"] for each in json.loads(said)}


class Ours:
    """The engine in a process of its own, by `cpu_engine.py`."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder = folder
        self.threads = threads

    def prepare(self, layers: int) -> None:
        """Write the checkpoint, where it is not there yet, and compile the operators."""
        if not (self.folder / "config.json").exists():
            made = ["--geometry", "21b", "--format", "int4", "--layers", str(layers), "--out", str(self.folder)]
            run(sys.executable, "-m", "ernie_serve.model.random_checkpoint", *made)
        run(sys.executable, "-c", "from ernie_serve.kernels import native; native.operators()")

    def turn(self, *flags: str) -> dict[str, Any]:
        """What the process measured, and the peak of its memory."""
        command = (SCRIPTS / "cpu_engine.py", self.folder, "--threads", str(self.threads), *flags)
        said, peak = child(sys.executable, *command, "--began", repr(time.time()))
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found | {"peak_rss_gib": peak}


def run(*command: object, environ: dict[str, str] | None = None) -> None:
    """Run a command that prepares; its output is shown, and a failure ends everything."""
    console.print(f"$ {' '.join(map(str, command))}", soft_wrap=True, style="dim")
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr, env=os.environ | (environ or {}))


def child(*command: object) -> tuple[str, float]:
    """What a command printed, and its peak of resident memory in GiB."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        if process.returncode:
            err.seek(0)
            raise SystemExit(f"{command[0]} ended with {process.returncode}:\n{out.read()}{err.read()}")
        return out.read(), usage.ru_maxrss / 2**20


def summary(ours: list[dict[str, Any]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians and ratios. A ratio is the median of the turns' ratios; spread is its least and largest."""
    ratios, spread, speeds = {}, {}, {}
    for part in PARTS:
        each = sorted(mine[part] / other[part] for mine, other in zip(ours, theirs, strict=True))
        ratios[part] = round(statistics.median(each), 3)
        spread[part] = [round(each[0], 3), round(each[-1], 3)]
        sides = {"ours": ours, "llama.cpp": theirs}
        speeds[part] = {
            side: {
                "median": round(statistics.median(turn[part] for turn in turns), 2),
                "least": round(min(turn[part] for turn in turns), 2),
                "most": round(max(turn[part] for turn in turns), 2),
            }
            for side, turns in sides.items()
        }
    return {"ratios": ratios, "spread": spread, "tok_s": speeds}


def show(found: dict[str, Any]) -> None:
    """The race as a table."""
    table = Table("4 bits, tokens a second", "ours", "llama.cpp", "ratio", "spread", box=None, header_style="bold")
    for part, meaning in PARTS.items():
        mine, other = found["tok_s"][part]["ours"], found["tok_s"][part]["llama.cpp"]
        low, high = found["spread"][part]
        table.add_row(
            meaning,
            f"{mine['median']} ({mine['least']} - {mine['most']})",
            f"{other['median']} ({other['least']} - {other['most']})",
            f"{found['ratios'][part]:.2f}",
            f"{low:.2f} - {high:.2f}",
        )
    Console(highlight=False).print(table)
    Console(highlight=False).print(
        f"Peak memory {found['peak_rss_gib']['ours']} GiB (llama.cpp {found['peak_rss_gib']['llama.cpp']}); ready "
        f"after {found['load_s']} s, file cached; {found['experts_per_layer']} experts a layer reached by 16 streams. "
        f"Outside the kernels {found['outside_kernels']:.1%} of a step of one stream, whose longest takes "
        f"{found['stall']['longest_s']:.2f} s instead of {found['stall']['alone_s']:.2f} beside a prompt of 2,000."
    )


def facts(threads: int, layers: int) -> dict[str, Any]:
    """Where and with what this was measured."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "threads": threads},
        "versions": {"torch": version("torch"), "llama-cpp-python": LLAMA, "python": platform.python_version()},
        "commit": head.stdout.strip(),
        "layers": layers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench_cpu", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--prepare", action="store_true", help="only build and write what is needed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=28, help="fewer for a quick look")
    parser.add_argument("--depth", type=int, help="also decode after 1,024 and after so many tokens (llama.cpp: long)")
    parser.add_argument("--cache", type=Path, default=CACHE, help="24 GB for the full geometry")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    llama = Llama(options.cache, options.cache / f"random-{options.layers}.gguf", options.threads)
    ours = Ours(options.cache / f"random-{options.layers}-int4", options.threads)
    ours.prepare(options.layers)
    llama.prepare(options.layers, options.threads)
    if options.prepare:
        return
    mine, other = [], []
    for number in range(1, options.rounds + 1):
        console.print(f"round {number} of {options.rounds}")
        mine.append(ours.turn(*(["--details"] if number == options.rounds else [])))
        other.append(llama.turn())
        console.print(f"  ours {mine[-1]}\n  llama.cpp {other[-1]}", soft_wrap=True)
    ours.turn("--load-only")
    cached = ours.turn("--load-only")
    found = summary(mine, other) | {
        "load_s": round(cached["load_s"], 1),
        "peak_rss_gib": {
            "ours": round(max(turn["peak_rss_gib"] for turn in mine), 2),
            "llama.cpp": round(max(turn["peak_rss_gib"] for turn in other), 2),
        },
        **{name: mine[-1][name] for name in ("experts_per_layer", "outside_kernels", "stall")},
        "rounds": {"ours": mine, "llama.cpp": other},
    }
    if options.depth:
        depths = [1024, options.depth]
        found["depths"] = {
            "ours": ours.turn("--depths", ",".join(map(str, depths)))["depths"],
            "llama.cpp": llama.depths(depths),
        }
        console.print(str(found["depths"]))
    found |= facts(options.threads, options.layers)
    show(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
