"""What form an answer takes: the grammar that binds it, the reasoning before it, and who reads it.

Knows how tools, response formats and reasoning come together in one answer. Knows no endpoint's fields and no grammar's
insides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ernie_serve.api.schema.tools import ToolUse
from ernie_serve.api.services import Services
from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.tools import Framing, tool_grammar
from ernie_serve.messages import Grammar
from ernie_serve.text.content import END_OF_RESPONSE
from ernie_serve.text.formats import OutputFormat
from ernie_serve.text.stream import RESPONSE, AnswerStream, Start

EFFORTS = {"none": 0, "minimal": 256, "low": 1024, "medium": 8192}
"""Tokens of reasoning that an effort allows; more effort has no bound of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The form of one request's answers. `constraints` are fields of the engine's sampling parameters.

    `grammar_param` names the field that a wrong grammar comes from. Special tokens in `hidden_ids` are left out of the
    text that `read` reads, all others are spelled.
    """

    constraints: dict[str, Any] = field(default_factory=dict)
    grammar_param: str = "response_format"
    read: Callable[[], AnswerStream] | None = None
    start: Start = "text"
    hidden_ids: frozenset[int] = frozenset()


def shape_text(grammar: Grammar | None, param: str) -> Shape:
    """The form of a text that is continued."""
    return Shape(constraints={} if grammar is None else {"grammar": grammar}, grammar_param=param)


def shape_chat(
    services: Services,
    prompt_ids: Sequence[int],
    use: ToolUse,
    grammar: Grammar | None,
    param: str,
    max_reasoning_tokens: int | None,
) -> Shape:
    """The form of an answer to this prompt. Raises `InvalidRequest` for what cannot go together."""
    form = services.format
    if form is None:
        return shape_text(grammar, param)
    otherwise = grammar if use.mode == "auto" else None
    frames_form = otherwise is not None and form.frames_words and form.start(prompt_ids) in ("reasoning", "answer")
    # to a form of the client's, which knows no frames
    bound = grammar is not None and use.mode != "required" and not frames_form
    start = form.start(prompt_ids, bound=bound)
    if use.mode != "none":
        grammar = _call_grammar(form, use, otherwise, frames_form=frames_form)
        param = "tools" if otherwise is None else param
    constraints: dict[str, Any] = {}
    if grammar is not None:
        constraints["grammar"] = grammar
        if start == "reasoning":
            constraints["grammar_after_token_id"] = _end_of_think(form, param)
    if max_reasoning_tokens is not None and start == "reasoning":
        constraints["max_reasoning_tokens"] = max_reasoning_tokens
        end_id, end_ids = _end_of_think(form, "max_reasoning_tokens"), form.end_of_think_ids
        constraints["reasoning_end_token_id"] = end_id
        # what is behind the tag would be content
        constraints["reasoning_end_forced_ids"] = end_ids[: end_ids.index(end_id) + 1] if bound else end_ids
    if start == "text" and not use.names:
        return Shape(constraints=constraints, grammar_param=param)
    max_calls = None if use.parallel else 1
    read = partial(form.stream, prompt_ids, tools=use.names, max_calls=max_calls, bound=bound)
    return Shape(constraints=constraints, grammar_param=param, read=read, start=start, hidden_ids=form.hidden_ids)


def _call_grammar(form: OutputFormat, use: ToolUse, otherwise: Grammar | None, *, frames_form: bool) -> Grammar:
    """What keeps calls well-formed, and makes them where they are required; else the answer is of its own form.

    `frames_form` where the model begins its words with a frame: without one a call would be all it can begin.
    """
    after = "\n" if form.framed else ""
    framing = Framing(begin_id=form.begin_call_id, end_id=form.end_call_id, seen_ids=form.seen_ids, after=after)
    return tool_grammar(
        use.tools,
        framing,
        mode="required" if use.mode == "required" else "auto",
        names=use.names,
        parallel=use.parallel,
        otherwise=otherwise,
        words=_word_framing(form) if frames_form else None,
    )


def _word_framing(form: OutputFormat) -> Framing:
    return Framing(begin=RESPONSE, end=END_OF_RESPONSE, begin_id=form.begin_words_id, end_id=form.end_words_id)


def _end_of_think(form: OutputFormat, param: str) -> int:
    if form.end_of_think_id is None:
        told = f"`{param}` cannot be kept: this checkpoint has no token that ends its reasoning. Leave it out."
        raise InvalidRequest(told, param=param)
    return form.end_of_think_id


def reasoning_budget(wanted: int | None, variables: dict[str, Any]) -> int | None:
    """Tokens of reasoning: what was asked for, or what an effort or a switch says; `None` for no bound."""
    if wanted is not None:
        return wanted
    if variables.get("enable_thinking") is False or variables.get("thinking") is False:
        return 0
    return EFFORTS.get(str(variables.get("reasoning_effort")))
