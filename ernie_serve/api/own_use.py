"""GET /v1/key and GET /v1/generation?id=…: what a key may spend and has spent, and what one request cost.

Knows OpenRouter's shapes of both. Money is an exact decimal; what a key and a request have cost stands beside it as a
whole number of nano-USD.
"""

import datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.auth import caller_of
from ernie_serve.api.desk import answered, now
from ernie_serve.api.organization import exact_usd
from ernie_serve.api.schema.queries import GenerationQuery, QueryFields, read_query
from ernie_serve.api.services import Services
from ernie_serve.billing import accounts, reports
from ernie_serve.billing.accounts import AccountRecord
from ernie_serve.billing.keys import Caller
from ernie_serve.billing.reports import Scope, Spending, UsageRow
from ernie_serve.errors import RecordNotFound


def router(services: Services) -> APIRouter:
    """The endpoints' routes."""
    routes = APIRouter()

    @routes.api_route("/v1/key", methods=["GET", "HEAD"])
    async def show_key(request: Request) -> Response:
        read_query(QueryFields, request.query_params)
        caller = caller_of(request)
        spent = await services.meter.report(reports.spending, caller, now())
        account = await services.meter.report(accounts.find_account, caller.account_id)
        assert account is not None, "a key has an account"
        return answered({"data": key_object(caller, account, spent)})

    @routes.api_route("/v1/generation", methods=["GET", "HEAD"])
    async def show_generation(request: Request) -> Response:
        asked, caller = read_query(GenerationQuery, request.query_params), caller_of(request)
        mine = Scope(account_id=caller.account_id, project_id=caller.project_id)
        scope = Scope() if "admin" in caller.scopes else mine
        row = await services.meter.report(reports.find_usage, asked.id, scope)
        if row is None:
            raise RecordNotFound(
                f"No request `{asked.id}` has been charged to this key's project. An answer's `id` is what to ask for, "
                "once it has ended.",
                param="id",
            )
        return answered({"data": generation_object(row)})

    return routes


def key_object(caller: Caller, account: AccountRecord, spent: Spending) -> dict[str, Any]:
    """How a key stands: its monthly limit, or its project's where that leaves less, which `limit_of` says.

    What is left of it says nothing of the account's balance, which stands beside it.
    """
    limits = caller.limits
    months = [
        (limit - used, limit, whose)
        for whose, limit, used in (
            ("key", limits.month_nano, spent.month_nano),
            ("project", caller.project_month_nano, spent.project_month_nano),
        )
        if limit is not None
    ]
    left, month, whose = min(months, key=lambda each: each[0], default=(None, None, None))
    return {
        "label": f"sk-{caller.key_id}",
        "name": caller.key_name,
        "usage": exact_usd(spent.total_nano),
        "usage_nano_usd": spent.total_nano,
        "usage_daily": exact_usd(spent.day_nano),
        "usage_weekly": exact_usd(spent.week_nano),
        "usage_monthly": exact_usd(spent.month_nano),
        "limit": None if month is None else exact_usd(month),
        "limit_reset": None if month is None else "monthly",
        "limit_remaining": None if left is None else exact_usd(max(0, left)),
        "limit_of": whose,
        "is_free_tier": False,
        "is_provisioning_key": "admin" in caller.scopes,
        "include_byok_in_limit": False,
        "expires_at": None if caller.expires is None else iso(caller.expires),
        "rate_limit": {
            "requests": -1 if limits.requests_per_minute is None else limits.requests_per_minute,
            "interval": "1m",
        },
        "tokens_per_minute": limits.tokens_per_minute,
        "max_concurrent": limits.concurrent,
        "scopes": sorted(caller.scopes),
        "project_id": caller.project_id,
        "account": {
            "id": account.id,
            "balance": exact_usd(account.balance_nano),
            "balance_nano_usd": account.balance_nano,
            "reserved": exact_usd(account.reserved_nano),
            "reserved_nano_usd": account.reserved_nano,
        },
    }


def generation_object(row: UsageRow) -> dict[str, Any]:
    """What one request was charged. Times are whole milliseconds."""
    latency = None if row.ttft_us is None else row.ttft_us // 1000
    total = None if row.total_us is None else row.total_us // 1000
    return {
        "id": row.request_id,
        "model": row.model,
        "provider_name": "ernie-serve",
        "created_at": iso(row.created),
        "total_cost": exact_usd(row.cost_nano),
        "usage": exact_usd(row.cost_nano),
        "cost_nano_usd": row.cost_nano,
        "price_version": row.price_version,
        "status": row.status,
        "cancelled": row.status == "cancelled",
        "finish_reason": row.finish_reason,
        "native_finish_reason": row.finish_reason,
        "latency": latency,
        "generation_time": None if total is None or latency is None else total - latency,
        "total_time": total,
        "tokens_prompt": row.prompt,
        "tokens_completion": row.completion,
        "native_tokens_prompt": row.prompt,
        "native_tokens_completion": row.completion,
        "native_tokens_reasoning": row.reasoning,
        "native_tokens_cached": row.cached,
        "is_byok": False,
        "project_id": row.project_id,
        "api_key_id": row.key_id,
    }


def iso(seconds: int) -> str:
    """A time as ISO 8601 has it, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat().replace("+00:00", "Z")
