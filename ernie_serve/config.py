"""Settings from flags, environment and a TOML file, validated once and then frozen.

Knows every setting's name, type, default, limits and help. Knows nothing of what a setting does. A flag
beats an environment name, which beats the file, which beats the default; `origins` tells which one won.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ernie_serve.errors import SettingsError

ENV_PREFIX = "ERNIE_SERVE_"
_NO_SETTINGS = frozenset({"ERNIE_SERVE_PORTABLE"})
"""Names with this prefix that are read elsewhere: how the CPU's operators are compiled."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _byte_count(value: object) -> object:
    """Read `4GiB`, `512M` or a plain number as a count of bytes; leave anything else to the validator."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*(k|m|g|ki|mi|gi|)b?\s*", value, re.IGNORECASE)
    return int(float(match[1]) * _UNITS[match[2].lower()]) if match else value


def _names(value: object) -> object:
    """Read `a,b` as two names, and `["a", "b"]`, which is how some servers spell lists, as well."""
    if isinstance(value, str):
        names = _split(value)
        names = [] if names == [""] else names
    elif isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
        names = [name for each in value for name in _split(each)]
    else:
        return value
    if names and not any(names):
        raise PydanticCustomError("empty", "it is empty; give one, or several with commas between, or leave it out")
    return tuple(name for name in names if name)


def _split(text: str) -> list[str]:
    bare = text.strip()
    bare = bare[1:-1] if bare.startswith("[") and bare.endswith("]") else bare
    return [_unquoted(name.strip()) for name in bare.split(",")]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    if any(re.search(r"\s", key) for key in keys):
        raise PydanticCustomError("key", "a key has white space in it; between keys there are commas")
    return keys


_ORIGIN = re.compile(
    r"(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:\d{1,5})?|null|\*"
)
"""How browsers spell an origin, and `*`. They are compared as text: any other spelling would let no page in."""


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            told = "`{origin}` is not an origin; give https://host, with :port unless it is the usual one, and no more"
            raise PydanticCustomError("origin", told, {"origin": origin})
    return origins


def _spelled(value: object) -> object:
    """Read a whole number as its digits, as in `input-price = 1`: what follows reads decimals as text, exactly."""
    return str(value) if type(value) is int else value


def _model(model: str) -> str:
    if model.startswith("sk-") and "/" not in model:
        told = "it begins like a key; several keys are one value, with commas, and a folder of that name is ./sk-…"
        raise PydanticCustomError(_LIKE_A_KEY, told)
    return model


_LIKE_A_KEY = "like_a_key"

Model = Annotated[str, AfterValidator(_model)]
Bytes = Annotated[int, BeforeValidator(_byte_count)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Keys = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_keys)]
Origins = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_origins)]
Decimal = Annotated[str, BeforeValidator(_spelled)]


def _setting(group: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


USUAL_NUM_SEQS = {"cpu": 64, "cuda": 256}
"""Requests that run at once where nobody says how many, by the kind of device."""


class Settings(BaseModel):
    """Every setting of the server. Field names are the flags' names with underscores."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Model = _setting("Model", "", "Folder or hub name of the checkpoint. Empty: the bundled one.")
    revision: str | None = _setting("Model", None, "Branch, tag or commit of a hub checkpoint.")
    served_model_name: Names = _setting(
        "Model", (), "Names that requests may use, the first is reported. Default: MODEL."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _setting(
        "Model", "auto", "Arithmetic of the model. auto: what the checkpoint says."
    )
    load_format: Literal["auto", "dummy"] = _setting(
        "Model",
        "auto",
        "auto: safetensors, and no other files. dummy: numbers by chance instead of weights, of which none are read; "
        "for measuring.",
    )
    quantization: Literal["int4", "int8", "mixed", "fp8"] | None = _setting(
        "Model",
        None,
        "Keep weights in 4 or 8 bits, quantized as they are read: on a CPU all matrices, on a GPU all but the "
        "head, 4 only for experts. mixed: 4 for routed experts, 8 for others. fp8: on a GPU only.",
    )
    device: str = _setting(
        "Model", "auto", "cpu, cuda or cuda:N. auto: a GPU where there is one.", pattern=r"^(auto|cpu|cuda(:\d+)?)$"
    )
    max_model_len: int | None = _setting(
        "Model",
        None,
        "Longest prompt plus answer, in tokens. Default: what the checkpoint allows and memory holds.",
        ge=1,
    )

    max_num_seqs: int | None = _setting(
        "Engine", None, "Requests that run at once. Default: 64, on a GPU 256.", ge=1, le=4096
    )
    max_num_batched_tokens: int = _setting("Engine", 2048, "Tokens computed in one step.", ge=1, le=1_048_576)
    max_step_seconds: float | None = _setting(
        "Engine",
        None,
        "While answers stream, a step takes about so long: pieces of long prompts are sized to it. 0: no matter how "
        "long. Default: 0.5 on a CPU, 0 on a GPU.",
        ge=0,
        le=3600,
    )
    block_size: int | None = _setting(
        "Engine", None, "Tokens in one block of the KV cache. Default: 16, on a GPU 64.", ge=1, le=1024
    )
    kv_cache_memory_bytes: Bytes | None = _setting(
        "Engine",
        None,
        "Size of the KV cache, such as 4GiB. Default: what the device has left, on a CPU at most 4GiB.",
        ge=1,
        le=2**60,
    )
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = _setting(
        "Engine",
        "auto",
        "Numbers of the KV cache. auto: the checkpoint's dtype; int8: about half of bfloat16's memory; fp8: half, on a "
        "GPU only.",
    )
    gpu_memory_utilization: float = _setting("Engine", 0.92, "Share of the GPU's memory to use.", gt=0, le=1)
    enable_prefix_caching: bool = _setting("Engine", True, "Reuse the KV cache of prompts that begin alike.")
    scheduling_policy: Literal["priority", "fcfs"] | None = _setting(
        "Engine",
        None,
        "Who is computed first. priority: requests whose `priority` is lower, then those that came first. fcfs: those "
        "that came first; a `priority` is refused. Default: priority, with billing fcfs.",
    )
    threads: int | None = _setting(
        "Engine",
        None,
        "CPU threads of the engine. Default: one for each core it may use; one below 64 MiB of weights.",
        ge=1,
        le=1024,
    )

    host: str = _setting("API", "127.0.0.1", "Address to listen on.")
    port: int = _setting("API", 8000, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    address_file: str | None = _setting(
        "API", None, "Write the URL that reaches the server from this machine to this file, for what checks its health."
    )
    api_key: Keys = _setting("API", (), "Keys that requests must carry; none: no key is asked for.")
    allow_unauthenticated: bool = _setting(
        "API",
        False,
        "Ask for no keys, though other machines may reach this one, and web pages whose name is pointed at it.",
    )
    allowed_origins: Origins = _setting(
        "API", (), "Web pages that may call from a browser, such as https://example.com, or *; none: no page may."
    )
    max_output_tokens: int | None = _setting("API", None, "Most tokens that one answer may have.", ge=1)
    responses_file: str | None = _setting(
        "API", None, "File that keeps /v1/responses over a restart. Default: memory, which ends with the server."
    )
    shutdown_timeout: int = _setting(
        "API", 30, "Seconds that running requests may take to end after SIGTERM or Ctrl-C.", ge=0, le=86_400
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting("API", "info", "What is logged.")

    billing: bool = _setting("Billing", False, "Ask for keys of the billing store, and charge what is used to them.")
    database_url: str | None = _setting(
        "Billing",
        None,
        "Billing store: sqlite:////absolute/path (with three slashes it begins at the working directory), or "
        "postgresql://… for several servers. Default: a file of the user's data.",
    )
    input_price: Decimal = _setting("Billing", "0.07", "US dollars for a million tokens of input.")
    cached_input_price: Decimal | None = _setting(
        "Billing", None, "US dollars for a million tokens of input that the prefix cache had. Default: as other input."
    )
    output_price: Decimal = _setting("Billing", "0.28", "US dollars for a million tokens of output.")


SECRET = frozenset({"api_key", "database_url"})
"""Settings whose values are shown to nobody."""


def load(
    flags: Mapping[str, Any], *, config: Path | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[Settings, dict[str, str]]:
    """Merge all sources into settings, and say for each field where its value came from.

    `flags` holds only what was given on the command line. Raises `SettingsError`, naming the source.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.model_fields, "default")

    def take(name: str, value: Any, origin: str) -> None:
        values[name], origins[name] = value, origin

    for name, value in (_read_toml(config) if config else {}).items():
        take(name, value, f"file {config}")
    ours = require_known(environ)
    for name in Settings.model_fields:
        if (text := ours.get(env_name(name))) is not None:
            take(name, text, f"environment {env_name(name)}")
    for name, value in flags.items():
        take(name, value, f"flag {flag_name(name)}")
    try:
        return Settings.model_validate(values), origins
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0])
        value = "…" if name in SECRET or problem["type"] == _LIKE_A_KEY else repr(problem["input"])
        meaning = Settings.model_fields[name].description
        raise SettingsError(f"{name} = {value} (from {origins[name]}): {problem['msg']}. {meaning}") from None


def recipe(word: str) -> Literal["int4", "int8", "mixed", "fp8"]:
    """A word for how matrices are kept. Raises `SettingsError` for another."""
    try:
        wanted = Settings(quantization=word).quantization  # type: ignore[arg-type]  # the validator decides
    except ValidationError:
        wanted = None
    if wanted is None:
        raise SettingsError(f"--quantization {word}: it is int4, int8, mixed or fp8.")
    return wanted


def device_kind(word: str) -> Literal["cpu", "cuda"]:
    """A word for the kind of device that weights are written for. Raises `SettingsError` for another."""
    if word == "cpu":
        return "cpu"
    if word == "cuda":
        return "cuda"
    raise SettingsError(f"--device {word}: weights are written for cpu or for cuda.")


def device(word: str) -> str:
    """A word for a device. Raises `SettingsError` for another."""
    try:
        return Settings(device=word).device
    except ValidationError:
        raise SettingsError(f"--device {word}: it is auto, cpu, cuda or cuda:N.") from None


def path_of(setting: str, text: str) -> Path:
    """The path that a setting names, in which `~` is a home. Raises `SettingsError` where it is nobody's."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        home = text.partition("/")[0]
        raise SettingsError(
            f"{setting} {text}: {home} is nobody's home here. Give the path from the root on."
        ) from None


def flag_name(name: str) -> str:
    """The command-line spelling of a field."""
    return "MODEL" if name == "model" else "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    """The environment spelling of a field."""
    return ENV_PREFIX + name.upper()


def group_of(name: str) -> str:
    """The heading under which `--help` shows a field."""
    extra = Settings.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["group"])


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=str)
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "" if path.suffix == ".toml" else " Only TOML is read, with lines such as max-model-len = 8192"
        raise SettingsError(f"The settings file {path} is not valid TOML: {error}.{hint}") from None
    settings = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in Settings.model_fields:
            if isinstance(value, dict):
                raise SettingsError(
                    f"The settings file {path} has a table [{key}]: settings stand at the top, in no table."
                )
            spelled = str if "_" in key else _with_dashes
            raise SettingsError(f"The settings file {path} has an unknown key {key!r}{_suggestion(name, spelled)}")
        settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def _with_dashes(name: str) -> str:
    return name.replace("_", "-")


def require_known(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The settings of an environment, by their names in it.

    Raises `SettingsError` for a name with our prefix that is no setting's: it would do nothing, and not say so.
    """
    theirs = _of_services(environ)
    known = {env_name(name) for name in Settings.model_fields}
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known | _NO_SETTINGS | theirs:
            nearest = _suggestion(name.removeprefix(ENV_PREFIX).lower(), env_name)
            raise SettingsError(f"The environment has an unknown name {name!r}{nearest}")
    return {name: environ[name] for name in known - theirs if name in environ}


def _of_services(environ: Mapping[str, str]) -> set[str]:
    """The names with our prefix that Kubernetes gives every pod for a service, known by the one that tells its host.

    A service that is called `ernie-serve` has a URL under `ERNIE_SERVE_PORT`; a number there is the setting.
    """
    ours = [name for name in environ if name.startswith(ENV_PREFIX)]
    services = [name.removesuffix("_SERVICE_HOST") for name in ours if name.endswith("_SERVICE_HOST")]
    found = {
        name
        for service in services
        for name in ours
        if name.startswith(service) and _OF_A_SERVICE.fullmatch(name, len(service))
    }
    return {name for name in found if name != env_name("port") or "://" in environ[name]}


_OF_A_SERVICE = re.compile(
    r"_(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)
"""What follows the name of a service, in capitals and with `_` for `-`."""


def _suggestion(name: str, spelled: Callable[[str], str] = str) -> str:
    nearest = difflib.get_close_matches(name, Settings.model_fields, n=1)
    return f"; did you mean {spelled(nearest[0])!r}?" if nearest else "."
