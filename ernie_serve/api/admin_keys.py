"""/admin/keys: what `ernie-serve keys` does, over HTTP for admin keys.

Knows the shape of a key. The key itself is in one answer, that to its making.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.desk import Desk, answered, listed, now, usd
from ernie_serve.api.schema.admin import KeyChangeBody, NewKeyBody
from ernie_serve.api.schema.queries import KeysQuery, QueryFields, key_id_of, read_query
from ernie_serve.api.services import Services
from ernie_serve.billing import accounts, office
from ernie_serve.billing.accounts import KeyRecord
from ernie_serve.billing.keys import KeyLimits, parse_scopes
from ernie_serve.errors import InvalidRequest, RecordNotFound


def router(services: Services) -> APIRouter:
    """The endpoints' routes."""
    routes, desk = APIRouter(), Desk(services)

    @routes.api_route("/admin/keys", methods=["GET", "HEAD"])
    async def list_keys(request: Request) -> Response:
        asked = read_query(KeysQuery, request.query_params)
        after = None if asked.after is None else key_id_of(asked.after)
        owner, project = asked.account_id, asked.project_id
        found = await desk.read(accounts.list_keys, owner, project_id=project, after=after, limit=asked.limit + 1)
        return listed([key_object(each) for each in found], asked.limit)

    @routes.post("/admin/keys")
    async def create_key(request: Request) -> Response:
        body = await desk.body(request, NewKeyBody)
        if body.expires_at is not None and body.expires_at <= now():
            raise InvalidRequest(f"`expires_at` is {body.expires_at}, which is over.", param="expires_at")
        new = await desk.change(
            request,
            "made a key",
            office.open_key,
            body.name,
            now=now(),
            account=body.account,
            project=body.project,
            credit_nano=body.credit_usd,
            scopes=parse_scopes(",".join(body.scopes)),
            limits=KeyLimits(**body.changes),
            expires=body.expires_at,
        )
        return answered({**key_object(await the_key(desk, new.key_id)), "value": new.key})

    @routes.api_route("/admin/keys/{key_id}", methods=["GET", "HEAD"])
    async def show_key(request: Request) -> Response:
        read_query(QueryFields, request.query_params)
        return answered(key_object(await the_key(desk, request.path_params["key_id"])))

    @routes.post("/admin/keys/{key_id}")
    async def change_key(request: Request) -> Response:
        body = await desk.body(request, KeyChangeBody)
        record = await the_key(desk, request.path_params["key_id"])
        if body.changes:
            key_id = record.caller.key_id
            told = f"limited the key sk-{key_id}"
            record = await desk.change(request, told, office.change_limits, key_id, body.changes)
        return answered(key_object(record))

    @routes.delete("/admin/keys/{key_id}")
    async def disable_key(request: Request) -> Response:
        key_id = (await the_key(desk, request.path_params["key_id"])).caller.key_id
        await desk.change(request, f"disabled the key sk-{key_id}", office.disable, key_id, now())
        return answered(key_object(await the_key(desk, key_id)))

    return routes


async def the_key(desk: Desk, name: str) -> KeyRecord:
    """A key by its id, with or without `sk-`. Raises `RecordNotFound`."""
    found = await desk.read(accounts.find_key, key_id_of(name))
    if found is None:
        raise RecordNotFound(f"There is no key `{name[:80]}`. GET /admin/keys lists those there are.")
    return found


def key_object(record: KeyRecord) -> dict[str, Any]:
    """A key, without the key."""
    caller = record.caller
    return {
        "id": caller.key_id,
        "object": "key",
        "name": caller.key_name,
        "redacted_value": f"sk-{caller.key_id}-…",
        "status": record.state(now()).replace(" ", "_"),
        "account_id": caller.account_id,
        "account": record.account_name,
        "project_id": caller.project_id,
        "project": record.project_name,
        "scopes": sorted(caller.scopes),
        "requests_per_minute": caller.limits.requests_per_minute,
        "tokens_per_minute": caller.limits.tokens_per_minute,
        "max_concurrent": caller.limits.concurrent,
        **usd("monthly_limit", caller.limits.month_nano),
        "created_at": record.created,
        "last_used_at": record.last_used,
        "expires_at": caller.expires,
        "disabled_at": record.disabled,
    }
