"""A server that charges, called without a socket: for tests of what clients and admins see of billing."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx
from fastapi import FastAPI
from stores import Shop

from ernie_serve.api.app import create_app
from ernie_serve.api.services import Services
from ernie_serve.billing.clock import Clock
from ernie_serve.billing.office import NewKey
from ernie_serve.billing.paid import PaidMeter

DAY = 86_400
PROMPT_NANO, OUTPUT_NANO = 70, 280


@dataclass
class Metered:
    """The server and its meter. Times are the real ones."""

    shop: Shop
    meter: PaidMeter
    app: FastAPI
    client: httpx.AsyncClient

    async def ask(self, method: str, path: str, key: str | None, **request: Any) -> httpx.Response:
        """One request, with a key."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.request(method, path, headers=headers, **request)

    async def get(self, path: str, key: str, **query: Any) -> Any:
        """What is there, its decimals exact."""
        answer = await self.ask("GET", path, key, params=query)
        assert answer.status_code == 200, answer.text
        return exactly(answer)

    async def complete(self, key: str, prompt: str = "Hi", max_tokens: int = 5) -> dict[str, Any]:
        """An answer that was paid for: as many prompt tokens as letters, and as many tokens as were asked for."""
        body = {"model": "ernie", "prompt": prompt, "max_tokens": max_tokens}
        answer = await self.ask("POST", "/v1/completions", key, json=body)
        assert answer.status_code == 200, answer.text
        told: dict[str, Any] = exactly(answer)
        return told

    async def new_key(self, *scopes: str, **given: Any) -> NewKey:
        """A key with these scopes, or with the usual ones."""
        if scopes:
            given["scopes"] = scopes
        return await self.shop.new_key(self.meter, **given)


def exactly(answer: httpx.Response) -> Any:
    """A body whose numbers with a point are decimals."""
    return json.loads(answer.text, parse_float=Decimal)


def cost(prompt: str, completion: int) -> int:
    """What an answer of `complete` costs in nano-USD."""
    return len(prompt) * PROMPT_NANO + completion * OUTPUT_NANO


@asynccontextmanager
async def metered(shop: Shop, make_services: Callable[..., Services]) -> AsyncIterator[Metered]:
    """Serve with billing on a store, which has to add up in the end."""
    async with shop.open(clock=Clock()) as meter:
        app = create_app(make_services(meter=meter))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield Metered(shop, meter, app, client)
