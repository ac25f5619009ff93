"""Tells reasoning, content and tool calls apart in an answer that arrives bit by bit.

Knows the tags that ERNIE's newer chat form frames an answer with. Knows nothing of tokens, engines or HTTP. The text
comes with the spellings of these tags visible; every other control token is already gone.

    start "reasoning"                     what the template's turn looks like:  REASONING\\n</think>\\n\\n
        │ </think>                                                              <response>\\nANSWER\\n</response>\\n
        v            <response>                                                 \\n<tool_call>\\n{…}\\n</tool_call>\\n
    start "answer" ─────────────> start "response"
        │   ^                        │  ^
        v   │ </tool_call>           v  │
        a call                      a call

What is framing, and what is not:

- `</think>` ends the reasoning wherever it stands; the one newline before it is framing, and so are all behind it.
  In an answer that did not start with reasoning, `<think>` opens one only if nothing stands before it.
- `<response>` is a frame only where nothing but framing and white space stands before it, with one newline behind it.
- `</response>`, and one newline before it, end that frame if white space, tool calls or nothing follows. If more
  text follows, the tag was part of the answer. What was between frames is never lost: an answer without
  `<response>` is content just so.
- `<tool_call>` is a call only at the very start of a line (or behind another frame), and only if a JSON object
  follows that names one of the request's tools and has an object as its arguments: see `call_reader.py`. White space
  around a call is framing. Anything else, calls of unknown tools included, comes back as content, word for word. A
  call that the answer's end cuts off before anything of it was sent is not told.
- A call of which something was sent stays a call. Text that then breaks its JSON ends it there, and is content; a
  `</tool_call>` or a brace that is missing behind whole arguments is forgiven.
- Tags inside reasoning, other than `</think>`, are reasoning.
- An answer that a grammar of the client's binds has no frames: behind `</think>`, where it started with reasoning, all
  but calls is content, word for word.

Held back is only what may still become framing: white space, the beginning of a tag, and a call until its tool is
known and its arguments begin. Every character is read once, so the time is linear in the text, however it is cut.
"""

import re
import secrets
import string
from collections.abc import Callable, Collection
from typing import Literal

from ernie_serve.text.call_reader import CallReader
from ernie_serve.text.content import END_OF_RESPONSE, SPACE, Content
from ernie_serve.text.events import CallArguments, CallBegin, Event, ReasoningDelta, merged

THINK, END_OF_THINK = "<think>", "</think>"
RESPONSE = "<response>"
TOOL_CALL, END_OF_TOOL_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_OF_THINK, RESPONSE, END_OF_RESPONSE, TOOL_CALL, END_OF_TOOL_CALL)

Start = Literal["reasoning", "answer", "response", "text"]
"""Where an answer begins: inside reasoning; before its frame; inside `<response>`; or in a text that has no frames."""

_State = Literal["reasoning", "answer", "call", "call end", "done"]

_TAG = re.compile("|".join(TAGS))
_LETTERS = string.ascii_letters + string.digits


def new_call_id() -> str:
    """A random id for a tool call, of OpenAI's form: `call_` and 24 letters or digits."""
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(24))


