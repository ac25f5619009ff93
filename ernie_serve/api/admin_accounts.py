"""/admin/accounts, /admin/bookings and /admin/projects: who pays, what they have, and credit. For admin keys.

Knows the shapes of all three. Accounts and projects are made by making a key for them.
"""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.desk import Desk, answered, listed, now, refusals, usd
from ernie_serve.api.schema.admin import AccountChangeBody, ProjectChangeBody, TopUpBody
from ernie_serve.api.schema.queries import BookingsQuery, ListQuery, ProjectsQuery, QueryFields, read_query
from ernie_serve.api.services import Services
from ernie_serve.billing import accounts, bookings, office
from ernie_serve.billing.accounts import AccountRecord, ProjectRecord
from ernie_serve.billing.bookings import Booking
from ernie_serve.billing.money import format_usd
from ernie_serve.errors import InvalidRequest, RecordNotFound


def router(services: Services) -> APIRouter:
    """The endpoints' routes."""
    routes, desk = APIRouter(), Desk(services)

    @routes.api_route("/admin/accounts", methods=["GET", "HEAD"])
    async def list_accounts(request: Request) -> Response:
        asked = read_query(ListQuery, request.query_params)
        found = await desk.read(accounts.list_accounts, after=asked.after, limit=asked.limit + 1)
        return listed([account_object(each) for each in found], asked.limit)

    @routes.api_route("/admin/accounts/{account_id}", methods=["GET", "HEAD"])
    async def show_account(request: Request) -> Response:
        read_query(QueryFields, request.query_params)
        return answered(account_object(await the_account(desk, request)))

    @routes.post("/admin/accounts/{account_id}")
    async def change_account(request: Request) -> Response:
        body, account = await desk.body(request, AccountChangeBody), await the_account(desk, request)
        told, active = f"set the account {account.id} to {body.status}", body.status == "active"
        await desk.change(request, told, accounts.set_account_status, account.id, active=active)
        return answered(account_object(await the_account(desk, request)))

    @routes.post("/admin/accounts/{account_id}/topups")
    async def top_up(request: Request) -> Response:
        body, account = await desk.body(request, TopUpBody), await the_account(desk, request)
        amount = body.amount_usd
        if amount < 0 and body.kind == "topup":
            told = "`amount_usd` is below zero. To take credit away send the `kind` `adjust` with it."
            raise InvalidRequest(told, param="amount_usd")
        with refusals():
            ref = None if body.reference is None else bookings.given_ref(body.reference)
        told = f"booked {format_usd(amount)} USD to the account {account.id} as {body.kind}"
        await desk.change(request, told, office.book, account.id, amount, now=now(), kind=body.kind, ref=ref)
        return answered(account_object(await the_account(desk, request)))

    @routes.api_route("/admin/bookings", methods=["GET", "HEAD"])
    async def list_bookings(request: Request) -> Response:
        asked = read_query(BookingsQuery, request.query_params)
        read = bookings.list_bookings
        found = await desk.read(read, asked.account_id, after=asked.after, limit=asked.limit + 1)
        return listed([booking_object(each) for each in found], asked.limit)

    @routes.api_route("/admin/projects", methods=["GET", "HEAD"])
    async def list_projects(request: Request) -> Response:
        asked = read_query(ProjectsQuery, request.query_params)
        found = await desk.read(accounts.list_projects, asked.account_id)
        return listed([project_object(each) for each in found], len(found))

    @routes.post("/admin/projects/{project_id}")
    async def change_project(request: Request) -> Response:
        body, project_id = await desk.body(request, ProjectChangeBody), request.path_params["project_id"]
        if await desk.read(accounts.find_project, project_id) is None:
            told = f"There is no project `{project_id[:80]}`. GET /admin/projects lists those there are."
            raise RecordNotFound(told)
        told = f"limited the project {project_id}"
        await desk.change(request, told, accounts.set_project_limit, project_id, body.monthly_limit_usd)
        project = await desk.read(accounts.find_project, project_id)
        assert project is not None, "a project stays"
        return answered(project_object(project))

    return routes


async def the_account(desk: Desk, request: Request) -> AccountRecord:
    """The account in the path. Raises `RecordNotFound`."""
    account_id = request.path_params["account_id"]
    found = await desk.read(accounts.find_account, account_id)
    if found is None:
        raise RecordNotFound(f"There is no account `{account_id[:80]}`. GET /admin/accounts lists those there are.")
    return found


def account_object(record: AccountRecord) -> dict[str, Any]:
    """An account: its balance, and what of that is held for running requests."""
    return {
        "id": record.id,
        "object": "account",
        "name": record.name,
        "status": record.status,
        **usd("balance", record.balance_nano),
        **usd("reserved", record.reserved_nano),
        "created_at": record.created,
    }


def booking_object(record: Booking) -> dict[str, Any]:
    """What was booked to an account by hand."""
    return {
        "id": str(record.id),
        "object": "booking",
        "account_id": record.account_id,
        "account": record.account_name,
        "kind": record.kind,
        **usd("amount", record.nano),
        "reference": record.reference,
        "created_at": record.created,
    }


def project_object(record: ProjectRecord) -> dict[str, Any]:
    """A project and what it may spend in a month."""
    return {
        "id": record.id,
        "object": "project",
        "name": record.name,
        "account_id": record.account_id,
        **usd("monthly_limit", record.month_limit_nano),
        "created_at": record.created,
    }
