"""The command line: a few lines a verb.

Knows the verbs and how flags become settings. Knows nothing of what a verb does. The flags of the verbs that
take settings are made from the fields of `Settings`, so a setting is named and explained in one place.
"""

import errno
import importlib.metadata
import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from ernie_serve import cli_billing, config
from ernie_serve.config import Settings
from ernie_serve.errors import SettingsError, StartupError
from ernie_serve.leaving import leave_after
from ernie_serve.settings_command import SettingsCommand

Origins = dict[str, str]

_INT64 = 2**63 - 1
"""What a message to the engine can hold."""

_NUM_PROMPTS = (
    "Requests a load; 0: twice the streams. As many as --max-concurrency are one wave, and only one fills decode tok/s."
)

_SOURCES = (
    "Every flag has an environment name (--max-model-len is ERNIE_SERVE_MAX_MODEL_LEN) and a line in a TOML file "
    "(max-model-len = 8192). A flag beats the environment, which beats the file."
)

app = typer.Typer(
    name="ernie-serve",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},  # as vLLM takes flags
)
config_app = typer.Typer(help="Look at the settings.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(cli_billing.keys_app, name="keys")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("ernie-serve"))
        raise typer.Exit


@app.callback()
def about(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Serve ERNIE 4.5 text models over an OpenAI-compatible API."""


def program() -> NoReturn:
    """The command line as a process of its own."""
    leave_after(main)


def main() -> None:
    """Run the command line; what cannot start is said in one line, with exit code 1."""
    try:
        app()
    except StartupError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]ernie-serve:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        Console(stderr=True).print(f"[bold red]ernie-serve:[/] Nothing more can be written: {error.strerror}.")
        sys.exit(1)


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb a flag for every setting; the verb receives `settings` and `origins` instead."""
    own = inspect.signature(command).parameters
    parameters = [_parameter(name) for name in Settings.model_fields]
    help_text = "TOML file with settings; a flag or an environment name beats it."
    parameters.append(
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, typer.Option("--config", help=help_text, rich_help_panel="Model")],
        )
    )
    kept = [p for name, p in own.items() if name not in ("settings", "origins")]
    parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]

    def run(**given: Any) -> None:
        extra = {name: given.pop(name) for name in own if name in given}
        file = given.pop("config")
        flags = {name: value for name, value in given.items() if value is not None and value != []}
        settings, origins = config.load(flags, config=file)
        command(settings=settings, origins=origins, **extra)

    run.__name__ = command.__name__
    run.__doc__ = f"{command.__doc__}\n\n{_SOURCES}"
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(name: str) -> inspect.Parameter:
    """The flag of one setting. Its value stays text: `Settings` is what validates, whatever the source."""
    field = Settings.model_fields[name]
    kind: Any = bool if field.annotation is bool else list[str] if get_origin(field.annotation) is tuple else str
    if name == "model":
        option = typer.Argument(help=field.description, show_default=False)
    else:
        flag = config.flag_name(name)
        default = field.default if isinstance(field.default, str | int | float) and field.default != "" else None
        words = _words(field.annotation)
        told = [f"one of {', '.join(words)}"] if words else []  # no metavar: in a narrow terminal it would be torn
        told += [f"default: {default}"] if default is not None else []
        shown = f" [{'; '.join(told)}]" if told else ""
        noun = "N" if field.annotation in (int, int | None) else "WORD" if words else "TEXT"
        opposite = f"--no-{flag[2:]}"
        if kind is bool:
            shown = f" [default: {'on' if field.default else 'off'}; {opposite} turns it off]"
        option = typer.Option(
            f"{flag}/{opposite}" if kind is bool else flag,
            help=f"{field.description}{shown}".replace("[", r"\["),
            rich_help_panel=config.group_of(name),
            show_default=False,
            metavar=None if kind is bool else noun,
        )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _words(annotation: Any) -> tuple[str, ...]:
    """The only words that a setting may be; none where it may be anything else."""
    literal = next((each for each in (annotation, *get_args(annotation)) if get_origin(each) is Literal), None)
    return get_args(literal)


def _flag(name: str, description: str, **limits: Any) -> Any:
    return typer.Option(name, help=description, **limits)


@app.command(cls=SettingsCommand)
@takes_settings
def serve(settings: Settings, origins: Origins) -> None:
    """Serve a checkpoint over HTTP."""
    from ernie_serve import launch

    launch.serve(settings)


@app.command(cls=SettingsCommand)
@takes_settings
def generate(
    settings: Settings,
    origins: Origins,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue, or with --chat the user's message.")],
    chat: Annotated[bool, typer.Option("--chat", help="Render the prompt with the chat template.")] = False,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens to make.", min=1, max=_INT64)] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.", min=0, max=2)] = 0.0,
) -> None:
    """Continue one prompt in this process and print the text as it comes."""
    if not (prompt or chat):
        raise SettingsError("--prompt is empty, and there is nothing to continue. Give it some text.")
    from ernie_serve import launch

    launch.generate(settings, prompt, chat=chat, max_tokens=max_tokens, temperature=temperature)