class AnswerStream:
    """One answer: text in, events out. All events together tell the same message, however the text was cut."""

    def __init__(
        self,
        start: Start,
        *,
        tools: Collection[str] = (),
        max_calls: int | None = None,
        bound: bool = False,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """`tools` are the names that may be called. After `max_calls` calls nothing more is told.

        `bound` tells that a grammar binds what is no reasoning; such an answer starts with "reasoning" or "text".
        """
        self._tools = frozenset(tools)
        self.max_calls = max_calls
        self._new_id = new_id
        self._framed = start != "text" and not bound
        self._may_think = start == "answer"
        self._events: list[Event] = []
        self._content = Content(self._events, framed=self._framed, in_response=start == "response")
        self._call = CallReader(())
        self._call_text: list[str] = []
        self._num_calls = 0
        self._num_whole = 0
        self._tail = ""
        self._skip_newline = False
        self._state: _State = "reasoning" if start == "reasoning" else "answer"

    @property
    def has_called(self) -> bool:
        """Whether tools were called, and every call that has begun is whole."""
        return 0 < self._num_calls == self._num_whole

    @property
    def done(self) -> bool:
        """Whether the last call that is wanted is whole: nothing more is told, so nothing more need be generated."""
        return self._state == "done"

    def push(self, text: str) -> list[Event]:
        """What is certain now."""
        text = self._tail + text
        self._tail = ""
        at = 0
        while at < len(text):
            if self._skip_newline:
                self._skip_newline = False
                at += text.startswith("\n", at)
                continue
            match self._state:
                case "reasoning":
                    at = self._read_reasoning(text, at)
                case "answer":
                    at = self._read_answer(text, at)
                case "call":
                    at = self._read_call(text, at)
                case "call end":
                    at = self._read_call_end(text, at)
                case "done":
                    at = len(text)
        return self._take()

    def flush(self) -> list[Event]:
        """What was held back and is no framing. Nothing is pushed after it. A call that is cut off before its
        arguments begin is not told.
        """
        if self._state == "reasoning":
            self._tell_reasoning(self._tail)
        elif self._state == "answer":
            self._content.add(self._tail)
        if self._state == "answer":
            self._content.flush()
        self._tail = ""
        return self._take()

    def _read_reasoning(self, text: str, at: int) -> int:
        end = text.find(END_OF_THINK, at)
        if end < 0:
            cut = _before_partial(text, at, END_OF_THINK)
            cut -= cut > at and text[cut - 1] == "\n"
            self._tell_reasoning(text[at:cut])
            return self._keep(text, cut)
        self._tell_reasoning(text[at:end].removesuffix("\n"))
        if self._framed:
            self._content.end_frame()
        self._may_think = False
        self._state = "answer"
        return end + len(END_OF_THINK)

    def _read_answer(self, text: str, at: int) -> int:
        if self._content.is_free and not self._tools:
            self._content.add_verbatim(text[at:])
            return len(text)
        found = _TAG.search(text, at)
        place = found.start() if found else _before_partial(text, at, *TAGS)
        if place > at:
            self._content.add(text[at:place])
            return place
        for tag in self._possible_tags():
            if text.startswith(tag, at):
                self._enter(tag)
                return at + len(tag)
            if tag.startswith(text[at : at + len(tag)]):
                return self._keep(text, at)
        if self._content.closing:  # with `</response>` read as text, the same tag may be a frame after all
            self._content.reopen_response()
            return at
        self._content.add("<")
        return at + 1

    def _possible_tags(self) -> list[str]:
        """The tags that would be framing here."""
        content = self._content
        tags = [TOOL_CALL] if self._tools and content.line_start else []
        if content.in_response and not content.closing:
            tags.append(END_OF_RESPONSE)
        elif content.behind_frame and self._framed:
            tags.append(RESPONSE)
            if self._may_think:
                tags.append(THINK)
        return tags

    def _enter(self, tag: str) -> None:
        if tag == THINK:
            self._state, self._skip_newline = "reasoning", True
        elif tag == RESPONSE:
            self._content.open_response()
            self._skip_newline = True
        elif tag == END_OF_RESPONSE:
            self._content.close_response()
        else:
            self._content.open_call()
            self._call, self._call_text = CallReader(self._tools), [TOOL_CALL]
            self._state = "call"
        self._may_think = False

    def _read_call(self, text: str, at: int) -> int:
        call = self._call
        was_whole = call.complete
        end = call.feed(text, at)
        self._num_whole += call.complete and not was_whole
        if not call.begun:
            self._call_text.append(text[at:end])
            if call.failed:
                self._give_call_back()
            return end
        if self._call_text:
            self._call_text.clear()
            self._content.end_frame()
            self._events.append(CallBegin(self._num_calls, self._new_id(), call.name))
            self._num_calls += 1
        if arguments := call.take():
            self._events.append(CallArguments(self._num_calls - 1, arguments))
        if self._num_calls == self.max_calls and (call.complete or call.failed):
            self._state = "done"
        elif call.failed or call.closed:
            self._state = "call end"
        return end

    def _give_call_back(self) -> None:
        """It was no call after all."""
        self._state = "answer"
        self._content.add("".join(self._call_text))

    def _read_call_end(self, text: str, at: int) -> int:
        if text[at] in SPACE:
            self._content.add(text[at])
            return at + 1
        if tag := text.startswith(END_OF_TOOL_CALL, at):
            self._content.end_frame()
        elif END_OF_TOOL_CALL.startswith(text[at : at + len(END_OF_TOOL_CALL)]):
            return self._keep(text, at)
        self._state = "answer"
        return at + tag * len(END_OF_TOOL_CALL)

    def _tell_reasoning(self, text: str) -> None:
        if text:
            self._events.append(ReasoningDelta(text))

    def _keep(self, text: str, at: int) -> int:
        """Keep the rest, shorter than a tag, until more is there."""
        self._tail = text[at:]
        return len(text)

    def _take(self) -> list[Event]:
        events = merged(self._events)
        self._events.clear()
        return events


def _before_partial(text: str, at: int, *tags: str) -> int:
    """Where the beginning of a tag stands at the end of a text that does not hold one whole; else the end."""
    angle = text.rfind("<", max(at, len(text) - max(map(len, tags)) + 1))
    return angle if angle >= 0 and any(tag.startswith(text[angle:]) for tag in tags) else len(text)
