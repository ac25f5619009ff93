"""The safetensors files of a checkpoint folder, opened together, and how tensors are divided among them.

Knows the folder: a single file, or an index and its shards. Knows nothing of what the tensors mean.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from ernie_serve.errors import CheckpointError
from ernie_serve.model.safetensors_file import SafetensorsFile, StoredTensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pdparams", "*.gguf")


class OpenShards(Protocol):
    """All tensors of a folder by name."""

    folder: Path
    tensors: dict[str, StoredTensor]

    def __enter__(self) -> "OpenShards": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


Source = Path | OpenShards
"""A checkpoint folder, or tensors that stand for one."""


def opened(source: Source) -> OpenShards:
    """The tensors of a folder, whose files are opened, or of what is given instead."""
    return Shards(source) if isinstance(source, Path) else source


class Shards:
    """All tensors of a folder by name, in file order. A context manager: leaving it closes the files.

    Raises `CheckpointError` when there is nothing to read, a file is absent or broken, or the index and the
    files disagree. Only headers are read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        with ExitStack() as files:
            if (folder / SINGLE).exists():
                self.tensors |= self._open(SINGLE, files)
            else:
                self._open_index(files)
            self._files = files.pop_all()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.close()

    def _open(self, name: str, files: ExitStack) -> dict[str, StoredTensor]:
        file = SafetensorsFile(self.folder / name)
        files.callback(file.close)
        return file.tensors

    def _open_index(self, files: ExitStack) -> None:
        """Open every shard that the index names, in the order of their names."""
        where = self._read_index()
        names = sorted(set(where.values()))
        if absent := [name for name in names if not (self.folder / name).is_file()]:
            raise CheckpointError(
                f"{self.folder / INDEX} names {len(absent)} of {len(names)} files that are not there: {some(absent)}. "
                "Complete the download."
            )
        for name in names:
            stored = self._open(name, files)
            listed = {tensor for tensor, file in where.items() if file == name}
            if lost := sorted(listed - stored.keys()):
                raise CheckpointError(
                    f"{self.folder / name} lacks {len(lost)} tensors that the index lists there: {some(lost)}."
                )
            if twice := sorted(stored.keys() & self.tensors.keys()):
                raise CheckpointError(f"{self.folder / name} repeats tensors of another shard: {some(twice)}.")
            self.tensors |= stored

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.exists():
            raise CheckpointError(self._nothing_to_read())
        try:
            index: Any = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
            raise CheckpointError(f"{path} has no `weight_map` from tensor names to file names.")
        for file in where.values():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{path} names {file!r}; a shard is a .safetensors file in the same folder.")
        return where

    def _nothing_to_read(self) -> str:
        if not self.folder.is_dir():
            return f"{self.folder} is not a folder."
        others = sorted(path.name for pattern in _OTHER_FORMATS for path in self.folder.glob(pattern))
        message = f"{self.folder} has neither {SINGLE} nor {INDEX}."
        if others:
            message += f" It has {some(others)}, which are not read: only safetensors is, convert the checkpoint to it."
        return message


def cut(sizes: Mapping[str, int], most: int) -> dict[str, list[str]]:
    """The files of a folder and the tensors in each, in order: cut before one would grow beyond `most` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in sizes.items():
        if size and size + num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, list[str]], num_bytes: int) -> None:
    """Say which file has which tensor, where there are several."""
    if len(files) > 1:
        where = {tensor: name for name, tensors in files.items() for tensor in tensors}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def some(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
