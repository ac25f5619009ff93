from typing import Any

import pytest

from ernie_serve.api.schema.chat import ChatRequest
from ernie_serve.errors import InvalidRequest


def request(**fields: Any) -> ChatRequest:
    return ChatRequest(model="m", messages=[], **fields)


def test_top_logprobs_need_logprobs() -> None:
    assert request(logprobs=True, top_logprobs=20).num_logprobs == 20
    assert request(logprobs=True).num_logprobs == 0
    assert request(logprobs=False).num_logprobs is None
    for logprobs in (None, False):
        with pytest.raises(InvalidRequest, match="`top_logprobs` needs `logprobs`"):
            request(logprobs=logprobs, top_logprobs=1).require_supported()
        request(logprobs=logprobs, top_logprobs=0).require_supported()


def test_two_lengths_must_agree() -> None:
    assert request(max_tokens=5).wanted_tokens == ("max_tokens", 5)
    assert request(max_completion_tokens=0).wanted_tokens == ("max_completion_tokens", 0)
    request(max_tokens=5, max_completion_tokens=5).require_supported()
    with pytest.raises(InvalidRequest, match="different things"):
        request(max_tokens=5, max_completion_tokens=6).require_supported()


def test_echo_is_for_completions() -> None:
    request(echo=False).require_supported()
    with pytest.raises(InvalidRequest, match="`echo`"):
        request(echo=True).require_supported()


def test_template_is_told_what_clients_may_say() -> None:
    assert request().template_variables == {}
    told = request(reasoning_effort="low").template_variables
    assert told == {"reasoning_effort": "low", "enable_thinking": True, "thinking": True}
    told = request(reasoning_effort="none", chat_template_kwargs={"thinking": True}).template_variables
    assert told == {"reasoning_effort": "none", "enable_thinking": False, "thinking": True}
    for kwargs in ({"messages": []}, {"add_generation_prompt": True}, {"thinking": {}}, []):
        with pytest.raises(InvalidRequest) as raised:
            _ = request(chat_template_kwargs=kwargs).template_variables
        assert raised.value.param == "chat_template_kwargs"


def test_prompt_has_one_ending() -> None:
    request(continue_final_message=True).require_supported()
    request(continue_final_message=True, add_generation_prompt=False).require_supported()
    with pytest.raises(InvalidRequest, match="exclude each other"):
        request(continue_final_message=True, add_generation_prompt=True).require_supported()
