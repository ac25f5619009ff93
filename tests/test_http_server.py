import asyncio
import signal
import socket
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI

from ernie_serve import http_server
from ernie_serve.config import Settings
from ernie_serve.errors import SettingsError


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "2001:db8::1"])
def test_other_machines_are_not_let_in_without_a_key(host: str) -> None:
    with pytest.raises(SettingsError, match=r"--billing or --api-key, or with --allow-unauthenticated"):
        http_server.require_guarded(Settings(host=host))
    for guard in ({"billing": True}, {"api_key": ("sk-a",)}, {"allow_unauthenticated": True}):
        http_server.require_guarded(Settings(host=host, **guard))
        assert http_server.is_guarded(Settings(**guard))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.9.9.9"])
def test_this_machine_needs_no_key(host: str) -> None:
    http_server.require_guarded(Settings(host=host))
    assert not http_server.is_guarded(Settings(host=host))


def test_a_chunk_does_not_wait_for_the_client_to_confirm_the_one_before() -> None:
    with http_server.listen(Settings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("failure", [OSError(), SystemExit(1)])
def test_a_signal_is_heard_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch, failure: BaseException) -> None:
    def fail(*_: object) -> None:
        raise failure

    async def scenario() -> None:
        server = http_server.Server(uvicorn.Config(FastAPI()), 30)
        server.server_state.tasks = {asyncio.ensure_future(asyncio.sleep(0))}
        server._hear()
        assert server.should_exit

    monkeypatch.setattr("ernie_serve.banner.show_draining", fail)
    asyncio.run(scenario())


def test_an_address_of_another_machine_or_none_is_told_from_a_port_that_is_taken() -> None:
    for host in ("192.0.2.1", "999.1.1.1"):
        with pytest.raises(SettingsError, match="Give --host an address of this machine"):
            http_server.listen(Settings(host=host, allow_unauthenticated=True))
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(SettingsError, match="Choose another --port"):
        http_server.listen(Settings(port=other.getsockname()[1]))


@pytest.mark.parametrize("host", ["a..b", "..", "a" * 64, "\udcff"])
def test_a_host_that_is_no_name_is_told_like_one_of_no_address(host: str) -> None:
    with pytest.raises(SettingsError, match="Give --host an address of this machine"):
        http_server.listen(Settings(host=host))


@pytest.mark.parametrize(("host", "reached"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::", "[::1]")])
def test_the_address_file_says_how_this_machine_reaches_the_server(tmp_path: Path, host: str, reached: str) -> None:
    file = tmp_path / "url"
    try:
        listener = http_server.listen(Settings(host=host, port=0, allow_unauthenticated=True))
    except SettingsError as error:
        pytest.skip(str(error))
    with listener:
        with http_server.address_told(listener, str(file)):
            assert file.read_text() == f"http://{reached}:{listener.getsockname()[1]}\n"
        assert not file.exists()
        with http_server.address_told(listener, str(file)):
            file.write_text("another's")
        assert file.read_text() == "another's"
        none, unknown = "cannot be written", r"~nobodyhere/url: ~nobodyhere is nobody's home"
        for wrong, told in ((str(tmp_path / "none" / "url"), none), ("~nobodyhere/url", unknown), ("a\0b", none)):
            with (
                pytest.raises(SettingsError, match=rf"--address-file .*{told}"),
                http_server.address_told(listener, wrong),
            ):
                pass


def test_ctrl_c_is_heard_by_a_server_in_the_background_and_a_hangup_not_under_nohup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shell has ignored the one for what it starts with `&`, and `nohup` the other."""
    heard: list[signal.Signals] = []

    async def scenario() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", lambda each, _: heard.append(each))
        with http_server.Server(uvicorn.Config(FastAPI()), 30).capture_signals():
            pass

    monkeypatch.setattr(signal, "getsignal", lambda each: signal.SIG_IGN)
    asyncio.run(scenario())
    assert heard == [signal.SIGINT, signal.SIGTERM]


def test_what_still_runs_at_the_end_is_ended() -> None:
    async def scenario() -> None:
        server = http_server.Server(uvicorn.Config(FastAPI()), 30)
        stuck, ends = asyncio.ensure_future(asyncio.Event().wait()), asyncio.ensure_future(asyncio.sleep(0.01))
        server.server_state.tasks = {stuck, ends}
        await server.end_requests()
        assert stuck.cancelled()
        assert not ends.cancelled()

    asyncio.run(scenario())