@app.command(cls=SettingsCommand)
@takes_settings
def bench(
    settings: Settings,
    origins: Origins,
    mode: Annotated[str, _flag("--mode", "offline (the engine alone), http, or both in turn.")] = "both",
    base_url: Annotated[str | None, _flag("--base-url", "Measure this server; MODEL is its model's name.")] = None,
    max_concurrency: Annotated[str, _flag("--max-concurrency", "Streams at once; several as 1,8,16.")] = "1,16",
    num_prompts: Annotated[int, _flag("--num-prompts", _NUM_PROMPTS, min=0)] = 0,
    input_len: Annotated[int, _flag("--input-len", "Tokens of each prompt.", min=1)] = 128,
    output_len: Annotated[int, _flag("--output-len", "Tokens of each answer.", min=1, max=_INT64)] = 64,
    request_rate: Annotated[float | None, _flag("--request-rate", "Arrivals a second. None: closed load.")] = None,
    vocab_size: Annotated[int, _flag("--vocab-size", "With --base-url: ids of prompts end here.", min=4)] = 1000,
    output_json: Annotated[Path | None, _flag("--output-json", "Write the results to this file too.")] = None,
) -> None:
    """Measure time to first token, inter-token latency and throughput."""
    from ernie_serve import bench as benchmark

    try:
        counts = [int(count) for count in max_concurrency.split(",")]
        if mode not in ("offline", "http", "both") or min(counts) < 1:
            raise ValueError
    except ValueError:
        raise SettingsError("--mode is offline, http or both; --max-concurrency counts like 1,16.") from None
    if request_rate is not None and not 0 < request_rate < math.inf:
        raise SettingsError(f"--request-rate is {request_rate}; give a number above 0, or none for a closed load.")
    if output_json:
        benchmark.require_writable(output_json)
    loads = [
        benchmark.Load(
            num_prompts=num_prompts or 2 * count,
            input_len=input_len,
            output_len=output_len,
            max_concurrency=count,
            request_rate=request_rate,
        )
        for count in counts
    ]
    results = benchmark.run(settings, loads, mode, base_url, vocab_size)
    benchmark.table(results, Console().print)
    if output_json:
        output_json.write_text(benchmark.as_json(results), encoding="utf-8")


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a checkpoint. Default: ERNIE-4.5-21B-A3B.")] = "",
    revision: Annotated[str | None, _flag("--revision", "Branch, tag or commit of a hub checkpoint.")] = None,
    threads: Annotated[int | None, _flag("--threads", "CPU threads. Default: as `serve` has them.", min=1)] = None,
    device: Annotated[str, _flag("--device", "cpu, cuda or cuda:N. auto: a GPU where there is one.")] = "auto",
) -> None:
    """Say whether this machine can serve a checkpoint, how fast to expect it, and what to change."""
    from ernie_serve import doctor

    doctor.examine(model, revision=revision, threads=threads, device=config.device(device))


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder or hub name of the original checkpoint.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    quantization: Annotated[str, _flag("--quantization", "int4, int8 or mixed; for a GPU also fp8.")] = "int4",
    device: Annotated[
        str,
        _flag("--device", "What the folder is for, cpu or cuda: they read other layouts. No GPU is needed to write."),
    ] = "cpu",
    report: Annotated[bool, _flag("--report", "Print how far weights and logits are from the original's.")] = False,
    report_tokens: Annotated[int, _flag("--report-tokens", "Tokens that logits are compared over.", min=2)] = 256,
    revision: Annotated[str | None, _flag("--revision", "Branch, tag or commit of a hub checkpoint.")] = None,
    threads: Annotated[int | None, _flag("--threads", "CPU threads. Default: one for each core.", min=1)] = None,
) -> None:
    """Write a checkpoint in 4 or 8 bits, which `serve OUT` then maps on a CPU, or reads into a GPU."""
    from ernie_serve import quantizing

    recipe, kind = config.recipe(quantization), config.device_kind(device)
    tokens = report_tokens if report else 0
    quantizing.quantize(source, folder, recipe, kind, revision=revision, threads=threads, report_tokens=tokens)


app.command()(cli_billing.usage)
app.command()(cli_billing.bookings)
app.command()(cli_billing.prices)
app.command()(cli_billing.audit)
app.command(context_settings={"ignore_unknown_options": True})(cli_billing.topup)  # so that -5 is an amount


@config_app.command("show", cls=SettingsCommand)
@takes_settings
def show(settings: Settings, origins: Origins) -> None:
    """Print every setting, its value and where the value came from."""
    rows = [("setting", "value", "origin")]
    for name, origin in origins.items():
        value = getattr(settings, name)
        if name == "model" and not value:
            value = "ernie-tiny (bundled)"
        rows.append((name.replace("_", "-"), "(set)" if name in config.SECRET and value else str(value), origin))
    _print_rows(rows)


def _print_rows(rows: list[tuple[str, str, str]]) -> None:
    """Print rows below their heads, no word of them cut off: folded on a terminal, else each in a line of its own."""
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        heads = [Column(head, overflow="fold", no_wrap=head == "setting") for head in rows[0]]
        table = Table(*heads, box=None, header_style="bold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        return
    first, second, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    for setting, value, origin in rows:
        print(f"{setting:{first}}  {value:{second}}  {origin}")
