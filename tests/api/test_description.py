"""The API's own description is whole, and nothing that it allows makes the server fail."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks
from starlette.routing import Route

from ernie_serve.api.app import create_app
from ernie_serve.api.description import OPERATIONS, Operation, describe

CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each.method} {each.path}")
def test_nothing_that_is_described_makes_the_server_fail(services: Any, operation: Operation) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(services))

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[operation.path][operation.method.upper()].as_strategy())
    def validate(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "ernie"
        case.call_and_validate(checks=CHECKS)

    validate()


def walk(routes: Any) -> list[Route]:
    found: list[Route] = []
    for route in routes:
        if isinstance(route, Route):
            found.append(route)
        elif hasattr(route, "original_router"):
            found += walk(route.original_router.routes)
    return found


def test_every_route_is_described(services: Any) -> None:
    routes = {
        (method, route.path.replace(":path", ""))
        for route in walk(create_app(services).routes)
        if route.include_in_schema  # which is nothing but a refusal otherwise
        for method in route.methods or ()
        if method != "HEAD"
    }
    assert {(each.method.upper(), each.path) for each in OPERATIONS} == routes - {("GET", "/openapi.json")}


def test_every_reference_leads_somewhere() -> None:
    described = describe()
    names = described["components"]["schemas"].keys()

    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for inner in value.values() for found in references(inner)]
        return [found for inner in value for found in references(inner)] if isinstance(value, list) else []

    found = references(described)
    assert found
    assert {reference.rpartition("/")[2] for reference in found} <= names


def test_description_is_served(call: Any) -> None:
    assert call("GET", "/openapi.json").json() == describe()
    assert call("HEAD", "/openapi.json").status_code == 200
