"""Saves what training needs to go on, and exports the model in the published layout.

Knows files: safetensors and JSON, each replaced in one stroke. Knows nothing of what the tensors mean.
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

GENERATION = {"bos_token_id": 1, "pad_token_id": 0, "do_sample": True, "temperature": 0.2, "top_p": 0.95}


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and facts to a new folder, then let it take the old one's name."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, folder / "state.new", metadata={"facts": json.dumps(facts)}
    )
    os.replace(folder / "state.new", folder / "state.safetensors")
    replace_text(folder / "state.json", json.dumps(facts, indent=1) + "\n")


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The saved tensors and facts, or None where there is nothing to resume."""
    if not (folder / "state.safetensors").exists():
        return None
    facts: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return load_file(folder / "state.safetensors"), facts


def export(folder: Path, weights: dict[str, Tensor], config: dict[str, Any], stop_ids: list[int]) -> None:
    """Write model.safetensors, config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    replace_text(
        folder / "generation_config.json", json.dumps({**GENERATION, "eos_token_id": stop_ids}, indent=2) + "\n"
    )
    save_file(weights, folder / "model.new", metadata={"format": "pt"})
    (folder / "model.new").chmod(0o644)
    os.replace(folder / "model.new", folder / "model.safetensors")


def replace_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)
