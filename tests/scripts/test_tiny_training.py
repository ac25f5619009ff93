"""The training of `ernie-tiny`: it learns, it goes on after a kill, and its files mean what it trained."""

import itertools
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ernie_serve.bundled import ERNIE_TINY

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import train_tiny  # scripts are no package of ours
from tiny import checkpoint
from tiny.batches import Batches
from tiny.network import TinyConfig, TinyErnie
from tiny.optimizer import Optimizer, orthogonal
from tiny.trainer import Report, Team, Trainer


@pytest.fixture
def trainer():
    def make() -> Trainer:
        tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
        config = TinyConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            head_dim=8,
            moe_num_experts=4,
        )
        return Trainer(config, Batches(tokenizer, 3, 500, 400, 300, 0.1), 3, Team(1))

    return make


def test_the_loss_falls(trainer):
    training = trainer()
    losses = [training.step(0.1).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1


def test_resuming_repeats_what_would_have_been(trainer, tmp_path):
    whole = trainer()
    for _ in range(2):
        whole.step(0.8)
    checkpoint.save_state(tmp_path, *whole.state())
    expected = whole.step(0.8)
    resumed = trainer()
    saved = checkpoint.load_state(tmp_path)
    assert saved is not None
    resumed.load(*saved)
    report = resumed.step(0.8)
    assert (report.loss, report.mtp_loss, report.tokens) == (expected.loss, expected.mtp_loss, expected.tokens)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, resumed.network.state_dict()[name]), name


def test_biases_leave_zero_and_the_mtp_layer_learns_only_late(trainer):
    training = trainer()
    before = {n: p.detach().clone() for n, p in training.network.named_parameters()}
    training.step(0.1)
    moved = {n for n, p in training.network.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert not any(n.startswith("mtp_") for n in moved)
    assert all(layer.e_score_correction_bias.abs().max() > 0 for layer in training.network.routers())
    training.step(0.9)
    assert any(
        not torch.equal(p, before[n]) for n, p in training.network.named_parameters() if n.startswith("mtp_block")
    )


def test_the_mtp_layer_teaches_the_trunk_nothing(trainer):
    training = trainer()
    network = training.network
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = network(ids[:, :-1])
    network.head(network.mtp(hidden.detach()[:, :-1], ids[:, 1:-1], frozen=True), frozen=True).float().sum().backward()
    assert all(p.grad is None for n, p in network.named_parameters() if not n.startswith("mtp_"))
    assert all(p.grad is not None for n, p in network.named_parameters() if n.startswith("mtp_"))


def test_files_give_the_same_network_back(trainer, tmp_path):
    training = trainer()
    training.step(0.9)
    network = training.network
    checkpoint.export(tmp_path, network.published(), network.config.published(), [2, 3])
    again = TinyErnie(TinyConfig.from_published(tmp_path / "config.json"))
    again.load_published(load_file(tmp_path / "model.safetensors"))
    for name, weight in network.state_dict().items():
        kept = weight if name.endswith(("mlp.gate.weight", "correction_bias")) else weight.bfloat16().float()
        assert torch.equal(kept, again.state_dict()[name]), name
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [2, 3]


def test_transformers_reads_the_files_alike(trainer, tmp_path):
    transformers = pytest.importorskip("transformers")
    network = trainer().network.eval()
    for layer in network.routers():
        layer.e_score_correction_bias += torch.tensor([0.2, -0.1, 0.0, 0.1])
    checkpoint.export(tmp_path, network.published(), network.config.published(), [2])
    network.load_published(load_file(tmp_path / "model.safetensors"))
    model = transformers.Ernie4_5_MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network.head(network(ids)), model(ids).logits, atol=1e-4, rtol=1e-4)


def test_two_processes_turn_what_one_would(trainer):
    network = trainer().network
    stacks = [torch.randn(5, 8, 20), torch.randn(1, 6, 6)]
    whole = Optimizer(network, (0, 1, lambda tensors: tensors)).turned(stacks)
    parts = [Optimizer(network, (rank, 2, lambda tensors: tensors)).turned(stacks) for rank in range(2)]
    for one, a, b in zip(whole, *parts, strict=True):
        torch.testing.assert_close(one, a + b, atol=1e-5, rtol=1e-5)


def test_the_script_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    small = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    layers = {"num_hidden_layers": 2, "moe_num_experts": 4}
    monkeypatch.setattr(train_tiny, "TinyConfig", lambda vocab_size: TinyConfig(vocab_size, **small, **layers))
    monkeypatch.setattr(train_tiny, "Batches", lambda made, seed, **_: Batches(made, seed, 300, 300, 300, 0.1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ERNIE_TINY / name, tmp_path / name)
    clock = itertools.count()  # a second passes between two looks at it: a step takes one
    monkeypatch.setattr("tiny.trainer.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    job = train_tiny.Job(6 / 60, tmp_path / "work", tmp_path, 3, 1, 0.0, True, "")
    step, done = Trainer.step, []

    def killed(trainer: Trainer, progress: float) -> Report:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(progress)
        return step(trainer, progress)

    with monkeypatch.context() as short:
        short.setattr(Trainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_tiny.train(job, 0, None)
    assert not (tmp_path / "model.safetensors").exists()
    train_tiny.train(job, 0, None)
    assert "resumes at step 3," in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "work" / "state.json").read_text())["step"] == 6


def test_newton_schulz_gives_singular_values_about_one():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5
