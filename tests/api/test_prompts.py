from typing import Any, cast

import pytest

from ernie_serve.api.prompts import continued
from ernie_serve.errors import InvalidRequest

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am "}]


def test_prompt_ends_where_the_last_message_ends(services: Any) -> None:
    ids = continued(services.tokenizer, services.template, CHAT, None, {})
    assert bytes(ids) == b"user: Hi\nassistant: I am "


def test_text_that_is_continued_may_be_empty_or_hold_the_mark(services: Any) -> None:
    for content, expected in (("", ""), ("\U000f5a5a", "\ufffd")):
        ids = continued(services.tokenizer, services.template, [{"role": "user", "content": content}], None, {})
        assert bytes(ids).decode() == f"user: {expected}"


def test_template_that_drops_the_text_is_told(services: Any) -> None:
    class Mute:
        def render(self, messages: Any, **variables: Any) -> list[int]:
            return [65]

    with pytest.raises(InvalidRequest, match="does not let its last message be continued"):
        continued(services.tokenizer, cast("Any", Mute()), CHAT, None, {})
