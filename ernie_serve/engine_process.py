"""The engine's half: what runs in the engine process, and how it is built from the rooms below.

Knows kernels, model, worker, engine and what bytes tokens stand for, and the pipe they answer to. Knows nothing of
chat, HTTP or the process at the other end.
"""

import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import torch

from ernie_serve.config import USUAL_NUM_SEQS, Settings
from ernie_serve.engine import wire
from ernie_serve.engine.core import EngineCore
from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.pace import Pace
from ernie_serve.engine.scheduler import Scheduler
from ernie_serve.errors import NotEnoughMemory, SettingsError, StartupError
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.kernels import prompt_attention
from ernie_serve.kernels.fused import cpu_kernels_for
from ernie_serve.kernels.native import ADVICE
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.leaving import leave_after
from ernie_serve.logs import log_to_stderr
from ernie_serve.messages import EngineInfo, EngineRequest, Failed, Loading, Ready, SamplingParams
from ernie_serve.model import hub
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.loading import dtypes_of, load, quantization_of, require_fp8
from ernie_serve.model.quantize import (
    Shapes,
    bits_of,
    copying_bytes,
    loading_bytes,
    model_bytes,
    parameter_shapes,
    repacking_bytes,
    widened_bytes,
)
from ernie_serve.model.recipes import DeviceKind, Quantization, Recipe
from ernie_serve.model.repacking import is_repacked
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.worker import memory
from ernie_serve.worker.card import device_of, named, require_kernels, take
from ernie_serve.worker.cores import threads_for
from ernie_serve.worker.graphs import CudaDevice
from ernie_serve.worker.runner import Runner
from ernie_serve.worker.self_check import Fusing, check_one_row

logger = logging.getLogger(__name__)

Report = Callable[[float, str], None]


