"""Which matrices of the network there are, and what a recipe makes of each kind, on a CPU and on a GPU.

Knows parameter names, bits and names of formats. Knows no torch and no layout: the API process reads a config that
names a recipe.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ernie_serve.errors import SettingsError

Recipe = Literal["int4", "int8", "mixed", "fp8"]
MatrixClass = Literal["attention", "dense", "shared", "experts", "head"]
DeviceKind = Literal["cpu", "cuda"]
Bits = Literal[4, 8]
Format = Literal["int8", "fp8", "int4"]

CLASSES: tuple[MatrixClass, ...] = get_args(MatrixClass)

RECIPES: dict[Recipe, dict[MatrixClass, Bits]] = {
    "int4": dict.fromkeys(CLASSES, 4),
    "int8": dict.fromkeys(CLASSES, 8),
    # The dense MLP is 0.4 % of the 21B's weights, and its error goes through every layer after it.
    "mixed": {"attention": 8, "dense": 8, "shared": 8, "experts": 4, "head": 8},
}
"""Those of a CPU."""

GPU_RECIPES: dict[Recipe, dict[MatrixClass, Format]] = {
    "int4": {"experts": "int4", "shared": "int4", "attention": "int8", "dense": "int8"},
    "int8": {"experts": "int8", "shared": "int8", "attention": "int8", "dense": "int8"},
    "fp8": {"experts": "fp8", "shared": "fp8", "attention": "fp8", "dense": "fp8"},
    "mixed": {"experts": "int4", "shared": "int8", "attention": "int8", "dense": "int8"},
}
"""Those of a GPU, where 4 bits are for experts alone. The head keeps the checkpoint's dtype, as in most servers."""

GPU_CLASSES: tuple[MatrixClass, ...] = ("attention", "dense", "shared", "experts")

METHOD = "ernie_serve"
_VERSIONS: dict[DeviceKind, int] = {"cpu": 1, "cuda": 2}
_GROUPS: dict[DeviceKind, int] = {"cpu": 32, "cuda": 64}


@dataclass(frozen=True, slots=True)
class Quantization:
    """How matrices are kept, and for which kind of device; what `quantization_config` says of a folder of ours.

    A class of matrices that has no bits stays in the checkpoint's dtype.
    """

    recipe: Recipe
    bits: Mapping[MatrixClass, Bits | Format]
    device: DeviceKind = "cpu"

    @classmethod
    def of(cls, recipe: Recipe, device: DeviceKind = "cpu") -> "Quantization":
        """A recipe as this version has it. Raises `SettingsError` for one that the device does not read."""
        if device == "cuda":
            return cls(recipe, GPU_RECIPES[recipe], device)
        if recipe not in RECIPES:
            raise SettingsError(
                f"--quantization {recipe}: on a CPU it is {', '.join(RECIPES)}. Use one of these, or --device cuda."
            )
        return cls(recipe, RECIPES[recipe])

    def as_config(self) -> dict[str, object]:
        """The entry of `config.json`."""
        return {
            "quant_method": METHOD,
            "format_version": _VERSIONS[self.device],
            **({} if self.device == "cpu" else {"device": self.device}),
            "recipe": self.recipe,
            "group_size": _GROUPS[self.device],
            ("bits" if self.device == "cpu" else "formats"): dict(self.bits),
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
    version = entry.get("format_version")
    device = next((each for each, known in _VERSIONS.items() if known == version), None)
    if device is None or entry.get("device", "cpu") != device:
        where = f" for {entry['device']!r}" if "device" in entry else ""
        return (
            f"has format_version {version!r}{where}; this version reads 1, for a CPU, and 2 for 'cuda'. "
            "Quantize the original checkpoint again with this version."
        )
    group = entry.get("group_size")
    known: Collection[Recipe] = RECIPES if device == "cpu" else GPU_RECIPES
    bits = entry.get("bits" if device == "cpu" else "formats")
    word = entry.get("recipe")
    recipe = next((each for each in known if each == word), None)
    if recipe is None or not isinstance(bits, dict) or group != _GROUPS[device]:
        return f"has the recipe {word!r} in groups of {group!r}; {', '.join(known)} in {_GROUPS[device]} are known."
    if device == "cpu":
        if set(bits) != set(CLASSES) or any(type(each) is not int or each not in (4, 8) for each in bits.values()):
            return f"has the bits {bits!r}; each of {', '.join(CLASSES)} has 4 or 8."
    elif not bits or not all(kind in GPU_CLASSES and _reads(kind, form) for kind, form in bits.items()):
        return (
            f"has the formats {bits!r}; {', '.join(GPU_CLASSES)} have one of {', '.join(get_args(Format))}, "
            "int4 only experts and shared."
        )
    return Quantization(recipe, bits, device)


def _reads(kind: MatrixClass, form: object) -> bool:
    """Whether a kernel of a GPU reads matrices of this kind in this format: int4 only where experts are."""
    return form in get_args(Format) and (form != "int4" or kind in ("experts", "shared"))
