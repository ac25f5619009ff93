"""Muon for matrices, Adam for everything else.

Knows tensors by name and shape only. Processes that train together each turn a share of Muon's matrices.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

Split = tuple[int, int, Callable[[list[Tensor]], list[Tensor]]]
"""This process's number, how many there are, and what sums tensors over all of them."""


class Optimizer:
    """Call `step(rate)` after backward, with `rate` in 0..1 scaling both learning rates; gradients are then gone."""

    def __init__(
        self,
        network: nn.Module,
        split: Split,
        muon_lr: float = 0.02,
        adam_lr: float = 0.003,
        decay: float = 0.02,
    ) -> None:
        self.parameters = dict(network.named_parameters())
        self.split = split
        self.muon_lr, self.adam_lr, self.decay = muon_lr, adam_lr, decay
        self.momentum: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def step(self, rate: float, largest_norm: float = 1.0) -> float:
        """Move every parameter that has a gradient; give the norm of all gradients before Adam's were clipped."""
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for p in self.parameters.values():
            p.grad = None
        norm = float(torch.stack([g.norm() for g in grads.values()]).norm())
        scale = min(1.0, largest_norm / (norm + 1e-9))
        groups: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, grad in grads.items():
            if is_matrix(name, grad):
                groups[pieces(name, grad).shape[-2:]].append(name)  # type: ignore[index]  # a shape of two
            else:
                self.adam(name, grad * scale, rate)
        self.muon(list(groups.values()), grads, rate)
        return norm

    def adam(self, name: str, grad: Tensor, rate: float) -> None:
        first = self.momentum.setdefault(name, torch.zeros_like(grad))
        second = self.squares.setdefault(name, torch.zeros_like(grad))
        self.counts[name] = count = self.counts.get(name, 0) + 1
        first.lerp_(grad, 0.1)
        second.lerp_(grad.square(), 0.02)
        step = (first / (1 - 0.9**count)) / ((second / (1 - 0.98**count)).sqrt() + 1e-10)
        self.parameters[name].sub_(step, alpha=rate * self.adam_lr)

    def muon(self, groups: list[list[str]], grads: dict[str, Tensor], rate: float) -> None:
        """All matrices of one shape at once; `groups` are the names of each shape."""
        stacks = []
        for names in groups:
            parts = []
            for name in names:
                grad = grads[name]
                first = self.momentum.setdefault(name, torch.zeros_like(grad))
                first.lerp_(grad, 0.05)
                parts.append(pieces(name, grad.lerp(first, 0.95)))
            stacks.append(torch.cat(parts))
        for names, turned in zip(groups, self.turned(stacks), strict=True):
            gain = max(1.0, turned.shape[-2] / turned.shape[-1]) ** 0.5
            sizes = [len(pieces(name, grads[name])) for name in names]
            for name, part in zip(names, turned.split(sizes), strict=True):
                weight = self.parameters[name]
                weight.mul_(1 - rate * self.muon_lr * self.decay)
                weight.sub_(part.reshape(weight.shape), alpha=rate * self.muon_lr * gain)

    def turned(self, stacks: list[Tensor]) -> list[Tensor]:
        """Each stack made orthogonal: this process does its share of every stack and the sum brings the others'."""
        rank, size, add_up = self.split
        out = []
        for stack in stacks:
            start, end = len(stack) * rank // size, len(stack) * (rank + 1) // size
            whole = torch.zeros_like(stack)
            if end > start:
                whole[start:end] = orthogonal(stack[start:end])
            out.append(whole)
        return add_up(out)

    def state(self) -> dict[str, Tensor]:
        """Everything to go on from, as plain tensors."""
        tensors = {f"weight.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"momentum.{n}": t for n, t in self.momentum.items()}
        tensors |= {f"squares.{n}": t for n, t in self.squares.items()}
        return tensors | {f"count.{n}": torch.tensor(c) for n, c in self.counts.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take up a saved state."""
        for key, tensor in tensors.items():
            kind, name = key.split(".", 1)
            if kind == "weight":
                self.parameters[name].copy_(tensor)
            elif kind == "momentum":
                self.momentum[name] = tensor.clone()
            elif kind == "squares":
                self.squares[name] = tensor.clone()
            elif kind == "count":
                self.counts[name] = int(tensor)


def is_matrix(name: str, grad: Tensor) -> bool:
    """Embeddings, norms and routers go to Adam."""
    return grad.ndim >= 2 and "embed_tokens" not in name and not name.endswith("mlp.gate.weight")


def pieces(name: str, grad: Tensor) -> Tensor:
    """[n, rows, columns]: experts are matrices of their own, and so are gate and up."""
    if name.endswith("gate_up"):
        return grad.reshape(-1, grad.shape[1] // 2, grad.shape[2])
    return grad if grad.ndim == 3 else grad.unsqueeze(0)


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices with equal singular values, about one, by five Newton-Schulz steps (Jordan et al., 2024)."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT
