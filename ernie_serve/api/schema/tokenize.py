"""The fields of /tokenize and /detokenize, as vLLM spells them.

Knows types. Knows nothing of tokenizers.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ernie_serve.api.schema.accepted import Boolean, Integer, Text
from ernie_serve.api.schema.chat import ConversationFields
from ernie_serve.api.schema.fields import documented
from ernie_serve.api.schema.messages import MESSAGES
from ernie_serve.errors import InvalidRequest


class TokenizeRequest(ConversationFields):
    """A text, or a conversation, to be counted. No token is ever added around either."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[Any, documented(MESSAGES)] = None
    add_special_tokens: Boolean | None = None
    return_token_strs: Boolean | None = None

    def require_supported(self) -> None:
        """Raise `InvalidRequest` unless there is one thing to tokenise."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Send either `prompt` or `messages`.", param="prompt")
        self.require_one_ending()


class DetokenizeRequest(BaseModel):
    """Token ids whose text is wanted."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Text | None = None
    tokens: Annotated[list[Annotated[Integer, Field(ge=0)]], Field(fail_fast=True)]
