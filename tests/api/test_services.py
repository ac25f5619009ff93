from typing import Any

import pytest

from ernie_serve.errors import EngineUnavailable, ModelNotFound


def test_first_name_is_reported_and_all_are_accepted(make_services: Any) -> None:
    services = make_services(model_names=("first", "second"))
    assert services.model_name == "first"
    services.require_model("first")
    services.require_model("second")
    with pytest.raises(ModelNotFound, match=r"`third` is not served here\. Ask for `first`, `second`") as raised:
        services.require_model("third")
    assert raised.value.param == "model"


@pytest.mark.parametrize(("limit", "expected"), [(None, 256), (100, 100), (1000, 256)])
def test_longest_answer_is_bounded_by_the_limit_and_the_context(
    make_services: Any, limit: int | None, expected: int
) -> None:
    assert make_services(max_output_tokens=limit).max_answer_tokens == expected


def test_engine_must_be_ready(services: Any, engine: Any) -> None:
    services.require_ready()
    for state in ("loading", "failed", "closed"):
        engine.state = state
        with pytest.raises(EngineUnavailable) as raised:
            services.require_ready()
        assert raised.value.retry_after_seconds
