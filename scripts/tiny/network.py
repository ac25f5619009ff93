"""The network of `ernie-tiny` as it is trained: a small ERNIE 4.5 MoE and a layer that predicts the token after next.

Knows tensors and the published tensor names. Knows nothing about data, optimizers or the server, whose own
model page must agree with this one through the exported checkpoint alone.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # the name everybody knows
from torch import Tensor, nn

# B documents, S tokens in each, T = B x S, H query heads, K key/value heads, D head size, E experts, A active experts


@dataclass(frozen=True)
class TinyConfig:
    """The shape, with the names of `config.json`."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 7
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    moe_num_experts: int = 8
    moe_k: int = 2
    moe_num_shared_experts: int = 2
    moe_layer_start_index: int = 1
    max_position_embeddings: int = 8192
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    moe_norm_min: float = 1e-12

    @classmethod
    def from_published(cls, path: Path) -> "TinyConfig":
        """Read a `config.json`."""
        known = json.loads(path.read_text())
        return cls(**{f.name: known[f.name] for f in fields(cls)})

    def published(self) -> dict[str, object]:
        """The same as a `config.json` of the family."""
        shape = asdict(self)
        return {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "hidden_act": "silu",
            "use_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "moe_layer_end_index": self.num_hidden_layers - 1,
            "moe_layer_interval": 1,
            "moe_use_aux_free": True,
            "num_nextn_predict_layers": 1,
            "torch_dtype": "bfloat16",
            **shape,
        }


