"""The training loop: micro-batches in, one step of the optimizer out, a state that can be saved and taken up again.

Knows the network, the optimizer and the schedule. Knows nothing about files, progress bars or what the data says.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny.batches import Batches, Document
from tiny.network import TinyConfig, TinyErnie
from tiny.optimizer import Optimizer

WARMUP_STEPS = 40
DECAY_FROM = 0.55
MTP_FROM = 0.72
BALANCE_RATE = 0.002


@dataclass(frozen=True)
class Report:
    """What one step did. Losses are means over learned tokens, in nats."""

    tokens: int
    loss: float
    mtp_loss: float
    norm: float
    busiest: float
    seconds: float


class Trainer:
    """Owns the network and its optimizer; `step` trains once."""

    def __init__(self, config: TinyConfig, batches: Batches, seed: int) -> None:
        self.network = TinyErnie(config)
        self.network.initialise(seed)
        self.optimizer = Optimizer(self.network)
        self.batches = batches
        self.number = 0
        self.seconds = 0.0
        self.tokens = 0
        to_bfloat16(self.network)

    def step(self, progress: float) -> Report:
        """One step at `progress` (0 to 1) of the schedule."""
        began = time.monotonic()
        groups = self.batches.step(self.number, progress / DECAY_FROM)
        learned = sum(sum(d.learn[1:]) for group in groups for d in group)
        loss = mtp_loss = 0.0
        self.network.train()
        for group in groups:
            ids, chosen = padded(group)
            hidden = self.network(ids[:, :-1])
            part = chosen_loss(self.network, hidden, ids[:, 1:], chosen[:, 1:]) / learned
            part.backward()  # type: ignore[no-untyped-call]  # torch does not type it
            loss += float(part)
            if progress >= MTP_FROM and ids.shape[1] > 2:
                ahead = self.network.mtp(hidden.detach()[:, :-1], ids[:, 1:-1], frozen=True)
                part = chosen_loss(self.network, ahead, ids[:, 2:], chosen[:, 2:], frozen=True) / learned
                part.backward()  # type: ignore[no-untyped-call]
                mtp_loss += float(part)
        norm = self.optimizer.step(rate(self.number, progress))
        loads = [layer.balance(BALANCE_RATE * rate(0x7FFFFFFF, progress)) for layer in self.network.routers()]
        took = time.monotonic() - began
        mean = self.seconds / self.number if self.number > 20 else took
        took = min(took, 4 * mean)  # a process that was paused has not trained
        self.number += 1
        self.seconds += took
        total = sum(len(d.ids) for group in groups for d in group)
        self.tokens += total
        busiest = max(float(load.max() / load.mean()) for load in loads)
        return Report(total, loss, mtp_loss, norm, busiest, took)

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Tensors and facts from which `load` goes on."""
        biases = {f"bias.{n}": layer.e_score_correction_bias for n, layer in enumerate(self.network.routers())}
        return self.optimizer.state() | biases, {"step": self.number, "seconds": self.seconds, "tokens": self.tokens}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], facts: dict[str, float]) -> None:
        """Take up a saved state."""
        self.optimizer.load({k: v for k, v in tensors.items() if not k.startswith("bias.")})
        for n, layer in enumerate(self.network.routers()):
            layer.e_score_correction_bias.copy_(tensors[f"bias.{n}"])
        self.number, self.seconds, self.tokens = int(facts["step"]), facts["seconds"], int(facts["tokens"])


def rate(number: int, progress: float) -> float:
    """Learning rate as a share of the highest: up, level, then down to almost nothing."""
    up = min(1.0, (number + 1) / WARMUP_STEPS)
    return up * min(1.0, max(0.02, (1.0 - progress) / (1.0 - DECAY_FROM)))


def to_bfloat16(network: TinyErnie) -> None:
    """Everything but routers and their biases, as in the published files."""
    for name, parameter in network.named_parameters():
        if not name.endswith("mlp.gate.weight"):
            parameter.data = parameter.data.bfloat16()


def padded(group: list[Document]) -> tuple[Tensor, Tensor]:
    """Ids and what is to be learned, [B, S], filled up with zeros."""
    length = max(len(d.ids) for d in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    chosen = torch.zeros(len(group), length, dtype=torch.bool)
    for row, document in enumerate(group):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        chosen[row, : len(document.ids)] = torch.tensor(document.learn)
    return ids, chosen


def chosen_loss(network: TinyErnie, hidden: Tensor, targets: Tensor, chosen: Tensor, frozen: bool = False) -> Tensor:
    """The sum of the losses where `chosen`; logits are made for those places only."""
    logits = network.head(hidden[chosen], frozen=frozen)
    return F.cross_entropy(logits.float(), targets[chosen], reduction="sum")
