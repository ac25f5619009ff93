"""From what the user calls a model to a folder on this machine.

Knows local folders and the bundled one. Knows nothing of what is in the files, and no torch: the API process finds
its tokenizer through this. Models of the hub are `download`'s.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.config import path_of
from ernie_serve.errors import CheckpointError

Progress = Callable[[float, str], None]


def resolve(
    model: str,
    revision: str | None = None,
    what: Literal["text", "all"] = "all",
    progress: Progress | None = None,
) -> Path:
    """The folder of a model: a local one as it is, otherwise one of the hub's cache, downloaded where needed.

    An empty name and `ernie-tiny` mean the bundled one. "text" leaves out the weights. Only data is ever downloaded:
    no code, no pickled weights, nothing in subfolders. `progress` gets the share of the download and what is being
    done. The folder of a hub model is named for its commit.

    Raises `StartupError` that says why the model is not to be had, and what to do.
    """
    if model in ("", ERNIE_TINY.name):
        model = str(ERNIE_TINY)
    local = path_of("MODEL", model)
    try:
        is_folder = local.is_dir()
    except OSError as error:  # such as a name longer than any may be
        raise CheckpointError(f"{model[:80]} cannot be looked for: {error.strerror}.") from None
    if is_folder:
        if revision is not None:
            raise CheckpointError(f"{model} is a local folder, which has no revision {revision!r}; leave it out.")
        return local
    if local.exists():
        raise CheckpointError(f"{model} is a file; name the folder that holds config.json and the weights.")
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model:
        raise CheckpointError(f"{model} is not a folder.")
    from ernie_serve.model import download  # what it needs is slow to import

    return download.from_hub(model, revision, what, progress or (lambda *_: None))
