"""What a server refuses to start with, and how it opens what it charges to."""

import asyncio
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ernie_serve import launch
from ernie_serve.billing.free import FreeMeter
from ernie_serve.config import Settings, load
from ernie_serve.errors import CheckpointError, SettingsError, StartupError
from ernie_serve.model import hub

CONFIGS = Path(__file__).parents[1] / "configs"


def test_a_prompt_that_does_not_fit_is_told_instead_of_an_empty_line(capfd: pytest.CaptureFixture[str]) -> None:
    small = Settings(max_model_len=2, threads=1, kv_cache_memory_bytes=1 << 20)
    with pytest.raises(StartupError, match="max_model_len is 2"):
        launch.generate(small, "Hello, how are you?", chat=False, max_tokens=5, temperature=0.0)
    assert capfd.readouterr().out == ""


def test_an_answer_is_told_without_the_newlines_around_it(capfd: pytest.CaptureFixture[str]) -> None:
    small = Settings(threads=1, kv_cache_memory_bytes=1 << 20)
    launch.generate(small, "Hello", chat=True, max_tokens=64, temperature=0.0)
    told = capfd.readouterr().out
    assert told.strip()
    assert told == told.strip("\n") + "\n"


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (["\n", "a\n", "", "\nb", "\n", ""], ["", "a", "", "\n\nb", "", ""]),
        (["\n\n", ""], ["", ""]),
        (["a\n", "\ufffd"], ["a", "\n\ufffd"]),
    ],
)
def test_newlines_between_pieces_are_told_with_what_is_behind_them(pieces: list[str], told: list[str]) -> None:
    unframed = launch._Unframed()
    assert [unframed.push(piece) for piece in pieces] == told


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "on, 0.07 USD in and 0.28 USD out a million tokens; SQLite"),
        ({"cached_input_price": "0.070"}, "on, 0.07 USD in and 0.28 USD out a million tokens; SQLite"),
        ({"cached_input_price": "0.01"}, "on, 0.07 USD in (0.01 where the prefix cache had it) and 0.28 USD out a "),
        ({"cached_input_price": "0"}, "on, 0.07 USD in (0 where the prefix cache had it) and 0.28 USD out a million"),
    ],
)
def test_the_banner_tells_the_prices_that_differ(given: Any, told: str) -> None:
    shown = launch.billing_told(Settings(billing=True, database_url="sqlite:////tmp/none.db", **given))
    assert shown is not None
    assert shown.startswith(told)


@pytest.mark.parametrize(
    ("device", "given", "told"),
    [
        ("cpu", {}, []),
        ("cpu", {"gpu_memory_utilization": 0.92}, ["--gpu-memory-utilization on a CPU"]),
        ("cuda:0", {"gpu_memory_utilization": 0.5}, []),
        ("cuda:0", {"billing": False, "output_price": "0.28"}, ["--output-price without --billing"]),
        ("cpu", {"billing": True, "input_price": "1", "database_url": "sqlite:////tmp/x.db"}, []),
        (
            "cpu",
            {"gpu_memory_utilization": 0.5, "input_price": "1", "cached_input_price": "0", "database_url": "x"},
            [
                "--gpu-memory-utilization on a CPU",
                "--database-url, --input-price, --cached-input-price without --billing",
            ],
        ),
    ],
)
def test_what_was_set_and_does_nothing_is_named(device: str, given: Any, told: list[str]) -> None:
    assert launch.without_effect(load(given, environ={})[0], device) == told


def test_an_engine_that_ends_is_noticed_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")  # what a terminal that was closed says

    async def scenario() -> None:
        info = SimpleNamespace(device="none")
        client = SimpleNamespace(state="loading", progress=(0.0, ""), info=info, silent_seconds=0.0)
        stopped = asyncio.Event()
        server = SimpleNamespace(stop=lambda grace_seconds: stopped.set())
        watching = asyncio.create_task(
            launch._watch(SimpleNamespace(client=client, server=server, url="", names=()), Settings())  # type: ignore[arg-type]
        )
        for state in ("loading", "ready", "failed"):
            assert not stopped.is_set()
            client.state = state
            await asyncio.sleep(0.3)
        await asyncio.wait_for(stopped.wait(), 10)
        await watching

    monkeypatch.setattr("ernie_serve.banner.show_loading", fail)
    monkeypatch.setattr("ernie_serve.banner.show_ready", fail)
    asyncio.run(scenario())


