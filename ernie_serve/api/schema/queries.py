"""What reports are asked for in a URL: OpenAI's parameters of usage and costs, and ours of lists and exports.

Knows types and ranges. A parameter that is not known is refused, because a report that ignores one tells too much.
"""

from typing import Annotated, Any, Literal, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import QueryParams

from ernie_serve.api.schema.validation import validated
from ernie_serve.errors import InvalidRequest

Query = TypeVar("Query", bound="QueryFields")

Seconds = Annotated[int, Field(ge=0, lt=2**40)]
Id = Annotated[str, Field(max_length=128)]
Ids = Annotated[list[Id], Field(max_length=100)]
Limit = Annotated[int, Field(ge=1, le=1440)]
PageLimit = Annotated[int, Field(ge=1, le=1000)]
PageName = Annotated[str, Field(pattern=r"^page_[0-9]{1,12}$")]


class QueryFields(BaseModel):
    """Parameters of a URL. Lists are repeated parameters, with or without `[]` after the name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SpanQuery(QueryFields):
    """A span of time, its end exclusive, and whose usage of it; without `end_time` until now."""

    start_time: Seconds
    end_time: Seconds | None = None
    project_ids: Ids = []
    api_key_ids: Ids = []


class UsageQuery(SpanQuery):
    """`GET /v1/organization/usage/completions`."""

    bucket_width: Literal["1m", "1h", "1d"] = "1d"
    group_by: list[Literal["project_id", "api_key_id", "model", "account_id"]] = []
    models: Ids = []
    limit: Limit | None = None
    page: PageName | None = None


class CostsQuery(SpanQuery):
    """`GET /v1/organization/costs`. A line item is a model."""

    bucket_width: Literal["1d"] = "1d"
    group_by: list[Literal["project_id", "api_key_id", "line_item", "account_id"]] = []
    line_items: Ids = []
    limit: Limit | None = None
    page: PageName | None = None


class ExportQuery(SpanQuery):
    """`GET /v1/organization/usage/export`."""

    format: Literal["csv", "jsonl"] = "jsonl"
    models: Ids = []


class GenerationQuery(QueryFields):
    """`GET /v1/generation`."""

    id: Id


class ListQuery(QueryFields):
    """A page of a list: so many, after the one with this id."""

    after: Id | None = None
    limit: PageLimit = 100


class KeysQuery(ListQuery):
    """`GET /admin/keys`."""

    account_id: Id | None = None
    project_id: Id | None = None


class NumberedQuery(QueryFields):
    """A page of a list whose ids are numbers, as of `GET /admin/prices`."""

    after: Annotated[int, Field(ge=0, lt=2**63)] = 0
    limit: PageLimit = 100


class BookingsQuery(NumberedQuery):
    """`GET /admin/bookings`."""

    account_id: Id | None = None


class ProjectsQuery(QueryFields):
    """`GET /admin/projects`."""

    account_id: Id | None = None


def read_query(fields: type[Query], given: QueryParams) -> Query:
    """The parameters of a URL as `fields`. Raises `InvalidRequest` for the first that is wrong."""
    values: dict[str, Any] = {}
    for spelled, value in given.multi_items():
        name = spelled.removesuffix("[]")
        if name not in fields.model_fields:
            known = ", ".join(f"`{each}`" for each in fields.model_fields) or "no parameters"
            raise InvalidRequest(f"`{name[:40]}` is not known here; there are {known}.", param=name[:40])
        if is_list(fields, name):
            values.setdefault(name, []).append(value)
        elif name in values:
            raise InvalidRequest(f"`{name}` is given more than once. Send it once.", param=name)
        else:
            values[name] = value
    return validated(fields, values)


def is_list(fields: type[BaseModel], name: str) -> bool:
    """Whether a parameter may be repeated."""
    return get_origin(fields.model_fields[name].annotation) is list


def key_id_of(spelled: str) -> str:
    """A key's public id, as people see it, with `sk-` before it, or without."""
    return spelled.removeprefix("sk-")
