"""What the server says on the terminal: how loading goes, and what it serves once it is ready.

Knows how to show facts. Gathers none of them.
"""

import asyncio
from collections.abc import Callable

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from ernie_serve.messages import EngineInfo

_TYPICAL_TOKENS = 8192

console = Console(stderr=True, highlight=False)


async def show_loading(progress: Callable[[], tuple[float, str]], loading: Callable[[], bool]) -> None:
    """Follow the loading of a model: a bar on a terminal, a line for every tenth that is done elsewhere."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            while loading():
                share, what = progress()
                bar.update(task, completed=share, description=what)
                await asyncio.sleep(0.1)
        return
    said = ""
    while loading():
        share, what = progress()
        line = f"{what}: {int(share * 10) * 10} %"
        if share >= 0.1 and line != said:
            console.print(said := line)
        await asyncio.sleep(0.1)


def show_ready(
    info: EngineInfo,
    *,
    url: str,
    names: tuple[str, ...],
    max_output_tokens: int | None,
    num_keys: int,
    billing: str | None,
) -> None:
    """Print what is served, where, who may use it, what that costs if it does, and a request to try."""
    kv_tokens = info.num_blocks * info.block_size
    typical = min(_TYPICAL_TOKENS, info.max_model_len)
    facts = Table.grid(Column(), Column(overflow="fold"), padding=(0, 2))  # a path is told to its end
    weights = f"weights {_size(info.weight_bytes)}, loaded in {info.load_seconds:.1f} s"
    answer = f", answers up to {max_output_tokens:,}" if max_output_tokens else ""
    asked = bool(num_keys or billing)
    keys = "none needed: whoever reaches this address may use it"
    if asked:
        keys = f"{num_keys} accepted" if num_keys else "those of the billing store; `ernie-serve keys create` makes one"
    numbers = f" of {info.kv_dtype}" if info.kv_dtype else ""
    for name, value in {
        "Model": ", ".join(names),
        "Device": f"{info.device}, {info.dtype}; {weights}",
        "Context": f"{info.max_model_len:,} tokens{answer}",
        "KV cache": f"{_size(info.kv_bytes)}{numbers} = {kv_tokens:,} tokens in {info.num_blocks:,} blocks"
        f" = {kv_tokens / typical:.1f} requests of {typical:,}",
        "Batch": f"{info.max_num_seqs} requests, {info.max_num_batched_tokens:,} tokens a step",
        "Keys": keys,
        "Billing": billing or "off: nothing is counted or charged (--billing turns it on)",
        "URL": url,
    }.items():
        facts.add_row(f"[bold]{name}[/]", value)
    console.print(Panel(facts, title="ernie_serve", title_align="left", expand=False))
    headers = " -H 'content-type: application/json'" + (" -H 'authorization: Bearer YOUR_KEY'" if asked else "")
    body = f'{{"model": "{names[0]}", "prompt": "Large language model is", "max_tokens": 32}}'
    console.print(f"Try it:\n  curl -s {url}/completions{headers} -d '{body}'", soft_wrap=True)


def show_draining(num_requests: int, seconds: int) -> None:
    """Print what an end waits for."""
    requests = "1 request" if num_requests == 1 else f"{num_requests} requests"
    console.print(f"Finishing {requests}, {seconds} s at most. Another signal, such as Ctrl-C, ends at once.")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