def test_a_server_ends_whose_engine_owes_a_word_for_minutes_and_not_one_that_was_stopped_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Client:
        """Silent for hours when it is first looked at, as behind a server that was stopped; then it says a word."""

        state, info = "ready", None
        looks, ended = 0, ""

        @property
        def silent_seconds(self) -> float:
            self.looks += 1
            return 7200.0 if self.looks < 5 else (self.looks - 5) * 0.01

        def give_up(self, reason: str) -> None:
            self.state, self.ended = "failed", reason

    async def scenario() -> None:
        client, stopped = Client(), asyncio.Event()
        server = SimpleNamespace(stop=lambda grace_seconds: stopped.set())
        await launch._watch(SimpleNamespace(client=client, server=server), Settings())  # type: ignore[arg-type]
        assert stopped.is_set()
        assert client.looks == 5 + 11, "of which the last are in a row"
        assert client.ended == "The engine had work and said nothing for 0.1 seconds; it was ended."

    monkeypatch.setattr(launch, "_LOOK_SECONDS", 0.0099)
    monkeypatch.setattr(launch, "_STUCK_SECONDS", 0.1)
    asyncio.run(scenario())


def test_given_names_replace_the_checkpoint_s() -> None:
    assert launch.names_of(Settings(model="org/name", served_model_name=("a", "b", "a"))) == ("a", "b")
    assert launch.names_of(Settings(model="org/name")) == ("org/name",)
    assert launch.names_of(Settings()) == ("ernie-tiny",)


def test_the_engine_is_told_the_commit_of_a_hub_model_and_of_no_other(tmp_path: Path) -> None:
    for local in ("", "ernie-tiny", str(tmp_path)):
        settings = Settings(model=local)
        assert launch._pinned(settings, hub.resolve(local)) is settings
    assert launch._pinned(Settings(model="org/name"), tmp_path / "abc").revision == "abc"


def test_a_file_of_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "tokenizer.json"))

    monkeypatch.setattr("ernie_serve.launch.Tokenizer.from_folder", refuse)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read: Permission denied\. Look at its owner"):
        launch.open_text(Settings())


def test_a_home_that_is_nobody_s_is_told() -> None:
    with pytest.raises(SettingsError, match="--responses-file ~nobodyhere/kept: ~nobodyhere is nobody's home here"):
        launch.open_responses(Settings(responses_file="~nobodyhere/kept"))


def test_the_serving_preset_charges() -> None:
    assert load({}, config=CONFIGS / "ernie-4.5-21b-a3b.toml", environ={})[0].billing
    assert not Settings().billing


def opened(**settings: Any) -> Any:
    async def look() -> Any:
        meter = await launch.open_meter(Settings(**settings), "ernie")
        try:
            return meter.charges, getattr(meter, "prices", None)
        finally:
            await meter.close()

    return asyncio.run(look())


def test_without_billing_the_keys_of_the_settings_are_asked_for() -> None:
    assert opened(api_key=("sk-a",)) == (False, None)
    assert isinstance(asyncio.run(launch.open_meter(Settings(), "ernie")), FreeMeter)


def test_who_pays_cannot_buy_the_place_of_others_unless_the_operator_says_so() -> None:
    assert launch.takes_priority(Settings())
    assert not launch.takes_priority(Settings(billing=True))
    for billing in (False, True):
        assert launch.takes_priority(Settings(billing=billing, scheduling_policy="priority"))
        assert not launch.takes_priority(Settings(billing=billing, scheduling_policy="fcfs"))


def test_a_price_that_cannot_be_charged_does_not_start_without_billing_either() -> None:
    with pytest.raises(SettingsError, match="input price"):
        opened(input_price="0.0001")


def test_billing_charges_the_prices_of_the_settings(sqlite_url: str) -> None:
    charges, prices = opened(billing=True, database_url=sqlite_url)
    assert (charges, prices.input_nano, prices.cached_nano, prices.output_nano) == (True, 70, 70, 280)
    _, other = opened(
        billing=True, database_url=sqlite_url, input_price="0.1", cached_input_price="0.05", output_price="1"
    )
    assert (other.input_nano, other.cached_nano, other.output_nano) == (100, 50, 1000)
    assert other.version == prices.version + 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"api_key": ("sk-a",)}, "exclude each other"),
        ({"output_price": "0.0005001"}, "output price"),
        ({"database_url": "mysql://user:secret@host/name"}, "neither SQLite nor PostgreSQL"),
    ],
)
def test_what_cannot_be_charged_does_not_start(sqlite_url: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told) as caught:
        opened(**{"billing": True, "database_url": sqlite_url, **settings})
    assert "secret" not in str(caught.value)


def test_a_process_in_a_group_is_ended_with_what_it_started() -> None:
    command = ["sh", "-c", "sleep 60 & echo $!; wait"]
    with launch._InGroup(command, stdout=subprocess.PIPE, process_group=0) as process:
        assert process.stdout is not None
        assert Path(f"/proc/{int(process.stdout.readline())}").exists()
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
        assert process.stdout.read() == b"", "nobody holds the pipe any more"
        process.terminate()  # what is gone is not asked again
