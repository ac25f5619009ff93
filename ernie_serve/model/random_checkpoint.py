"""Writes a checkpoint folder with random weights that can be served: for tests and for speed.

Knows the published geometries and what belongs into a folder. Knows nothing of the network. The weights are made
and written one tensor at a time: 43 GB of them need 2 GB of memory. Those of a GPU are made there, and go to four files
at a time.
"""

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ernie_serve.errors import CheckpointError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.new_folder import new_folder
from ernie_serve.model.quantize import model_bytes, parameter_shapes
from ernie_serve.model.random_packed import write_random_packed
from ernie_serve.model.random_tokenizer import CHAT_TEMPLATE, random_tokenizer, random_tokenizer_config
from ernie_serve.model.recipes import RECIPES, Quantization, Recipe
from ernie_serve.model.safetensors_file import write_safetensors
from ernie_serve.model.shards import cut, write_index
from ernie_serve.model.weights import tensors_of

Geometry = Literal["tiny", "0.3b", "21b", "300b"]

_FAMILY: dict[str, Any] = {
    "vocab_size": 103424,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DENSE = _FAMILY | {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5"}
_MOE = _FAMILY | {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}
GEOMETRIES: dict[Geometry, dict[str, Any]] = {
    "tiny": _MOE
    | {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "0.3b": _DENSE
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "21b": _MOE
    | {
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "300b": _MOE
    | {
        "tie_word_embeddings": False,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 54,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "moe_num_experts": 64,
        "moe_k": 8,
        "moe_intermediate_size": 3584,
        "moe_num_shared_experts": 0,
        "moe_layer_start_index": 3,
    },
}
"""The published `config.json`s, and one of 0.3 million parameters."""

_BITS = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}


def write_random_checkpoint(
    folder: Path,
    geometry: Geometry = "tiny",
    seed: int = 0,
    *,
    layers: int | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    recipe: Recipe | None = None,
    has_weights: bool = True,
    shard_bytes: int = 5 * 10**9,
    device: Literal["cpu", "cuda"] = "cpu",
) -> None:
    """Write a whole `-PT` checkpoint folder: config, weights, tokenizer and chat template.

    A tensor depends on its name, the seed and the kind of `device` alone, so fewer `layers` are the first of more.
    Matrices keep the size of what they multiply (normal, 1 / sqrt(inputs)), router rows among them, and the correction
    bias is of the size of a probability's spread: experts are used about evenly, but not quite. With a `recipe` the
    matrices are made in its bits: not those that quantizing would give, but of the same sizes. The folder appears when
    it is complete. Without `has_weights` it is for `--load-format dummy`.

    Raises `CheckpointError` when the geometry is unknown, the folder is not empty, the disk is full, or there is no
    such device.
    """
    if geometry not in GEOMETRIES:
        raise CheckpointError(f"There is no geometry {geometry!r}; choose one of {', '.join(get_args(Geometry))}.")
    if device == "cuda" and recipe:
        raise CheckpointError("A GPU makes plain weights only: leave --device or --format out.")
    if device == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("This PyTorch sees no GPU: leave --device out, and wait a few minutes for the 21B.")
    values = GEOMETRIES[geometry] | {"torch_dtype": dtype}
    if layers is not None:
        values["num_hidden_layers"] = layers
    config = ModelConfig.from_dict(values, source=f"geometry {geometry}")
    shapes = parameter_shapes(config)
    quantization = Quantization.of(recipe) if recipe else None
    plain = _BITS[dtype][1]
    with new_folder(folder, model_bytes(shapes, quantization, plain) if has_weights else 0) as unfinished:
        if not has_weights:
            pass
        elif quantization:
            values["quantization_config"] = quantization.as_config()
            write_random_packed(unfinished, shapes, quantization, seed, plain, shard_bytes)
        else:
            _write_weights(unfinished, shapes, seed, dtype, shard_bytes, device, threads=4 if device == "cuda" else 1)
        ids = {name: value for name, value in values.items() if name.endswith("_token_id")}
        _write_json(unfinished / "generation_config.json", ids)
        _write_json(unfinished / "tokenizer.json", random_tokenizer(config.vocab_size))
        _write_json(unfinished / "tokenizer_config.json", random_tokenizer_config())
        (unfinished / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        _write_json(unfinished / "config.json", values)


def _write_weights(
    folder: Path, shapes: dict[str, torch.Size], seed: int, dtype: str, shard_bytes: int, device: str, threads: int
) -> None:
    word, bits = _BITS[dtype]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    sizes: dict[str, int] = {}
    for name, place in tensors_of(shapes, "-PT"):
        kind = "F32" if place.parameter.split(".")[-2] == "router" else word
        tensors[name] = (kind, place.shape)
        sizes[name] = math.prod(place.shape) * (4 if kind == "F32" else bits.itemsize)
    files = cut(sizes, shard_bytes)

    def write(name: str) -> None:
        shard = {each: tensors[each] for each in files[name]}
        write_safetensors(folder / name, shard, _random_tensors(shard, seed, bits, device))

    if threads == 1:
        for name in files:
            write(name)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(write, files))  # an error drops the files that nobody has begun
    write_index(folder, files, sum(sizes.values()))


def _random_tensors(
    shard: dict[str, tuple[str, tuple[int, ...]]], seed: int, bits: torch.dtype, device: str
) -> Iterator[Tensor]:
    for name, (kind, shape) in shard.items():
        chance = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        values = torch.randn(shape, generator=chance, dtype=torch.float32, device=device)
        if "norm" in name:
            values.mul_(0.1).add_(1)
        elif "bias" in name:
            values.mul_(0.25 / shape[-1])
        else:
            values.mul_(shape[-1] ** -0.5)
        yield (values if kind == "F32" else values.to(bits)).cpu()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """The command line of `scripts/make_random_checkpoint`."""
    parser = argparse.ArgumentParser(prog="make_random_checkpoint", description="Write a checkpoint of random weights.")
    parser.add_argument("--geometry", choices=get_args(Geometry), default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="a folder that is new or empty")
    parser.add_argument("--layers", type=int, help="fewer layers than the geometry has")
    parser.add_argument("--dtype", choices=list(_BITS), default="bfloat16")
    parser.add_argument(
        "--format",
        choices=("plain", "none", *RECIPES),
        default="plain",
        help="quantized weights, made directly; none: only what --load-format dummy needs",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: other numbers, much sooner")
    given = parser.parse_args()
    try:
        recipe = None if given.format in ("plain", "none") else given.format
        write_random_checkpoint(
            given.out,
            given.geometry,
            given.seed,
            layers=given.layers,
            dtype=given.dtype,
            recipe=recipe,
            has_weights=given.format != "none",
            device=given.device,
        )
    except CheckpointError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
