"""A web page can point its name at this machine; a server without keys does not answer to that name."""

from typing import Any

import pytest

from ernie_serve.api.own_names import is_own

OWN = [
    *("localhost", "localhost:8000", "LocalHost", "localhost.", "ernie.localhost:8000"),
    *("127.0.0.1", "127.0.0.1:8000", "127.0.0.1.", "192.168.1.7:8000", "203.0.113.9"),
    *("[::1]", "[::1]:8000", "[2001:db8::1]:80", "[fe80::1%eth0]:80"),
    *("host.docker.internal:8000", "host.containers.internal", ""),
]
OTHERS = [
    *("evil.example", "evil.example:8000", "EVIL.example.", "localhost.evil.example", "127.0.0.1.evil.example"),
    *(
        "notlocalhost",
        "localhost.x",
        "1.2.3.4.5",
        "ernie",
        "ernie.lan",
        "[evil.example]:80",
        "[",
        "::1",
        "a:b:c",
        ":8000",
    ),
    *("evil.internal", "internal", "a.host.docker.internal", "vm.evil"),
    *("127.0.0.1@evil.example", "evil.example/localhost", "evil.example,localhost", "evil.example localhost", "\xff"),
]


@pytest.mark.parametrize("host", OWN)
def test_addresses_and_reserved_names_are_own(host: str) -> None:
    assert is_own(host)


@pytest.mark.parametrize("host", OTHERS)
def test_every_other_name_may_be_a_pages(host: str) -> None:
    assert not is_own(host)


def test_the_name_that_it_listens_on_is_own(call_with: Any) -> None:
    assert call_with(own_name="Vm")("GET", "/v1/models", headers={"host": "vm:8000"}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/nothing"])
def test_a_request_to_a_name_that_a_page_may_have_is_refused_with_the_remedy(call_with: Any, path: str) -> None:
    headers = {"host": "evil.example:8000", "origin": "http://evil.example:8000"}
    response = call_with(own_name="Vm")("GET", path, headers=headers)
    assert response.status_code == 403
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "host_not_served")
    for told in ("evil.example:8000", "--api-key", "--billing", "--allow-unauthenticated"):
        assert told in error["message"]


def test_nothing_is_asked_of_the_engine_for_a_page(call_with: Any, engine: Any) -> None:
    body = {"model": "ernie", "prompt": "Hi"}
    call = call_with(own_name="Vm")
    assert call("POST", "/v1/completions", json=body, headers={"host": "evil.example"}).status_code == 403
    assert not engine.requests
    assert call("POST", "/v1/completions", json=body, headers={"host": "localhost:8000"}).status_code == 200


def test_of_several_hosts_all_must_be_own(call_with: Any) -> None:
    call = call_with(own_name="Vm")
    assert call("GET", "/v1/models", headers=[("host", "localhost"), ("host", "localhost")]).status_code == 200
    for hosts in (("localhost", "evil.example"), ("evil.example", "localhost")):
        assert call("GET", "/v1/models", headers=[("host", each) for each in hosts]).status_code == 403


def test_where_keys_are_asked_for_every_name_is_answered(call: Any) -> None:
    assert call("GET", "/v1/models", headers={"host": "llm.example.com"}).status_code == 200
