"""The training loop: micro-batches in, one step of the optimizer out, a state that can be saved and taken up again.

Knows the network, the optimizer and the schedule. Knows nothing about files, progress bars or what the data says.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  # the name everybody knows
from torch import Tensor

from tiny.batches import Batches, Document
from tiny.network import TinyConfig, TinyErnie
from tiny.optimizer import Optimizer

WARMUP_STEPS = 40
LESSONS_UNTIL = 0.45
"""From then on the mixture stays as it is at its end."""
DECAY_FROM = 0.55
MTP_FROM = 0.72
BALANCE_RATE = 0.002
LONGEST_STEP_SECONDS = 60.0
"""A longer step counts as this much training: the process was paused."""

Counter = Any  # multiprocessing's shared integer, which it does not type


@dataclass(frozen=True)
class Report:
    """What one step did. Losses are weighted means over learned tokens, in nats."""

    tokens: int
    loss: float
    mtp_loss: float
    norm: float
    busiest: float
    seconds: float


class Team:
    """Processes of one thread each that share a step: each claims micro-batches, then they add up what they find."""

    def __init__(self, size: int, claimed: Counter | None = None, rank: int = 0) -> None:
        self.size, self.rank = size, rank
        self.claimed = claimed
        self.base = 0

    def share(self, count: int) -> Iterator[int]:
        """Those of `count` micro-batches that fall to this process."""
        if self.claimed is None:
            yield from range(count)
            return
        while True:
            with self.claimed.get_lock():
                index = self.claimed.value - self.base
                self.claimed.value += 1
            if index >= count:
                self.base += count + self.size  # each process has claimed one too many
                return
            yield index

    def add_up(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum over all processes of each tensor, in float32."""
        if self.size == 1:
            return tensors
        flat = torch.cat([t.flatten().float() for t in tensors])
        dist.all_reduce(flat)
        return [part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


class Trainer:
    """Owns the network and its optimizer; `step` trains once."""

    def __init__(self, config: TinyConfig, batches: Batches, seed: int, team: Team) -> None:
        self.network = TinyErnie(config)
        self.network.initialise(seed)
        self.optimizer = Optimizer(self.network, (team.rank, team.size, team.add_up))
        self.batches = batches
        self.team = team
        self.number = 0
        self.seconds = 0.0
        self.tokens = 0

    def step(self, progress: float) -> Report:
        """One step at `progress` (0 to 1) of the schedule; the same `progress` in every process of the team."""
        began = time.monotonic()
        groups = self.batches.step(self.number, progress / LESSONS_UNTIL)
        learned = sum(sum(d.weights[1:]) for group in groups for d in group)
        losses = torch.zeros(2)
        self.network.train()
        for index in self.team.share(len(groups)):
            losses += self.learn(groups[index], learned, ahead=progress >= MTP_FROM)
        losses, *loads = self.collect(losses, ahead=progress >= MTP_FROM)
        norm = self.optimizer.step(rate(self.number, progress))
        for layer, load in zip(self.network.routers(), loads, strict=True):
            layer.balance(load, BALANCE_RATE * rate(WARMUP_STEPS, progress))
        took = min(time.monotonic() - began, LONGEST_STEP_SECONDS)
        total = sum(len(d.ids) for group in groups for d in group)
        self.number, self.seconds, self.tokens = self.number + 1, self.seconds + took, self.tokens + total
        busiest = max(float(load.max() / load.mean()) for load in loads)
        return Report(total, float(losses[0]), float(losses[1]), norm, busiest, took)

    def learn(self, group: list[Document], learned: float, ahead: bool) -> Tensor:
        """Add one micro-batch's gradients; give its share of the two losses."""
        ids, weights = padded(group)
        hidden = self.network(ids[:, :-1])
        loss = chosen_loss(self.network, hidden, ids[:, 1:], weights[:, 1:]) / learned
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        if not ahead:
            return torch.stack([loss.detach(), torch.zeros(())])
        after = self.network.mtp(hidden.detach()[:, :-1], ids[:, 1:-1], frozen=True)
        mtp_loss = chosen_loss(self.network, after, ids[:, 2:], weights[:, 2:], frozen=True) / learned
        mtp_loss.backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach(), mtp_loss.detach()])

    def collect(self, losses: Tensor, ahead: bool) -> list[Tensor]:
        """Sum gradients over the team; give the summed losses and the summed load of each router."""
        learners = [p for n, p in self.network.named_parameters() if ahead or not n.startswith("mtp_")]
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in learners]
        loads = [layer.load for layer in self.network.routers()]
        losses, *summed = self.team.add_up([losses, *loads, *grads])
        for p, grad in zip(learners, summed[len(loads) :], strict=True):
            p.grad = grad.to(p.dtype)
        return [losses, *summed[: len(loads)]]

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


def padded(group: list[Document]) -> tuple[Tensor, Tensor]:
    """Ids and how much each is to be learned, [B, S], filled up with zeros."""
    length = max(len(d.ids) for d in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    weights = torch.zeros(len(group), length)
    for row, document in enumerate(group):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        weights[row, : len(document.ids)] = torch.tensor(document.weights)
    return ids, weights


def chosen_loss(network: TinyErnie, hidden: Tensor, targets: Tensor, weights: Tensor, frozen: bool = False) -> Tensor:
    """The weighted sum of the losses; logits are made only where there is weight."""
    chosen = weights > 0
    logits = network.head(hidden[chosen], frozen=frozen)
    return weights[chosen] @ F.cross_entropy(logits, targets[chosen], reduction="none")
