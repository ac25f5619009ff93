"""From the tensors of a checkpoint to the parameters of the model.

Knows what the two published layouts call each tensor, and in which part of which parameter it belongs. Knows
nothing of the network beyond the names and shapes of its parameters, nor of how a file is laid out.

Both layouts hold the same numbers:

    -PT        torch's way: a Linear is [out, in]; q, k, v and gate, up are tensors of their own
    -Paddle    Paddle's way: a Linear is [in, out]; q, k, v lie side by side in one tensor, gate then up in
               another (called up_gate); bf16 is stored as 16-bit integers

Everything is decided from the headers before the first number is read.
"""

import re
from collections.abc import Iterator
from itertools import chain
from typing import Literal, NamedTuple

import torch
from torch import nn

from ernie_serve.errors import CheckpointError
from ernie_serve.model.placing import Place, Progress, Put, into_parameters, read_all
from ernie_serve.model.safetensors_file import BLOCK_BYTES, StoredTensor
from ernie_serve.model.shards import OpenShards, Source, opened, some

Layout = Literal["-PT", "-Paddle"]
Kind = Literal["plain", "bias", "linear", "qkv", "gate_up"]


class Row(NamedTuple):
    """One line of the table. `paddle` is the -Paddle name where it is not the -PT one."""

    ours: str
    torch: str
    kind: Kind
    paddle: str | None = None


# {n} is a layer, {e} an expert, {part} one of q, k, v or of gate, up. On disk every name but lm_head's has
# "model." (-PT) or "ernie." (-Paddle) before it.
TABLE = (
    Row("embed_tokens.weight", "embed_tokens.weight", "plain"),
    Row("norm.weight", "norm.weight", "plain"),
    Row("lm_head.weight", "lm_head.weight", "linear"),
)
LAYER_TABLE = (
    Row("input_layernorm.weight", "input_layernorm.weight", "plain"),
    Row("self_attn.qkv_proj.weight", "self_attn.{part}_proj.weight", "qkv", "self_attn.qkv_proj.weight"),
    Row("self_attn.o_proj.weight", "self_attn.o_proj.weight", "linear"),
    Row("post_attention_layernorm.weight", "post_attention_layernorm.weight", "plain"),
    Row("mlp.gate_up_proj.weight", "mlp.{part}_proj.weight", "gate_up", "mlp.up_gate_proj.weight"),
    Row("mlp.down_proj.weight", "mlp.down_proj.weight", "linear"),
    Row("mlp.router.weight", "mlp.gate.weight", "linear"),
    Row("mlp.router.correction_bias", "mlp.moe_statics.e_score_correction_bias", "bias"),
    Row("mlp.experts.gate_up", "mlp.experts.{e}.{part}_proj.weight", "gate_up", "mlp.experts.{e}.up_gate_proj.weight"),
    Row("mlp.experts.down", "mlp.experts.{e}.down_proj.weight", "linear"),
    Row(
        "mlp.shared.gate_up_proj.weight",
        "mlp.shared_experts.{part}_proj.weight",
        "gate_up",
        "mlp.shared_experts.up_gate_proj.weight",
    ),
    Row("mlp.shared.down_proj.weight", "mlp.shared_experts.down_proj.weight", "linear"),
)

SKIPPED = ("mtp", "resampler_model", "weight_1")
"""What a name contains if it belongs to multi-token prediction or to vision: such a tensor is not read."""

