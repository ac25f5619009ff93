from typing import Any

import pytest


def test_every_name_is_listed_the_reported_one_first(call: Any) -> None:
    body = call("GET", "/v1/models").json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["baidu/ernie", "ernie"]


@pytest.mark.parametrize("name", ["baidu/ernie", "ernie"])
def test_model_is_found_under_each_name(call: Any, name: str) -> None:
    assert call("GET", f"/v1/models/{name}").json() == {
        "id": name,
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "ernie-serve",
        "max_model_len": 256,
    }


@pytest.mark.parametrize("name", ["baidu", "ERNIE", "ernie%00", "..%2fernie", "ernie/../ernie2", "x" * 1000])
def test_other_names_are_not_found(call: Any, name: str) -> None:
    response = call("GET", f"/v1/models/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert "`baidu/ernie`, `ernie`" in response.json()["error"]["message"]
    assert len(response.text) < 500
