"""Whatever a client sends, it gets an answer or an error that is its own."""

import json
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie_serve.api import chat, completions
from ernie_serve.api.answer import INLINE_BYTES
from ernie_serve.api.schema.chat import ChatRequest
from ernie_serve.api.schema.completion import CompletionRequest
from ernie_serve.api.schema.validation import REFUSED
from ernie_serve.errors import RequestError

NAMES = sorted(CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys() | REFUSED.keys())
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([0, 1, -1, 0.5, "user", "system", "text", "ernie"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(st.sampled_from(["role", "content", "type", "text", "1"]), st.text(max_size=3)), inner
        ),
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("prepare", [completions.prepare, chat.prepare])
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(fields=st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4))
def test_no_body_breaks_the_door(services: Any, prepare: Any, fields: dict[str, Any]) -> None:
    base = {"model": "ernie", "prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}
    try:
        job, _ = prepare(services, {**base, **fields})
    except RequestError as error:
        told = error.message
    else:
        told = job.id
    assert told


@pytest.mark.parametrize("extra", [0, 1])
def test_large_bodies_are_prepared_beside_the_event_loop(
    call: Any, services: Any, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    seen: list[bool] = []
    encode = services.tokenizer.encode

    def watched(text: str) -> Any:
        seen.append(threading.current_thread() is threading.main_thread())
        return encode(text)

    monkeypatch.setattr(services.tokenizer, "encode", watched)
    body = json.dumps({"model": "ernie", "prompt": "a", "user": ""})
    body = body[:-2] + "u" * (INLINE_BYTES + extra - len(body)) + body[-2:]
    response = call("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 200
    assert seen == [extra == 0]


def test_canary_is_in_no_log(complete: Any, engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    prompt = "canary in the prompt"
    assert complete(prompt=prompt, user="canary", unheard_of="canary", stop="canary").status_code == 200
    assert complete(prompt=prompt, temperature="canary").status_code == 400
    assert complete(prompt=prompt, model="canary").status_code == 404
    engine.break_after, engine.breakage = 2, RuntimeError(prompt)
    assert complete(prompt=prompt).status_code == 500
    assert complete(prompt=prompt, stream=True).status_code == 200
    assert caplog.text
    assert "canary" not in caplog.text