_PREFIX: dict[Layout, str] = {"-PT": "model.", "-Paddle": "ernie."}
_DTYPES: dict[Layout, dict[str, torch.dtype]] = {
    "-PT": {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32},
    "-Paddle": {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U16": torch.bfloat16},
}


def load_weights(
    model: nn.Module,
    source: Source,
    progress: Progress | None = None,
    *,
    device: torch.device | str = "cpu",
    put: Put | None = None,
) -> None:
    """Fill the model's parameters from a checkpoint folder of either layout, or what stands for one.

    Parameters on the meta device come to be on `device`, in their own dtype, and are read into directly: beside
    the weights themselves a few blocks of memory are used. A tensor of another dtype is converted as it is read.
    `progress` gets a share that only grows, up to 1, and what is being done. `put` replaces the copy into
    parameters, for whoever keeps weights in another form: then the model's own stay untouched.

    Raises `CheckpointError` naming the file or the tensors when some are missing, unexpected or of the wrong
    shape or dtype, before any is read.
    """
    with opened(source) as shards:
        layout = _layout_of(shards)
        work, head = _plan(model, shards, layout)
        if head is not None:
            _check_tied_head(head, shards.tensors[_PREFIX[layout] + "embed_tokens.weight"])
        read_all(
            work, _DTYPES[layout], put or into_parameters(model, torch.device(device)), progress or (lambda *_: None)
        )


def tensors_of(parameters: dict[str, torch.Size], layout: Layout) -> Iterator[tuple[str, Place]]:
    """The name and place of every tensor that a checkpoint of this layout has for parameters of these shapes."""
    for ours, shape in parameters.items():
        layer = re.match(r"layers\.(\d+)\.", ours)
        before = layer.group() if layer else ""
        row = next((row for row in (LAYER_TABLE if layer else TABLE) if row.ours == ours.removeprefix(before)), None)
        assert row is not None, f"the table of checkpoint names has no line for the parameter {ours}"
        name = row.torch if layout == "-PT" else row.paddle or row.torch
        name = ("" if row.torch == "lm_head.weight" else _PREFIX[layout]) + before + name
        transposed = layout == "-Paddle" and row.kind not in ("plain", "bias")
        experts: list[int | None] = list(range(shape[0])) if "{e}" in name else [None]
        for expert in experts:
            rows, *columns = shape if expert is None else shape[1:]
            for part, first, count in _parts(row.kind if "{part}" in name else "linear", rows, parameters, before):
                matrix = (count, *columns)
                stored = (1, *matrix) if row.kind == "bias" else matrix[::-1] if transposed else matrix
                yield name.format(e=expert, part=part), Place(ours, stored, first, count, expert, transposed)


def _parts(kind: Kind, rows: int, parameters: dict[str, torch.Size], before: str) -> list[tuple[str, int, int]]:
    """The parts of a fused matrix: name, first row, number of rows."""
    if kind == "gate_up":
        return [("gate", 0, rows // 2), ("up", rows // 2, rows // 2)]
    if kind == "qkv":
        q = parameters[f"{before}self_attn.o_proj.weight"][1]  # heads x head size, which need not be the hidden size
        kv = (rows - q) // 2
        return [("q", 0, q), ("k", q, kv), ("v", q + kv, kv)]
    return [("", 0, rows)]


def _layout_of(shards: OpenShards) -> Layout:
    names = [name for name in shards.tensors if not _is_skipped(name)]
    found = [layout for layout, prefix in _PREFIX.items() if any(name.startswith(prefix) for name in names)]
    if len(found) != 1:
        kinds = "of both layouts" if found else "of no known layout"
        raise CheckpointError(
            f"{shards.folder} has tensors {kinds} ({some(names)}). ERNIE 4.5 checkpoints call them model.… (-PT) "
            "or ernie.… (-Paddle)."
        )
    return found[0]


def _plan(
    model: nn.Module, shards: OpenShards, layout: Layout
) -> tuple[list[tuple[Place, StoredTensor]], StoredTensor | None]:
    """Every tensor to read with its place, and a head that is stored though it is tied.

    In file order, but for the parts of one matrix, which follow one another.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    places = dict(tensors_of(shapes, layout))
    stored = {name: tensor for name, tensor in shards.tensors.items() if not _is_skipped(name)}
    head = stored.pop("lm_head.weight") if "lm_head.weight" in stored.keys() - places.keys() else None
    wrong_shape = [
        f"{name} is {list(tensor.shape)} instead of {list(places[name].shape)}"
        for name, tensor in stored.items()
        if name in places and tensor.shape != places[name].shape
    ]
    wrong_dtype = [
        f"{name} is {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in _DTYPES[layout]
    ]
    problems = [
        f"{what} ({len(names)}): {some(names)}."
        for what, names in (
            ("missing tensors", [name for name in places if name not in stored]),
            ("unexpected tensors", [name for name in stored if name not in places]),
            ("tensors of another shape", wrong_shape),
            (f"tensors of a dtype other than {', '.join(_DTYPES[layout])}", wrong_dtype),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{shards.folder} does not fit its config.json: {' '.join(problems)}")
    matrices: dict[tuple[str, int | None], list[tuple[Place, StoredTensor]]] = {}
    for name, tensor in stored.items():
        matrices.setdefault((places[name].parameter, places[name].expert), []).append((places[name], tensor))
    return list(chain.from_iterable(matrices.values())), head


def _is_skipped(name: str) -> bool:
    return any(part in name for part in SKIPPED)


def _check_tied_head(head: StoredTensor, embedding: StoredTensor) -> None:
    """A tied head may be stored as well, if it is the same: a fine-tuned one must not be lost without a word."""
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same:
        bits = {"F32": torch.int32}.get(head.dtype, torch.int16)
        ours, theirs = (
            tensor.blocks(bits, torch.empty(BLOCK_BYTES, dtype=torch.uint8)) for tensor in (head, embedding)
        )
        same = all(torch.equal(left, right) for (_, left), (_, right) in zip(ours, theirs, strict=True))
    if not same:
        raise CheckpointError(
            f"{head.file.path} has an lm_head.weight that differs from the embedding, yet config.json ties them. "
            "Set `tie_word_embeddings` to false there."
        )
