"""Makes the meter that the settings ask for.

Knows which parts a meter is made of, and where a store lies when nobody says.
"""

import asyncio
import os
from pathlib import Path

from sqlalchemy import URL

from ernie_serve.billing.clock import Clock
from ernie_serve.billing.database import Database, cause_of, without_password
from ernie_serve.billing.paid import PaidMeter
from ernie_serve.billing.prices import Prices
from ernie_serve.billing.store import Store
from ernie_serve.config import path_of, require_known
from ernie_serve.errors import SettingsError, StartupError, StoreUnavailable

DATABASE_VARIABLE = "ERNIE_SERVE_DATABASE_URL"


async def open_meter(url: str, model: str, prices: Prices, clock: Clock | None = None) -> PaidMeter:
    """Begin to charge requests for `model` to the store at `url`. Close what comes back.

    Raises `StartupError` where the store cannot be used, or another server has it to itself.
    """
    store = await asyncio.to_thread(_open_store, url)
    try:
        return await PaidMeter.open(store, model, prices, clock)
    except BaseException as error:
        await asyncio.to_thread(store.close)
        if isinstance(error, StoreUnavailable) and isinstance(error.__cause__, Exception):
            raise StartupError(
                f"The billing database {without_password(url)} cannot be written: {cause_of(error.__cause__)}. Give it "
                "room and a mode that lets it be written, or give --database-url another."
            ) from None
        raise


def default_url() -> str:
    """The store that the environment names, or a file in the user's data folder.

    Raises `SettingsError` where the environment has a name that is nearly that, or the user has no home.
    """
    require_known()
    if named := os.environ.get(DATABASE_VARIABLE):
        return named
    folder = os.environ.get("XDG_DATA_HOME") or path_of("--database-url", "~/.local/share")
    path = Path(folder, "ernie_serve", "billing.db")
    try:
        return URL.create("sqlite", database=str(path)).render_as_string()
    except UnicodeEncodeError:
        raise SettingsError(f"The path {str(path)!r} is no UTF-8. Give --database-url another.") from None


def _open_store(url: str) -> Store:
    database = Database(url, make=True)
    if database.embedded:
        try:
            database.hold_alone()
        except BaseException:
            database.close()
            raise
    return Store(database)