def main(file_descriptor: int) -> int:
    """Read the settings from the pipe, load, and serve the engine until the other side ends it; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever signals all of us: the API ends us in its own time
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    connection = Connection(file_descriptor)
    settings = Settings.model_validate_json(connection.recv_bytes())
    num_valid_ids = int(connection.recv_bytes())
    log_to_stderr(settings.log_level)
    try:
        core, info = build_engine(
            settings, num_valid_ids, _throttled(lambda share, what: wire.send(connection, Loading(share, what)))
        )
    except StartupError as error:
        wire.send(connection, Failed(str(error)))
        return 1
    except ConnectionError:
        return 0
    except Exception as error:
        logger.exception("loading failed")
        wire.send(connection, Failed(f"Loading failed: {type(error).__name__}: {error}"))
        return 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # until here the API ends us by it; now it asks
    wire.send(connection, Ready(info))
    try:
        core.serve(connection)
    except Exception:
        return 1  # the core has reported and logged it
    return 0


def build_engine(settings: Settings, num_valid_ids: int, report: Report) -> tuple[EngineCore, EngineInfo]:
    """Load a checkpoint and make an engine that has produced its first token.

    `num_valid_ids` is how many ids the tokenizer knows; the rest of the vocabulary is padding and never sampled.
    Raises `StartupError` when the settings, the checkpoint or the memory do not allow it.
    """
    try:
        return _build(settings, num_valid_ids, report)
    except torch.OutOfMemoryError as error:
        given, share = settings.kv_cache_memory_bytes, settings.gpu_memory_utilization
        told = f"--kv-cache-memory-bytes (it is {given})" if given else f"--gpu-memory-utilization (it is {share})"
        raise NotEnoughMemory(
            f"The GPU's memory ran out while the engine was made, though by arithmetic it had to do: {error}. Lower "
            f"{told}, or end what else uses the GPU."
        ) from error


def _build(settings: Settings, num_valid_ids: int, report: Report) -> tuple[EngineCore, EngineInfo]:
    began = time.monotonic()
    device = device_of(settings.device)
    take(device)
    if device.type == "cuda":
        require_kernels(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    dummy = settings.load_format == "dummy"
    block_size = settings.block_size or (64 if device.type == "cuda" else 16)
    max_num_seqs = settings.max_num_seqs or USUAL_NUM_SEQS[device.type]
    folder = hub.resolve(settings.model, settings.revision, "text", report)
    config = ModelConfig.from_folder(folder)
    if num_valid_ids > config.vocab_size:
        raise StartupError(
            f"The tokenizer has {num_valid_ids} ids, the model only {config.vocab_size} (vocab_size in config.json). "
            "Resize the model's embedding to the tokenizer, or take the tokens that were added out of the tokenizer."
        )
    memory.require_length(config, settings.max_model_len)
    quantization = quantization_of(config, settings.quantization, device)
    dtype, cache_dtype = dtypes_of(config, quantization, settings.dtype, settings.kv_cache_dtype, device)
    if device.type == "cuda":
        require_fp8(quantization, cache_dtype, torch.cuda.get_device_capability(device))
    shapes = parameter_shapes(config)
    weight_bytes = model_bytes(shapes, quantization, dtype)
    torch.set_num_threads(settings.threads or threads_for(weight_bytes))
    has_packed = quantization is not None or cache_dtype == torch.int8
    kernels = _kernels(device, dtype, has_packed=has_packed, num_bytes=weight_bytes)
    with torch.device("meta"):
        model = Ernie(config, kernels, dtype)
    if quantization and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        logger.warning("This processor has no vector instructions that are known here; it will be slow.")
    mapped_bytes = weight_bytes if config.quantization and device.type == "cpu" else 0
    passing_bytes = loading_bytes(shapes, config, quantization) if quantization and not config.quantization else 0
    advice = advice_for(config, shapes, quantization, dtype, device)
    if quantization and is_repacked(quantization, kernels):
        packed_size = memory.told(weight_bytes)
        weight_bytes, mapped_bytes = weight_bytes + repacking_bytes(shapes, quantization), 0
        passing_bytes += copying_bytes(shapes, quantization)
        advice = f"{ADVICE} Then they need {packed_size}."
        logger.warning(
            "Quantized matrices are copied for torch's own product: %s, of this process alone, instead of %s.",
            memory.told(weight_bytes),
            packed_size,
        )
    memory.require_room(weight_bytes, device, passing_bytes, advice)
    if not dummy:
        folder = hub.resolve(settings.model, settings.revision, "all", report)
    load(model, folder, quantization, report, device=device, dummy=dummy)
    room = memory.plan_cache(
        config,
        dtype,
        device,
        cache_dtype=cache_dtype,
        max_scored_tokens=memory.SCORED_TOKENS,
        mapped_bytes=mapped_bytes,
        widened_bytes=widened_bytes(shapes, quantization, dtype),
        smaller=_smaller(config, shapes, quantization, device),
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )
    runner = Runner(
        model,
        room.num_blocks,
        block_size,
        max_num_seqs=max_num_seqs,
        num_valid_ids=num_valid_ids,
        cache_dtype=cache_dtype,
        device=CudaDevice() if device.type == "cuda" else None,
        max_model_len=room.max_model_len,
    )
    scheduler = Scheduler(
        BlockPool(room.num_blocks, block_size, enable_prefix_caching=settings.enable_prefix_caching),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=room.max_model_len,
        max_scored_tokens=memory.SCORED_TOKENS,
        pace=Pace(_step_seconds(settings, device)),
    )
    if device.type == "cuda":
        report(1.0, "comparing kernels")
        check_one_row(model, cast("Fusing", kernels), runner.cache, block_size)
    if runner.graphs:
        runner.graphs.record_all(room.max_model_len, lambda share: report(share, "recording decode steps"))
    report(1.0, "preparing grammars")
    core = EngineCore(scheduler, runner, GrammarCompiler(Vocabulary.of(Tokenizer.from_folder(folder))))
    if device.type == "cuda":
        report(1.0, "planning the attention of prompts")
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        prompt_attention.meet(device, dtype, *heads, min(settings.max_num_batched_tokens, room.max_model_len))
    report(1.0, "making the first token")
    lengths = [n for n in _PROMPTS if n <= settings.max_num_batched_tokens] if device.type == "cuda" else [1]
    _warm_up(core, folder, lengths, max(1, room.max_model_len - 1))
    info = EngineInfo(
        device=named(device),
        dtype=_weights(quantization, dtype),
        kv_dtype=_KV_WORDS.get(cache_dtype, _word(cache_dtype)),
        weight_bytes=weight_bytes,
        kv_bytes=room.num_bytes,
        num_blocks=room.num_blocks,
        block_size=block_size,
        max_model_len=room.max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        load_seconds=time.monotonic() - began,
    )
    return core, info


_PROMPTS = (1, 17, 33, 65, 129, 250, 257, 513, 660, 1024, 1200, 1400, 2048, 4096, 8192)
"""Lengths of prompts of which each finds other kernels on a GPU; compiled when first needed, a step waits for them."""


def _warm_up(core: EngineCore, folder: Path, lengths: Sequence[int], longest: int) -> None:
    """Make tokens after prompts of these lengths, in several texts where one may only be `longest`.

    An engine that says it is ready has shown that it can. With a bias scores are copied, and lie otherwise in memory.
    With logprobs a GPU tells of weights that are no numbers, which a CPU does of each token.
    """
    for length in lengths:
        _make_a_token(core, folder, length, longest, SamplingParams(max_tokens=1, seed=0, temperature=0.0))
    if len(lengths) > 1:
        sampling = SamplingParams(max_tokens=1, seed=0, logit_bias={0: 1.0}, logprobs=0)
        _make_a_token(core, folder, 1, longest, sampling)


def _make_a_token(core: EngineCore, folder: Path, length: int, longest: int, sampling: SamplingParams) -> None:
    starts = range(0, length, longest)
    for start in starts:
        name, prompt = f"warm-up {length} {start}", [0] * min(longest, length - start)
        core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, cache_salt=name))
    outputs = [output for _ in range(4 * len(starts)) if core.has_work for output in core.step()]
    if not outputs or outputs[-1].finish_reason == "error":
        if core.failure is torch.OutOfMemoryError:
            raise torch.OutOfMemoryError(f"a step of {length} tokens found too little")
        why = outputs[-1].error if outputs else ""
        raise StartupError(f"The engine did not make its first token with the checkpoint in {folder}. {why}")


def _kernels(device: torch.device, dtype: torch.dtype, *, has_packed: bool, num_bytes: int) -> ReferenceKernels:
    """The best for a device."""
    if device.type == "cpu":
        return cpu_kernels_for(dtype, has_packed=has_packed, num_bytes=num_bytes)
    try:
        from ernie_serve.kernels.fused_cuda import (
            FusedCudaKernels,
        )  # needs Triton, which torch brings where it sees a GPU
    except ImportError as error:
        raise SettingsError(
            f"--device {device}: its kernels need Triton ({error}). Install a CUDA build of PyTorch, or `pip install "
            "triton`, or use --device cpu."
        ) from error
    return FusedCudaKernels()


def advice_for(
    config: ModelConfig, shapes: Shapes, quantization: Quantization | None, dtype: torch.dtype, device: torch.device
) -> str:
    """What would make weights fit that do not."""
    kind: DeviceKind = "cuda" if device.type == "cuda" else "cpu"
    recipe = _smallest(replace(config, quantization=None), shapes, device)
    if recipe is None:
        return "Use a smaller checkpoint, a 16-bit --dtype, or a device with more memory."
    if quantization is not None and quantization.recipe == recipe:
        return "Use a smaller checkpoint, or a device with more memory."
    small = model_bytes(shapes, Quantization.of(recipe, kind), dtype if kind == "cuda" else torch.float32)
    original = " of the original checkpoint" if config.quantization else ""
    return (
        f"With --quantization {recipe}{original} they need {memory.told(small)}; or use a "
        f"{'GPU' if kind == 'cuda' else 'machine'} with more memory."
    )


def _smaller(
    config: ModelConfig, shapes: Shapes, quantization: Quantization | None, device: torch.device
) -> tuple[str, ...]:
    """The flag that would make weights smaller, where there is one for this checkpoint."""
    recipe = None if config.quantization is not None else _smallest(config, shapes, device)
    is_it = quantization is not None and quantization.recipe == recipe
    return () if recipe is None or is_it else (f"--quantization {recipe}",)


def _smallest(config: ModelConfig, shapes: Shapes, device: torch.device) -> Recipe | None:
    """The word for the smallest weights that a plain checkpoint can have on a device, if its widths have any."""
    recipes: tuple[Recipe, ...] = ("int4", "int8")
    for recipe in recipes:
        try:
            quantization = quantization_of(config, recipe, device)
            assert quantization is not None, "it was asked for"
            bits_of(shapes, quantization)
            return recipe
        except SettingsError:
            continue
    return None


_KV_WORDS = {torch.float8_e4m3fn: "fp8"}


def _weights(quantization: Quantization | None, dtype: torch.dtype) -> str:
    return _word(dtype) if quantization is None else f"{quantization.recipe} weights"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _step_seconds(settings: Settings, device: torch.device) -> float:
    if settings.max_step_seconds is not None:
        return settings.max_step_seconds
    return 0.5 if device.type == "cpu" else 0.0


def _throttled(report: Report) -> Report:
    """Pass on a report ten times a second at most, and every change of what is being done."""
    last, said = 0.0, ""

    def passed(share: float, what: str) -> None:
        nonlocal last, said
        now = time.monotonic()
        if now - last > 0.1 or what != said:
            last, said = now, what
            report(share, what)

    return passed


if __name__ == "__main__":
    leave_after(lambda: main(int(sys.argv[1])))
