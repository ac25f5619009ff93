"""Where the store is, and that it never learns what was said."""

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from ernie_serve.billing.database import Database, store_told
from ernie_serve.billing.meter import Order
from ernie_serve.billing.office import top_up
from ernie_serve.billing.opening import default_url, open_meter
from ernie_serve.billing.prices import Prices, Usage
from ernie_serve.errors import SettingsError, StartupError


def test_the_environment_names_the_store(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("ERNIE_SERVE_DATABASE_URL", raising=False)
    assert default_url() == f"sqlite:///{tmp_path}/ernie_serve/billing.db"
    monkeypatch.setenv("ERNIE_SERVE_DATABASE_URL", "postgresql://host/name")
    assert default_url() == "postgresql://host/name"


def test_the_store_lies_in_the_folder_that_is_named_however_it_is_spelled(monkeypatch, tmp_path):
    folder = tmp_path / "a b?c#d%41@é+"
    monkeypatch.setenv("XDG_DATA_HOME", str(folder))
    monkeypatch.delenv("ERNIE_SERVE_DATABASE_URL", raising=False)
    assert store_told(default_url()) == f"SQLite {folder}/ernie_serve/billing.db"
    Database(default_url(), make=True).close()
    assert (folder / "ernie_serve" / "billing.db").is_file()
    monkeypatch.setenv("XDG_DATA_HOME", os.fsdecode(b"/home/\xff"))
    with pytest.raises(SettingsError, match="is no UTF-8"):
        default_url()


def test_who_has_no_home_has_to_say_where_the_store_is(monkeypatch):
    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_DATA_HOME", "ERNIE_SERVE_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match=r"--database-url ~/\.local/share: ~ is nobody's home"):
        default_url()
    monkeypatch.setenv("ERNIE_SERVE_DATABASE_URL", "postgresql://host/name")
    assert default_url() == "postgresql://host/name"


def test_a_second_server_on_one_file_does_not_start(small_shop):
    async def scenario():
        async with small_shop.open():
            with pytest.raises(StartupError, match="Another server"):
                await open_meter(small_shop.url, "ernie", Prices())
        async with small_shop.open():
            pass

    asyncio.run(scenario())


def test_a_store_without_room_is_told_in_a_line(small_shop, monkeypatch):
    def full(connection, *given, **named):
        raise sqlite3.OperationalError("database or disk is full")

    async def scenario():
        async with small_shop.open():
            pass
        monkeypatch.setattr("ernie_serve.billing.price_lists.set_prices", full)
        with pytest.raises(StartupError, match=r"cannot be written: database or disk is full\. Give it room"):
            await open_meter(small_shop.url, "ernie", Prices())

    asyncio.run(scenario())


def test_replicas_that_start_together_agree_on_the_prices(postgres_url):
    async def scenario():
        lists = [Prices(output_nano=280 + index // 2) for index in range(6)]
        meters = await asyncio.gather(*(open_meter(postgres_url, "ernie", prices) for prices in lists))
        told = {meter.prices.version: meter.prices.output_nano for meter in meters}
        assert sorted(told) == list(range(1, len(told) + 1))
        assert set(told.values()) == {280, 281, 282}
        for meter in meters:
            await meter.close()

    asyncio.run(scenario())


def test_one_invoice_booked_by_many_at_once_counts_once(shop):
    async def scenario():
        async with shop.open() as meter:
            caller = await shop.caller(meter, 5)
            book = [meter.change(top_up, caller.account_id, 100, now=1, ref="invoice") for _ in range(16)]
            assert set(await asyncio.gather(*book)) == {105}

    asyncio.run(scenario())


def test_the_store_holds_neither_keys_nor_anything_that_was_said(small_shop):
    canary = "canary-in-the-coal-mine"

    async def scenario():
        async with small_shop.open() as meter:
            new = await small_shop.new_key(meter)
            caller = await meter.authenticate(new.key)
            order = Order(
                request_id="r", model="ernie", prompt_tokens=3, most_tokens=9, idempotency_key=canary, body_sha256="00"
            )
            await meter.settle(await meter.reserve(caller, order), Usage(prompt_tokens=3), "ok")
            return new.key

    key = asyncio.run(scenario())
    path = Path(small_shop.url.removeprefix("sqlite:///"))
    stored = b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))
    assert b"ernie" in stored
    for secret in (canary, key, key.split("-", 2)[2]):
        assert secret.encode() not in stored
