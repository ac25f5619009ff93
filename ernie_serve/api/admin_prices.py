"""/admin/prices: what a token cost from when on, by the `price_version` that charged requests keep. For admin keys.

Knows the shape of a price list. A list is made by a server's start with other prices, and never changed.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.desk import Desk, listed
from ernie_serve.api.schema.queries import NumberedQuery, read_query
from ernie_serve.api.services import Services
from ernie_serve.billing import price_lists
from ernie_serve.billing.price_lists import PriceList
from ernie_serve.billing.prices import usd_per_million


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes, desk = APIRouter(), Desk(services)

    @routes.api_route("/admin/prices", methods=["GET", "HEAD"])
    async def list_prices(request: Request) -> Response:
        asked = read_query(NumberedQuery, request.query_params)
        found = await desk.read(price_lists.list_prices, after=asked.after, limit=asked.limit + 1)
        return listed([price_object(each) for each in found], asked.limit)

    return routes


def price_object(each: PriceList) -> dict[str, Any]:
    """A price list: US dollars for a million tokens, and the same as whole nano-USD for one."""
    prices = each.prices
    return {
        "id": str(prices.version),
        "object": "price_list",
        "price_version": prices.version,
        "model": each.model,
        "input_usd_per_million": usd_per_million(prices.input_nano),
        "input_nano_usd": prices.input_nano,
        "cached_input_usd_per_million": usd_per_million(prices.cached_nano),
        "cached_input_nano_usd": prices.cached_nano,
        "output_usd_per_million": usd_per_million(prices.output_nano),
        "output_nano_usd": prices.output_nano,
        "valid_from": each.valid_from,
    }
