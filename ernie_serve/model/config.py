"""The shape of a checkpoint, read from its `config.json`.

Knows the keys of both published layouts and refuses what the network does not do. Knows no torch and no tensor:
the API process reads this file too.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ernie_serve.errors import CheckpointError
from ernie_serve.model.recipes import Quantization, read_config

DType = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """An ERNIE 4.5 text model, dense or mixture of experts. Names are those of `config.json`.

    A dense model has `moe_num_experts` 0, and then the other `moe_…` values mean nothing.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    dtype: DType = "bfloat16"
    bos_token_id: int | None = None
    moe_num_experts: int = 0
    moe_k: int = 0
    moe_intermediate_size: int = 0
    moe_num_shared_experts: int = 0
    moe_layer_start_index: int = 0
    moe_layer_end_index: int = -1
    moe_layer_interval: int = 1
    moe_norm_min: float = 1e-12
    quantization: Quantization | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of a checkpoint folder. Raises `CheckpointError`."""
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; a checkpoint folder holds config.json.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object.")
        return cls.from_dict(values, source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Build from the object in a `config.json`; `source` names it in errors. Raises `CheckpointError`."""
        keys = _Keys(values, source)
        is_moe = _architecture(keys)
        _refuse_what_is_not_implemented(keys)
        hidden_size, num_heads = keys.size("hidden_size"), keys.size("num_attention_heads")
        dims = keys.size("head_dim") if keys.has("head_dim") else _derived_head_dim(keys, hidden_size, num_heads)
        config = cls(
            model_type=keys.text("model_type"),
            vocab_size=keys.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.size("intermediate_size"),
            num_hidden_layers=keys.size("num_hidden_layers", most=_MOST_PARTS),
            num_attention_heads=num_heads,
            num_key_value_heads=_num_key_value_heads(keys, num_heads),
            head_dim=dims,
            max_position_embeddings=keys.size("max_position_embeddings", most=2**31 - 1),
            rms_norm_eps=keys.positive("rms_norm_eps"),
            rope_theta=_rope_theta(keys),
            tie_word_embeddings=_tied(keys),
            dtype=_dtype(keys),
            bos_token_id=keys.integer("bos_token_id") if keys.has("bos_token_id") else None,
            quantization=_quantization(keys),
            **(_moe(keys) if is_moe else {}),
        )
        _check(config, keys)
        return config

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index`, counted from 0, routes to experts."""
        if not self.moe_num_experts or (index + 1) % self.moe_layer_interval:
            return False
        return self.moe_layer_start_index <= index <= self.moe_layer_end_index

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared MLP: all shared experts are one."""
        return self.moe_num_shared_experts * self.moe_intermediate_size


_DENSE = ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM")
_MOE = ("Ernie4_5_MoeForCausalLM",)

# Keys that change the numbers, with the values that mean "off". Anything else is refused.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_rmsnorm": (True,),
    "sliding_window": (),
    "compression_ratio": (1,),
    "rope_3d": (False,),
    "vision_config": (),
    "quantization": (),
    "moe_quant_type": (),
    "moe_gate_act": ("softmax",),
    "moe_norm_gate_logits": (True,),
    "moe_group_experts": (False,),
    "moe_use_hard_gate": (False,),
    "moe_use_token_type_bias": (False,),
}


_LARGEST = sys.float_info.max

_MOST_PARTS = 4096
"""Layers, or experts of a layer: each is made, and has names of its own."""


class _Keys:
    """The object in the file, asked for one key at a time; every complaint names the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def wrong(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f'{self.source}: "{key}" {problem}')

    def has(self, key: str) -> bool:
        """Whether the key is there; `null` counts as absent."""
        return self.values.get(key) is not None

    def required(self, key: str) -> Any:
        if not self.has(key):
            raise self.wrong(key, "is missing. It has no safe default: the published layouts assume different ones.")
        return self.values[key]

    def text(self, key: str) -> str:
        value = self.required(key)
        if not isinstance(value, str):
            raise self.wrong(key, f"is {value!r}, not a string.")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.required(key) if default is None or self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, f"is {value!r}, not a whole number.")
        return value

    def size(self, key: str, *, least: int = 1, most: int = 2**19) -> int:
        value = self.integer(key)
        if value < least:
            raise self.wrong(key, f"is {value}; it must be at least {least}.")
        if value > most:
            raise self.wrong(key, f"is {value}; at most {most} are served.")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        return self.check_positive(key, self.required(key) if default is None or self.has(key) else default)

    def check_positive(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST:
            raise self.wrong(key, f"is {value!r}, not a number above 0.")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.required(key)
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {value!r}, not true or false.")
        return value


def _architecture(keys: _Keys) -> bool:
    """Whether the model is a mixture of experts; refuses every other family."""
    model_type = keys.text("model_type")
    if model_type not in ("ernie4_5", "ernie4_5_moe"):
        raise keys.wrong("model_type", f'is "{model_type}"; only "ernie4_5" and "ernie4_5_moe" are served.')
    is_moe = model_type == "ernie4_5_moe"
    expected = _MOE if is_moe else _DENSE
    names = keys.values.get("architectures") or expected
    if not isinstance(names, list | tuple) or not all(name in expected for name in names):
        raise keys.wrong("architectures", f'is {names!r}; "{model_type}" is served as {" or ".join(expected)}.')
    if not is_moe and keys.values.get("moe_num_experts"):
        raise keys.wrong("moe_num_experts", f'is {keys.values["moe_num_experts"]!r} in a dense "{model_type}" model.')
    return is_moe


def _refuse_what_is_not_implemented(keys: _Keys) -> None:
    for key, neutral in _NEUTRAL.items():
        value = keys.values.get(key)
        if value is not None and value not in neutral:
            wanted = " or ".join(json.dumps(v) for v in (*neutral, None))
            raise keys.wrong(key, f"is {value!r}, which is not implemented; only {wanted} is.")


def _rope_theta(keys: _Keys) -> float:
    """From the legacy top-level key or from `rope_parameters`; any scaling of positions is refused."""
    rope: Mapping[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = keys.values.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise keys.wrong(key, f"is {value!r}, not an object.")
        kind = value.get("rope_type", value.get("type", "default"))
        unknown = sorted(set(value) - {"rope_type", "type", "rope_theta"})
        if kind != "default" or unknown:
            what = f'has "rope_type": {kind!r}' if kind != "default" else f'has "{unknown[0]}"'
            raise keys.wrong(key, f"{what}: scaled rotary positions are not implemented.")
        rope = {**rope, **value}
    if "rope_theta" not in rope:
        return keys.positive("rope_theta")
    theta = keys.check_positive("rope_parameters.rope_theta", rope["rope_theta"])
    if keys.has("rope_theta") and keys.positive("rope_theta") != theta:
        raise keys.wrong("rope_theta", f"is {keys.values['rope_theta']}, but rope_parameters says {theta}.")
    return theta


def _derived_head_dim(keys: _Keys, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise keys.wrong(
            "head_dim", f"is missing and hidden_size {hidden_size} is not a multiple of {num_heads} attention heads."
        )
    return hidden_size // num_heads


def _num_key_value_heads(keys: _Keys, num_heads: int) -> int:
    """`null` says as many as query heads; an absent key says nothing, and the layouts differ."""
    if "num_key_value_heads" in keys.values and keys.values["num_key_value_heads"] is None:
        return num_heads
    return keys.size("num_key_value_heads")


def _tied(keys: _Keys) -> bool:
    """Files that torch tools wrote leave the key out where it is true; other files have to say it."""
    if not keys.has("tie_word_embeddings") and (keys.has("transformers_version") or keys.has("torch_dtype")):
        return True
    return keys.flag("tie_word_embeddings")


def _dtype(keys: _Keys) -> DType:
    key = "dtype" if keys.has("dtype") else "torch_dtype"
    if not keys.has(key):
        return "bfloat16"
    name = keys.text(key).removeprefix("torch.")
    if name not in get_args(DType):
        raise keys.wrong(key, f"is {name!r}; it must be one of {', '.join(get_args(DType))}.")
    return cast("DType", name)


def _quantization(keys: _Keys) -> Quantization | None:
    if not keys.has("quantization_config"):
        return None
    found = read_config(keys.values["quantization_config"])
    if isinstance(found, str):
        raise keys.wrong("quantization_config", found)
    return found


def _moe(keys: _Keys) -> dict[str, Any]:
    end = keys.integer("moe_layer_end_index", -1)
    return {
        "moe_num_experts": keys.size("moe_num_experts", most=_MOST_PARTS),
        "moe_k": keys.size("moe_k"),
        "moe_intermediate_size": keys.size("moe_intermediate_size"),
        "moe_num_shared_experts": keys.size("moe_num_shared_experts", least=0, most=_MOST_PARTS),
        "moe_layer_start_index": keys.integer("moe_layer_start_index"),
        "moe_layer_end_index": keys.size("num_hidden_layers") - 1 if end == -1 else end,
        "moe_layer_interval": keys.size("moe_layer_interval"),
        "moe_norm_min": keys.positive("moe_norm_min", 1e-12),
    }


def _check(config: ModelConfig, keys: _Keys) -> None:
    """The values together make a network."""
    c = config
    if c.num_attention_heads % c.num_key_value_heads:
        raise keys.wrong(
            "num_key_value_heads", f"is {c.num_key_value_heads}, which does not divide {c.num_attention_heads} heads."
        )
    if c.head_dim % 2:
        raise keys.wrong("head_dim", f"is {c.head_dim}; rotary positions turn pairs, so it must be even.")
    if c.bos_token_id is not None and not 0 <= c.bos_token_id < c.vocab_size:
        raise keys.wrong("bos_token_id", f"is {c.bos_token_id}, outside the vocabulary of {c.vocab_size}.")
    if not c.moe_num_experts:
        return
    if c.moe_k > c.moe_num_experts:
        raise keys.wrong("moe_k", f"is {c.moe_k}, more than the {c.moe_num_experts} experts.")
    if c.moe_layer_start_index < 0:
        raise keys.wrong("moe_layer_start_index", f"is {c.moe_layer_start_index}; it must not be negative.")
    if not any(c.is_moe_layer(i) for i in range(c.num_hidden_layers)):
        raise keys.wrong("moe_layer_start_index", "and moe_layer_end_index leave no layer to the experts.")