class TinyErnie(nn.Module):
    """Hidden states for token ids; `mtp` goes one token further; `head` turns either into logits."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        H = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, H)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = Norm(H, config.rms_norm_eps)
        self.mtp_emb_norm = nn.ModuleList([Norm(H, config.rms_norm_eps)])
        self.mtp_hidden_norm = nn.ModuleList([Norm(H, config.rms_norm_eps)])
        self.mtp_linear_proj = nn.ModuleList([nn.Linear(2 * H, H, bias=False)])
        self.mtp_block = nn.ModuleList([Block(config, -1)])
        self.turn = rotary_table(config.head_dim, config.max_position_embeddings, config.rope_theta)

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states before the final norm, [B, S, hidden]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.turn[: ids.shape[1]])
        return x

    def mtp(self, hidden: Tensor, next_ids: Tensor, frozen: bool = False) -> Tensor:
        """Hidden states for the token after next. `hidden` is the trunk's, before the final norm.

        With `frozen`, nothing is learned through the embedding.
        """
        embedded = self.embed_tokens(next_ids)
        embedded = embedded.detach() if frozen else embedded
        pair = torch.cat([self.mtp_emb_norm[0](embedded), self.mtp_hidden_norm[0](hidden)], dim=-1)
        return self.mtp_block[0](self.mtp_linear_proj[0](pair), self.turn[: next_ids.shape[1]])

    def head(self, hidden: Tensor, frozen: bool = False) -> Tensor:
        """Logits through the final norm and the embedding, which is also the head. `frozen`: neither learns."""
        if frozen:
            normed = F.rms_norm(hidden, (hidden.shape[-1],), self.norm.weight.detach(), self.norm.eps)
            return F.linear(normed, self.embed_tokens.weight.detach())
        return F.linear(self.norm(hidden), self.embed_tokens.weight)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill every matrix from `seed`; projections that write to the residual stream start near zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim < 2 or name.endswith("correction_bias"):
                continue
            std = 0.02 if "embed_tokens" in name else weight.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "down")):
                std *= 0.2
            weight.normal_(0.0, std, generator=generator)

    def routers(self) -> list["Experts"]:
        """The MoE layers, in order."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, Experts)]

    def published(self) -> dict[str, Tensor]:
        """The weights under the published names: bfloat16, routers and their biases float32."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self.state_dict().items():
            if name.endswith("mlp.gate_up"):
                stem = name.removesuffix("gate_up")
                for e, both in enumerate(weight):
                    gate, up = both.chunk(2)
                    tensors[f"model.{stem}experts.{e}.gate_proj.weight"] = gate.bfloat16().contiguous()
                    tensors[f"model.{stem}experts.{e}.up_proj.weight"] = up.bfloat16().contiguous()
            elif name.endswith("mlp.down"):
                stem = name.removesuffix("down")
                for e, down in enumerate(weight):
                    tensors[f"model.{stem}experts.{e}.down_proj.weight"] = down.bfloat16().contiguous()
            elif name.endswith("mlp.e_score_correction_bias"):
                stem = name.removesuffix("e_score_correction_bias")
                tensors[f"model.{stem}moe_statics.e_score_correction_bias"] = weight.float().view(1, -1).clone()
            elif name.endswith("mlp.gate.weight"):
                tensors[f"model.{name}"] = weight.float().clone()
            else:
                tensors[f"model.{name}"] = weight.bfloat16().clone()
        return tensors

    @torch.no_grad()
    def load_published(self, tensors: dict[str, Tensor]) -> None:
        """Take the weights from the published names."""
        for name, weight in self.state_dict().items():
            stem, _, last = name.rpartition(".mlp.")
            experts = [f"model.{stem}.mlp.experts.{e}" for e in range(self.config.moe_num_experts)]
            if last == "gate_up":
                pairs = [torch.cat([tensors[f"{e}.gate_proj.weight"], tensors[f"{e}.up_proj.weight"]]) for e in experts]
                weight.copy_(torch.stack(pairs))
            elif last == "down":
                weight.copy_(torch.stack([tensors[f"{e}.down_proj.weight"] for e in experts]))
            elif last == "e_score_correction_bias":
                weight.copy_(tensors[f"model.{stem}.mlp.moe_statics.e_score_correction_bias"].view(-1))
            else:
                weight.copy_(tensors[f"model.{name}"])


class Block(nn.Module):
    """One decoder layer; a negative `index` is the dense layer of the MTP head."""

    def __init__(self, config: TinyConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.rms_norm_eps)
        if index >= config.moe_layer_start_index:
            self.mlp: nn.Module = Experts(config)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Attention, then the MLP, each added to the stream."""
        x = x + self.self_attn(self.input_layernorm(x), turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention with grouped key/value heads and rotary pairs (2i, 2i+1)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.H, self.K, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.H * self.D, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.K * self.D, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.K * self.D, bias=False)
        self.o_proj = nn.Linear(self.H * self.D, config.hidden_size, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """[B, S, hidden] to the same."""
        B, S, _ = x.shape
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        q, k, v = F.linear(x, weight).split([self.H * self.D, self.K * self.D, self.K * self.D], dim=-1)
        q = rotate(q.view(B, S, self.H, self.D), turn).transpose(1, 2)
        k = rotate(k.view(B, S, self.K, self.D), turn).transpose(1, 2)
        v = v.view(B, S, self.K, self.D).transpose(1, 2)
        G = self.H // self.K
        out = causal_attention(q, k.repeat_interleave(G, dim=1), v.repeat_interleave(G, dim=1))
        return self.o_proj(out.transpose(1, 2).reshape(B, S, self.H * self.D))


class Experts(nn.Module):
    """Softmax router with a selection bias, the chosen experts' weighted sum, and the shared experts beside it."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        H, W, E = config.hidden_size, config.moe_intermediate_size, config.moe_num_experts
        self.E, self.A, self.norm_min = E, config.moe_k, config.moe_norm_min
        self.gate = nn.Linear(H, E, bias=False)
        self.gate_up = nn.Parameter(torch.empty(E, 2 * W, H))
        self.down = nn.Parameter(torch.empty(E, H, W))
        self.shared_experts = SwiGLU(H, config.moe_num_shared_experts * W)
        self.register_buffer("e_score_correction_bias", torch.zeros(E))
        self.register_buffer("load", torch.zeros(E), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden] to the same. Adds this batch to `load`, the tokens each expert got."""
        flat = x.reshape(-1, x.shape[-1])
        probs = F.linear(flat.float(), self.gate.weight.float()).softmax(dim=-1)
        with torch.no_grad():
            chosen = (probs + self.e_score_correction_bias).topk(self.A, dim=-1).indices  # [T, A]
            counts = torch.bincount(chosen.flatten(), minlength=self.E)
            if self.training:
                self.load += counts
            order = chosen.flatten().argsort(stable=True)
            token = order // self.A
        weights = probs.gather(1, chosen)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=self.norm_min)
        parts = flat.index_select(0, token).split(counts.tolist())
        experts = zip(parts, self.gate_up.unbind(), self.down.unbind(), strict=True)
        out = torch.cat([F.linear(swiglu(F.linear(part, gate_up)), down) for part, gate_up, down in experts])
        out = out * weights.flatten().index_select(0, order).unsqueeze(-1).to(out.dtype)
        routed = torch.zeros_like(flat, dtype=out.dtype).index_add(0, token, out)
        return (self.shared_experts(flat) + routed).view(x.shape)

    @torch.no_grad()
    def balance(self, load: Tensor, step: float) -> None:
        """Raise the bias of experts with less than the mean of `load`, lower the others; forget the load."""
        self.e_score_correction_bias += step * torch.sign(load.mean() - load)
        self.load.zero_()


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Norm(nn.Module):
    """RMSNorm with float32 statistics."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape; the mean square of the last axis becomes one before the weight."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, S, D] to the same. Half of the queries at a time: on a CPU this beats the fused kernel for short rows."""
    B, H, S, D = q.shape
    q, k, v = (q * D**-0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    mask = q.new_full((S, S), float("-inf")).triu(1)
    out = []
    for rows in torch.arange(S).chunk(2 if S <= 768 else 4):
        start, end = int(rows[0]), int(rows[-1]) + 1
        scores = torch.baddbmm(mask[start:end, :end], q[:, start:end], k[:, :end].transpose(1, 2))
        out.append(scores.softmax(dim=-1) @ v[:, :end])
    return torch.cat(out, dim=1).view(B, H, S, D)


def rotary_table(D: int, length: int, theta: float) -> Tensor:
    """e^(i angle) for each position and pair, complex [length, D / 2]."""
    frequency = theta ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn each pair (2i, 2i+1) of [B, S, heads, D] by its position's angle."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2).to(x.dtype)
