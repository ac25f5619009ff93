"""Which matrices of the network there are, and how many bits a recipe gives to each kind.

Knows parameter names, numbers of weights and bits. Knows no torch and no layout: the API process reads a config that
names a recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Recipe = Literal["int4", "int8", "mixed"]
MatrixClass = Literal["attention", "dense", "shared", "experts", "head"]
Bits = Literal[4, 8]

CLASSES: tuple[MatrixClass, ...] = get_args(MatrixClass)

RECIPES: dict[Recipe, dict[MatrixClass, Bits]] = {
    "int4": dict.fromkeys(CLASSES, 4),
    "int8": dict.fromkeys(CLASSES, 8),
    # The dense MLP is 0.4 % of the 21B's weights, and its error goes through every layer after it.
    "mixed": {"attention": 8, "dense": 8, "shared": 8, "experts": 4, "head": 8},
}

METHOD = "ernie_serve"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Quantization:
    """What `quantization_config` says of a checkpoint that `ernie-serve quantize` wrote."""

    recipe: Recipe
    bits: Mapping[MatrixClass, Bits]

    @classmethod
    def of(cls, recipe: Recipe) -> "Quantization":
        """A recipe as this version has it."""
        return cls(recipe, RECIPES[recipe])

    def as_config(self) -> dict[str, object]:
        """The entry of `config.json`."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe,
            "group_size": 32,
            "bits": dict(self.bits),
        }


def class_of(parameter: str) -> MatrixClass | None:
    """The kind of a matrix, by the parameter's name; None for norms, routers and their bias, which stay as they are."""
    if parameter in ("embed_tokens.weight", "lm_head.weight"):
        return "head"
    if ".self_attn." in parameter:
        return "attention"
    if ".mlp.experts." in parameter:
        return "experts"
    if ".mlp.shared." in parameter:
        return "shared"
    return "dense" if "_proj." in parameter else None


def read_config(entry: object) -> Quantization | str:
    """Understand a `quantization_config`; text is what is wrong with it."""
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        method = entry.get("quant_method") if isinstance(entry, dict) else entry
        return f'is of the method {method!r}; only what `ernie-serve quantize` writes ("{METHOD}") is served.'
    if (version := entry.get("format_version")) != FORMAT_VERSION:
        return (
            f"has format_version {version!r}; this version reads {FORMAT_VERSION}. "
            "Quantize the original checkpoint again with this version."
        )
    recipe, bits = entry.get("recipe"), entry.get("bits")
    if recipe not in RECIPES or not isinstance(bits, dict) or entry.get("group_size") != 32:
        return (
            f"has the recipe {recipe!r} in groups of {entry.get('group_size')!r}; {', '.join(RECIPES)} in 32 are known."
        )
    if set(bits) != set(CLASSES) or any(type(each) is not int or each not in (4, 8) for each in bits.values()):
        return f"has the bits {bits!r}; each of {', '.join(CLASSES)} has 4 or 8."
    return Quantization(recipe, bits)
