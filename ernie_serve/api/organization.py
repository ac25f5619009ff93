"""GET /v1/organization/usage/completions, /v1/organization/costs and /v1/organization/usage/export.

Knows OpenAI's shapes of usage and costs, and who may see what: a key its own project, an admin key everything. Money is
an exact decimal, with the same as a whole number of nano-USD beside it.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ernie_serve.api.auth import caller_of
from ernie_serve.api.billed import exact
from ernie_serve.api.desk import answered, now
from ernie_serve.api.schema.queries import CostsQuery, ExportQuery, SpanQuery, UsageQuery, key_id_of, read_query
from ernie_serve.api.services import Services
from ernie_serve.billing import reports
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.money import format_usd
from ernie_serve.billing.reports import ExportFormat, Group, Page, Scope, Sums, UsageRow
from ernie_serve.errors import Forbidden, InvalidRequest

MEDIA: dict[ExportFormat, str] = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}

_COLUMNS: dict[str, Group] = {
    "project_id": "project_id",
    "api_key_id": "key_id",
    "model": "model",
    "line_item": "model",
    "account_id": "account_id",
}


def router(services: Services) -> APIRouter:
    """The endpoints' routes."""
    routes = APIRouter()

    @routes.api_route("/v1/organization/usage/completions", methods=["GET", "HEAD"])
    async def usage(request: Request) -> Response:
        asked = read_query(UsageQuery, request.query_params)
        found = await sums_by_time(services, caller_of(request), asked, asked.models)
        return answered(page_object(found, usage_result))

    @routes.api_route("/v1/organization/costs", methods=["GET", "HEAD"])
    async def costs(request: Request) -> Response:
        asked = read_query(CostsQuery, request.query_params)
        found = await sums_by_time(services, caller_of(request), asked, asked.line_items)
        return answered(page_object(found, costs_result))

    @routes.api_route("/v1/organization/usage/export", methods=["GET", "HEAD"])
    async def export(request: Request) -> Response:
        asked = read_query(ExportQuery, request.query_params)
        start, end = span_of(asked)
        scope = visible(caller_of(request), asked, asked.models)

        async def read(after: tuple[int, str] = (0, "")) -> list[UsageRow]:
            size = reports.EXPORT_PAGE
            return await services.meter.report(reports.list_usage, scope, start=start, end=end, after=after, limit=size)

        headers = {"content-disposition": f'attachment; filename="usage.{asked.format}"', "cache-control": "no-store"}
        rows = await read()  # before anything is answered: a store that is away is an error of its own
        if request.method == "HEAD":
            return Response(media_type=MEDIA[asked.format], headers=headers)
        return StreamingResponse(exported(rows, read, asked.format), media_type=MEDIA[asked.format], headers=headers)

    return routes


async def sums_by_time(services: Services, caller: Caller, asked: "UsageQuery | CostsQuery", models: list[str]) -> Page:
    """What a report's page is made of. Raises `InvalidRequest` and `Forbidden`."""
    start, end = span_of(asked)
    return await services.meter.report(
        reports.usage_by_time,
        visible(caller, asked, models),
        start=start,
        end=end,
        width=asked.bucket_width,
        group_by=[_COLUMNS[name] for name in asked.group_by],
        limit=asked.limit,
        page=None if asked.page is None else int(asked.page.removeprefix("page_")),
    )


def span_of(asked: SpanQuery) -> tuple[int, int]:
    """The span that is asked for, its end exclusive; without one until now."""
    end = now() + 1 if asked.end_time is None else asked.end_time
    if asked.start_time >= end:
        raise InvalidRequest(
            f"`start_time` is {asked.start_time} and the end {end}; a span ends after it starts.", param="start_time"
        )
    return asked.start_time, end


def visible(caller: Caller, asked: SpanQuery, models: list[str]) -> Scope:
    """Whose usage a caller is shown of what is asked for. Raises `Forbidden` for a project of somebody else."""
    keys = tuple(key_id_of(each) for each in asked.api_key_ids)
    scope = Scope(project_id=tuple(asked.project_ids) or None, key_id=keys or None, model=tuple(models) or None)
    if "admin" in caller.scopes:
        return scope
    if set(asked.project_ids) - {caller.project_id}:
        raise Forbidden(
            f"This key may see its own project, {caller.project_id}. Ask for that one, or for none.",
            param="project_ids",
        )
    return Scope(account_id=caller.account_id, project_id=caller.project_id, key_id=scope.key_id, model=scope.model)


def page_object(page: Page, result: Callable[[Sums], dict[str, Any]]) -> dict[str, Any]:
    """OpenAI's page of buckets. What its pages are called is where the next bucket starts."""
    buckets = [
        {
            "object": "bucket",
            "start_time": bucket.start,
            "end_time": bucket.end,
            "results": [result(sums) for sums in bucket.results],
        }
        for bucket in page.buckets
    ]
    more = page.next_page is not None
    return {
        "object": "page",
        "data": buckets,
        "has_more": more,
        "next_page": f"page_{page.next_page}" if more else None,
    }


def usage_result(sums: Sums) -> dict[str, Any]:
    """One group of one bucket: tokens and requests. Cached input is a part of the input."""
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": sums.prompt,
        "input_cached_tokens": sums.cached,
        "input_uncached_tokens": sums.prompt - sums.cached,
        "output_tokens": sums.completion,
        "output_reasoning_tokens": sums.reasoning,
        "num_model_requests": sums.requests,
        "cost_nano_usd": sums.cost_nano,
        "project_id": sums.project_id,
        "user_id": None,
        "api_key_id": sums.key_id,
        "model": sums.model,
        "batch": None,
        "service_tier": None,
        "account_id": sums.account_id,
    }


def costs_result(sums: Sums) -> dict[str, Any]:
    """One group of one bucket: money."""
    return {
        "object": "organization.costs.result",
        "amount": {"value": exact_usd(sums.cost_nano), "currency": "usd"},
        "cost_nano_usd": sums.cost_nano,
        "line_item": sums.model,
        "project_id": sums.project_id,
        "api_key_id": sums.key_id,
        "account_id": sums.account_id,
        "quantity": None,
        "quantity_unit": None,
    }


def exact_usd(nano: int) -> orjson.Fragment:
    """Dollars as a JSON number with every digit; no float has been near it."""
    return exact(format_usd(nano))


async def exported(
    rows: list[UsageRow], read: Callable[[tuple[int, str]], Awaitable[list[UsageRow]]], form: ExportFormat
) -> AsyncGenerator[bytes, None]:
    """An export that begins with these rows; each page of more is read by itself, as in `reports.export`."""
    yield reports.export_head(form)
    while rows:
        yield reports.export_rows(rows, form)
        rows = await read((rows[-1].created, rows[-1].request_id))
