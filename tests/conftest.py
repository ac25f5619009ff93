"""Checkpoint folders for the tests: tiny, random, and written by transformers, the independent reference.

`make_checkpoint("21b-like")` gives a folder as `-PT` has it, `make_checkpoint("21b-like", layout="paddle")` the
same numbers as `-Paddle` has them. Both are made once a session. Whoever needs one only asks for
`tiny_checkpoint`; a test that asks for `every_checkpoint` runs once for each geometry.
"""

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

pytest_plugins = ["command", "stores"]

os.environ.setdefault("OMP_NUM_THREADS", "1")

Layout = Literal["pt", "paddle"]
MakeCheckpoint = Callable[..., Path]

VOCAB_SIZE = 640

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SMALL_MOE = _SMALL | {
    "model_type": "ernie4_5_moe",
    "num_hidden_layers": 3,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 16,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
}

PACKABLE = _SMALL_MOE | {"intermediate_size": 128, "moe_intermediate_size": 64}
"""Widths that 4 and 8 bits can have; `make_checkpoint("packable")`."""

GEOMETRIES: dict[str, dict[str, Any]] = {
    "21b-like": _SMALL_MOE,
    "300b-like": _SMALL_MOE
    | {"num_hidden_layers": 5, "moe_layer_start_index": 3, "moe_num_shared_experts": 0, "tie_word_embeddings": False},
    "0.3b-like": _SMALL | {"model_type": "ernie4_5", "num_hidden_layers": 3, "hidden_size": 48, "head_dim": 16},
    "interval-2": _SMALL_MOE | {"num_hidden_layers": 4, "moe_layer_start_index": 0, "moe_layer_interval": 2},
    "head-dim": _SMALL_MOE | {"hidden_size": 48, "head_dim": 32, "moe_num_experts": 6, "moe_k": 2},
}


def pytest_collection_finish() -> None:
    """Keep what was imported out of every later collection of garbage, which would look through all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """An engine takes every core, and what runs after it would too.

    Tensors here are so small that a second thread only waits, longest where the machine is shared.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """A function from a geometry's name and a layout to a complete folder. Read it, do not write there.

    `shard_size="100KB"` cuts a `-PT` checkpoint into shards with an index.
    """
    made: dict[tuple[str, str, str], Path] = {}

    def make(geometry: str = "21b-like", *, layout: Layout = "pt", shard_size: str = "5GB") -> Path:
        key = (geometry, layout, shard_size)
        if key not in made:
            shape = PACKABLE if geometry == "packable" else GEOMETRIES[geometry]
            folder = tmp_path_factory.mktemp(f"{geometry}-{layout}")
            if layout == "pt":
                _write_with_transformers(folder, shape, shard_size)
                _write_tokenizer(folder)
            else:
                _rewrite_as_paddle(make(geometry), folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    """A complete `-PT` folder of the 21B's shape in 160,000 parameters: bf16, router float32."""
    return make_checkpoint("21b-like")


@pytest.fixture(params=list(GEOMETRIES))
def every_checkpoint(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Path:
    """A complete `-PT` folder of each geometry in turn."""
    return make_checkpoint(request.param)


@pytest.fixture(scope="session")
def base_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_checkpoint` without a chat template, as a Base model is published."""
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    return folder


def _write_with_transformers(folder: Path, geometry: dict[str, Any], shard_size: str) -> None:
    """`save_pretrained` of a model with random weights, correction bias and norms, so that each has its effect."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    values = dict(geometry)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    chance = torch.Generator().manual_seed(45)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        noise = torch.randn(tensor.shape, generator=chance)
        if "correction_bias" in name:
            tensor.data = 0.1 * noise
        elif "mlp.gate.weight" in name:
            tensor.data = noise * 2 * tensor.shape[-1] ** -0.5
        elif "norm" in name:
            tensor.data = (1 + 0.2 * noise).bfloat16()
        elif not (name == "lm_head.weight" and geometry["tie_word_embeddings"]):
            tensor.data = (noise * tensor.shape[-1] ** -0.5).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, max_shard_size=shard_size)


def _write_tokenizer(folder: Path) -> None:
    from ernie_serve.model.random_tokenizer import CHAT_TEMPLATE, random_tokenizer, random_tokenizer_config

    (folder / "tokenizer.json").write_text(json.dumps(random_tokenizer(VOCAB_SIZE)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(random_tokenizer_config()), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _rewrite_as_paddle(source: Path, folder: Path) -> None:
    """The same numbers under Paddle's names: [in, out], fused, bf16 as integers, two shards and an index."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "moe_use_aux_free": True}
    (folder / "config.json").write_text(json.dumps(config))

    stored = load_file(source / "model.safetensors")
    paddle: dict[str, Any] = {}
    while stored:
        name = next(iter(stored))
        for part, parts, fused in (
            ("q_proj", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ("k_proj", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ("v_proj", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ("gate_proj", ("gate_proj", "up_proj"), "up_gate_proj"),
            ("up_proj", ("gate_proj", "up_proj"), "up_gate_proj"),
        ):
            if f".{part}." in name:
                tensor = torch.cat([stored.pop(name.replace(part, other)).T for other in parts], dim=1)
                name = name.replace(part, fused)
                break
        else:
            tensor = stored.pop(name)
            if tensor.ndim == 2 and "embed" not in name and "bias" not in name:
                tensor = tensor.T
        tensor = tensor.contiguous()
        bits = tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        paddle["ernie." + name.removeprefix("model.") if name != "lm_head.weight" else name] = bits
    paddle["ernie.mtp_emb_norm.0.weight"] = np.ones(config["hidden_size"], np.uint16)
    names = sorted(paddle)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: paddle[name] for name in inside}, folder / file)
    where = {name: file for file, inside in shards.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
