"""From a conversation to the token ids of its prompt.

Knows how a prompt ends: with the beginning of a new turn, or in the middle of the last one. Knows no endpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ernie_serve.api.schema.chat import ConversationFields
from ernie_serve.api.schema.tools import ToolUse
from ernie_serve.api.services import Services
from ernie_serve.errors import InvalidRequest
from ernie_serve.text.template import ChatTemplate, Variable
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.text.tools import prepare

_END = "\U000f5a5a"
"""A private character, written behind the text that is to be continued, and never part of a longer token."""


def chat_prompt(
    services: Services, messages: Sequence[dict[str, Any]], use: ToolUse, fields: ConversationFields
) -> list[int]:
    """The prompt of a conversation. Raises `InvalidRequest` where it cannot be made, or holds nothing."""
    template = require_template(services)
    variables = fields.template_variables
    messages, tools = prepare(messages, use.tools, template, tool_choice=use.told)
    if fields.continue_final_message:
        ids = continued(services.tokenizer, template, messages, tools, variables)
    else:
        begin = fields.add_generation_prompt is not False
        ids = template.render(messages, tools=tools, add_generation_prompt=begin, variables=variables)
    if not ids:
        raise InvalidRequest("`messages` hold no text. Say something in one of them.", param="messages")
    return ids


def require_template(services: Services) -> ChatTemplate:
    """The chat template. Raises `InvalidRequest` for a checkpoint that only continues texts."""
    if services.template is None:
        told = f"`{services.model_name}` has no chat template: it continues texts. Send the text to /v1/completions."
        raise InvalidRequest(told, param="messages")
    return services.template


def continued(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[dict[str, Any]] | None,
    variables: Mapping[str, Variable],
) -> list[int]:
    """A prompt that ends where the last message's text ends, so that the answer goes on with it.

    The template writes the message whole, a private character behind its text; the ids before that character are the
    prompt. Raises `InvalidRequest` where the template does not write the text as it stands.
    """
    *others, last = messages
    marked = [*others, {**last, "content": last["content"].replace(_END, "\ufffd") + _END}]
    ids = template.render(marked, tools=tools, add_generation_prompt=False, variables=variables)
    end = _END.encode()
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    place = b"".join(pieces).rfind(end)
    for at, piece in enumerate(pieces):
        if place == 0:
            return ids[:at]
        place -= len(piece)
        if place < 0:
            break
    told = "`continue_final_message`: this model's chat template does not let its last message be continued."
    raise InvalidRequest(told, param="continue_final_message")
