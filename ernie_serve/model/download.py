"""A model of the Hugging Face hub in its cache, fetched where it is not there yet.

Knows the hub. Knows nothing of what is in the files. `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE` and `HF_ENDPOINT` mean
what they mean everywhere, because huggingface_hub reads them.
"""

import errno
import shutil
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.errors import CheckpointError
from ernie_serve.model.hub import Progress

_PATTERNS = {
    "text": ["*.json", "*.jinja", "*.model"],
    "all": ["*.json", "*.jinja", "*.model", "*.safetensors"],
}


def from_hub(model: str, revision: str | None, what: Literal["text", "all"], progress: Progress) -> Path:
    """The folder of a hub model, as `hub.resolve` promises it. Raises `CheckpointError`."""
    try:
        folder = _download(model, revision, _PATTERNS[what], progress)
    except CheckpointError:
        raise
    except Exception as error:
        bundled = "" if "/" in model else f" The model that is bundled is called {ERNIE_TINY.name}."
        raise CheckpointError(_explain(error, model, revision) + bundled) from error
    if what == "all" and not any(folder.glob("*.safetensors")):
        where = "cache, which is all there is offline," if constants.HF_HUB_OFFLINE else "hub"
        raise CheckpointError(f"{model} on the {where} has no .safetensors file, and no other weights are read.")
    return folder


def _download(model: str, revision: str | None, patterns: list[str], progress: Progress) -> Path:
    chosen: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    needed = 0
    if not constants.HF_HUB_OFFLINE:
        try:
            files = snapshot_download(model, dry_run=True, tqdm_class=_bar(0, progress, ""), **chosen)
            needed = sum(file.file_size for file in files if file.will_download)
        except DryRunError:
            pass  # the hub cannot be reached, or refuses: what is cached may do, and if not the next call says why
    _check_space(model, needed)
    return Path(snapshot_download(model, tqdm_class=_bar(needed, progress, f"downloading {model}"), **chosen))


def _check_space(model: str, needed: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if needed > free:
        raise CheckpointError(
            f"{model} needs {needed / 1e9:.1f} GB in {cache}, where {free / 1e9:.1f} GB are free. "
            "Free some, or set HF_HOME to a larger disk."
        )


def _bar(needed: int, progress: Progress, what: str) -> type[tqdm]:
    """A bar that draws nothing, and reports which share of the bytes needed has come in."""
    done, told = 0, 0.0

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # One bar counts files, one the bytes on disk, and in some versions one the bytes on the wire.
            self.counts = kwargs.get("unit") == "B" and not str(kwargs.get("name")).endswith(".transfer")
            super().__init__(*args, **kwargs | {"disable": True})  # type: ignore[no-untyped-call]  # tqdm has no types

        def update(self, n: float | None = 1) -> None:
            nonlocal done, told
            if not self.counts or needed == 0:
                return
            done += int(n or 0)
            if (share := min(done / needed, 1.0)) > told:
                told = share
                progress(share, what)

    return Bar


def _explain(error: Exception, model: str, revision: str | None) -> str:
    """What went wrong with a download, and what to do about it."""
    match error:
        case GatedRepoError():
            return (
                f"{model} is gated. Accept its terms at {constants.ENDPOINT}/{model} and set HF_TOKEN to a token of "
                "that account."
            )
        case RevisionNotFoundError():
            return f"{model} has no revision {revision!r} on the hub."
        case RepositoryNotFoundError():
            return (
                f"{model} is neither a local folder nor a model on {constants.ENDPOINT}. Check the name; if the model "
                "is private, set HF_TOKEN to a token that may read it."
            )
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"{model} is no local folder and not wholly in the cache {constants.HF_HUB_CACHE}; "
                "HF_HUB_OFFLINE forbids to download it. Unset that once, or name a folder."
            )
        case LocalEntryNotFoundError(__cause__=HfHubHTTPError() as refusal):
            return _explain(refusal, model, revision)
        case LocalEntryNotFoundError():
            cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
            return (
                f"{model} is no local folder and not wholly in the cache, and {constants.ENDPOINT} cannot be "
                f"reached{cause}. Check the network, or name a folder."
            )
        case HFValidationError():
            return f"{model} is neither a local folder nor a name that a model on the hub can have."
        case HfHubHTTPError() if error.response.status_code in (401, 403):
            return (
                f"{constants.ENDPOINT} refuses {model} ({error.response.status_code}). Check HF_TOKEN and its rights."
            )
        case OSError() if error.errno == errno.ENOSPC:
            return f"The disk of {constants.HF_HUB_CACHE} is full. Free some of it, or set HF_HOME to a larger one."
        case OSError() if error.errno is not None:
            return (
                f"{model} cannot be put into {constants.HF_HUB_CACHE}: {error.strerror}. HF_HOME names another place."
            )
    return f"{model} could not be downloaded: {_first_line(error)}."


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
