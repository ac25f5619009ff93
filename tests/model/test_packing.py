"""A matrix is packed as soon as it is read, and the packed model says what the plain one says."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie_serve.kernels import cpu
from ernie_serve.kernels.cpu import CpuKernels
from ernie_serve.kernels.fused import cpu_kernels
from ernie_serve.kernels.panels import Panels
from ernie_serve.kernels.reference import Matrices, ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import load_packed, matrices, pack
from ernie_serve.model.random_checkpoint import GEOMETRIES, write_random_checkpoint
from ernie_serve.model.weights import load_weights

CPU = torch.device("cpu")
IDS = torch.arange(5, 14)
Logits = Callable[..., torch.Tensor]


class Backwards(ReferenceKernels):
    """Packs each matrix with its columns in reverse, and can multiply by nothing else."""

    def packs(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16

    def pack(self, weight: torch.Tensor) -> Matrices:
        return weight.flip(-1) if weight.dim() == 2 else [matrix.flip(-1) for matrix in weight]

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert not isinstance(weight, torch.nn.Parameter), "a plain matrix is left"
        return super().linear(x, weight.flip(-1))


def empty_model(folder: Path, kernels: ReferenceKernels, dtype: torch.dtype = torch.bfloat16) -> Ernie:
    with torch.device("meta"):
        return Ernie(ModelConfig.from_folder(folder), kernels, dtype)


@pytest.mark.parametrize("layout", ["pt", "paddle"])
@pytest.mark.parametrize("shard_size", ["1GB", "50KB"])
def test_what_is_packed_while_reading_is_what_is_packed_afterwards(
    layout: str, shard_size: str, every_checkpoint: Path, make_checkpoint: Callable[..., Path], logits_of: Logits
) -> None:
    folder = every_checkpoint if layout == "pt" else make_checkpoint("21b-like", layout=layout, shard_size=shard_size)
    read, filled = empty_model(folder, Backwards()), empty_model(folder, Backwards())
    load_packed(read, folder, device=CPU)
    load_weights(filled, folder)
    pack(filled)
    assert not set(matrices(read)) & dict(read.named_parameters()).keys()
    assert not any(parameter.is_meta for parameter in read.parameters())
    assert torch.equal(logits_of(read, IDS), logits_of(filled, IDS))


def test_packing_changes_no_logit(every_checkpoint: Path, logits_of: Logits) -> None:
    plain, packed = empty_model(every_checkpoint, ReferenceKernels()), empty_model(every_checkpoint, Backwards())
    load_weights(plain, every_checkpoint)
    load_packed(packed, every_checkpoint, device=CPU)
    torch.testing.assert_close(logits_of(packed, IDS), logits_of(plain, IDS), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kernels", [ReferenceKernels(), CpuKernels(), Backwards()])
def test_what_has_no_better_order_is_read_straight_into_its_parameters(
    kernels: ReferenceKernels, tiny_checkpoint: Path
) -> None:
    model = empty_model(tiny_checkpoint, kernels, torch.float32)
    load_packed(model, tiny_checkpoint, device=CPU)
    assert set(matrices(model)) < dict(model.named_parameters()).keys()
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_tied_embedding_in_panels_is_there_once(
    tiny_checkpoint: Path, logits_of: Logits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_HAS_ONEDNN_BF16", False)
    if not (kernels := cpu_kernels()).packs(torch.bfloat16):
        pytest.skip("no C++ compiler")
    model, plain = empty_model(tiny_checkpoint, kernels), empty_model(tiny_checkpoint, ReferenceKernels())
    load_packed(model, tiny_checkpoint, device=CPU)
    load_weights(plain, tiny_checkpoint)
    assert model.config.tie_word_embeddings
    assert isinstance(model.embed_tokens.weight, Panels)
    assert model.embed_tokens.head is None
    assert torch.equal(model.embed_tokens.weight.numbers(), plain.embed_tokens.weight)
    torch.testing.assert_close(logits_of(model, IDS), logits_of(plain, IDS), rtol=0.05, atol=0.05)


def test_no_stack_of_experts_is_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 1024, "moe_intermediate_size": 768, "moe_num_experts": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(GEOMETRIES, "tiny", GEOMETRIES["tiny"] | shape)
    write_random_checkpoint(tmp_path / "large", "tiny")
    monkeypatch.undo()
    write_random_checkpoint(tmp_path / "warm", "tiny")
    program = """
import re, sys, torch
from pathlib import Path
from ernie_serve.kernels.reference import ReferenceKernels
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.ernie import Ernie
from ernie_serve.model.packing import load_packed

class Copying(ReferenceKernels):
    def packs(self, dtype):
        return True
    def pack(self, weight):
        return weight.clone()

def load(folder):
    with torch.device("meta"):
        model = Ernie(ModelConfig.from_folder(Path(folder)), Copying(), torch.bfloat16)
    size = sum(tensor.nbytes for tensor in model.parameters())
    load_packed(model, Path(folder), device=torch.device("cpu"))
    return model, size

peak = lambda: int(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1]) * 1024
load(sys.argv[1])
before = peak()
model, size = load(sys.argv[2])
print(peak() - before, size)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "warm"), str(tmp_path / "large")]
    grown, size = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    stack = 64 * 2 * 768 * 1024 * 2
    assert size > 1.4 * stack
    assert 0.9 * size < grown < size + stack / 4
