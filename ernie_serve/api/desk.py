"""What admin routes share: bodies, changes that are logged, pages, and times.

Knows HTTP and the meter. Knows no shape of a key or an account.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.auth import caller_of
from ernie_serve.api.body import parse_object, read_body
from ernie_serve.api.schema.admin import AdminBody
from ernie_serve.api.schema.validation import validated
from ernie_serve.api.services import Services
from ernie_serve.api.whole import JsonAnswer
from ernie_serve.billing.money import format_usd
from ernie_serve.errors import InvalidRequest, SettingsError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Body = TypeVar("Body", bound=AdminBody)


class Desk:
    """Reads and changes the billing store for admin keys, each change in one transaction."""

    def __init__(self, services: Services) -> None:
        self.read = services.meter.report
        self._meter = services.meter
        self._limits = services.limits

    async def body(self, request: Request, fields: type[Body]) -> Body:
        """The request's body as `fields`. Raises `InvalidRequest`."""
        return validated(fields, parse_object(await read_body(request, self._limits)))

    async def change(
        self,
        request: Request,
        told: str,
        do: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Do a change and log it, with the key that asked for it, unless `do` answers with `False`: nothing was done.

        Raises `InvalidRequest` where the office refuses.
        """
        with refusals():
            answer = await self._meter.change(do, *args, **kwargs)
        if answer is not False:
            logger.info("The admin key sk-%s %s.", caller_of(request).key_id, told)
        return answer


@contextmanager
def refusals() -> Iterator[None]:
    """What the office says to a person on the command line, said to a client."""
    try:
        yield
    except SettingsError as error:
        raise InvalidRequest(str(error)) from None


def listed(data: Sequence[dict[str, Any]], limit: int) -> Response:
    """A page of a list, of which one more than the page may have been read."""
    page = data[:limit]
    more = len(data) > limit
    return answered({"object": "list", "data": page, "has_more": more, "last_id": page[-1]["id"] if page else None})


def answered(body: dict[str, Any]) -> Response:
    """An answer that nobody on the way may keep."""
    return JsonAnswer(body, headers={"cache-control": "no-store"})


def usd(name: str, nano: int | None) -> dict[str, Any]:
    """An amount in both spellings: `NAME_usd` is an exact decimal, `NAME_nano_usd` a whole number."""
    return {f"{name}_usd": None if nano is None else format_usd(nano), f"{name}_nano_usd": nano}


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
