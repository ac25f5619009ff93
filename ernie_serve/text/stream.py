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
  around a call is framing. Anything else, calls of unknown tools included, comes back as content, word for word. So
  does a call that is cut off before anything of it was sent.
- A call of which something was sent stays a call. Text that then breaks its JSON ends it there, without a `CallEnd`,
  and is content; a `</tool_call>` or a brace that is missing behind whole arguments is forgiven.
- Tags inside reasoning, other than `</think>`, are reasoning.

Held back is only what may still become framing: white space, the beginning of a tag, and a call until its tool is
known and its arguments begin. Every character is read once, so the time is linear in the text, however it is cut.
"""

import re
import secrets
import string
from collections.abc import Callable, Collection
from typing import Literal

from ernie_serve.text.call_reader import CallReader
from ernie_serve.text.events import CallArguments, CallBegin, CallEnd, ContentDelta, Event, ReasoningDelta, merged

THINK, END_OF_THINK = "<think>", "</think>"
RESPONSE, END_OF_RESPONSE = "<response>", "</response>"
TOOL_CALL, END_OF_TOOL_CALL = "<tool_call>", "</tool_call>"
TAGS = (THINK, END_OF_THINK, RESPONSE, END_OF_RESPONSE, TOOL_CALL, END_OF_TOOL_CALL)

Start = Literal["reasoning", "answer", "response", "text"]
"""Where an answer begins: inside reasoning; before its frame; inside `<response>`; or in a text that has no frames."""

_TAG = re.compile("|".join(TAGS))
_SPACE = " \t\r\n"
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
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """`tools` are the names that may be called. After `max_calls` whole calls nothing more is told."""
        self._tools = frozenset(tools)
        self._max_calls = max_calls
        self._new_id = new_id
        self._events: list[Event] = []
        self._tail = ""
        self._state: Literal["reasoning", "answer", "call", "call end", "done"] = (
            "reasoning" if start == "reasoning" else "answer"
        )
        self._framed = start != "text"
        self._may_think = start == "answer"
        self._in_response = start == "response"
        self._skip_newline = False
        # Of the answer: white space held back, or `</response>` and the white space around it.
        self._held: list[str] = []
        self._after_frame = start == "answer"
        self._closed = False
        self._line_start = True
        self._has_content = False
        # Of the call that is being read.
        self._call = CallReader(())
        self._call_text: list[str] = []
        self._num_calls = 0

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._state == "reasoning"

    @property
    def num_calls(self) -> int:
        """Tool calls begun so far."""
        return self._num_calls

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
        """What was held back and is no framing. Nothing is pushed after it."""
        tail, self._tail = self._tail, ""
        if self._state == "reasoning":
            self._tell(ReasoningDelta(tail))
        elif self._state == "answer":
            if tail:
                self._add(tail)
        elif self._state == "call" and not self._call.begun:
            self._give_call_back()
        if self._state == "answer" and not (self._after_frame or self._closed):
            self._release()
        return self._take()

    # Reasoning.

    def _read_reasoning(self, text: str, at: int) -> int:
        end = text.find(END_OF_THINK, at)
        if end < 0:
            cut = _before_partial(text, at, END_OF_THINK)
            cut -= cut > at and text[cut - 1] == "\n"
            self._tell(ReasoningDelta(text[at:cut]))
            return self._keep(text, cut)
        self._tell(ReasoningDelta(text[at:end].removesuffix("\n") if end > at else ""))
        self._enter_answer()
        return end + len(END_OF_THINK)

    # The answer.

    def _read_answer(self, text: str, at: int) -> int:
        if not (self._tools or self._in_response or self._after_frame or self._closed):
            self._tell_content(text[at:])
            return len(text)
        found = _TAG.search(text, at)
        place = found.start() if found else _before_partial(text, at, *TAGS)
        if place > at:
            self._add(text[at:place])
            return place
        for tag in self._possible_tags():
            if text.startswith(tag, at):
                self._enter(tag)
                return at + len(tag)
            if len(text) - at < len(tag) and tag.startswith(text[at:]):
                return self._keep(text, at)
        if self._closed:
            self._reopen_response()
            return at
        self._add("<")
        return at + 1

    def _possible_tags(self) -> list[str]:
        """The tags that would be framing here."""
        tags = []
        if self._tools and self._line_start:
            tags.append(TOOL_CALL)
        if self._closed:
            return tags
        if self._in_response:
            tags.append(END_OF_RESPONSE)
        elif self._after_frame and self._framed:
            tags.append(RESPONSE)
        if self._may_think:
            tags.append(THINK)
        return tags

    def _enter(self, tag: str) -> None:
        self._may_think = False
        if tag == THINK:
            self._held.clear()
            self._state, self._skip_newline = "reasoning", True
        elif tag == RESPONSE:
            self._held.clear()
            self._after_frame, self._in_response, self._line_start = False, True, True
            self._skip_newline = True
        elif tag == END_OF_RESPONSE:
            self._close_response()
        else:
            self._open_call()

    def _enter_answer(self) -> None:
        """Behind a frame, outside of any."""
        self._state = "answer"
        self._after_frame = self._line_start = True

    def _close_response(self) -> None:
        """Perhaps the end of the frame: held back until it is known what follows."""
        space = "" if self._after_frame else "".join(self._held)
        before = space.removesuffix("\n")
        self._tell_content(before)
        self._held = [space[len(before) :] + END_OF_RESPONSE]
        self._closed = self._line_start = True
        self._after_frame = False

    def _reopen_response(self) -> None:
        """More text follows: the tag was part of it."""
        tag, *self._held = self._held
        self._tell_content(tag)
        self._closed = False
        self._line_start = self._held[-1].endswith("\n") if self._held else False

    def _add(self, text: str) -> None:
        """Text that is no framing. White space at its end is held back: it may belong to a frame that follows."""
        body = text.rstrip(_SPACE)
        if not body:
            self._held.append(text)
            if not (self._after_frame or self._closed):
                self._line_start = text.endswith("\n")
            return
        words = body.lstrip(_SPACE)
        if len(words) < len(body):
            self._held.append(body[: len(body) - len(words)])
        if self._closed:
            self._reopen_response()
        self._release()
        self._tell_content(words)
        if len(body) < len(text):
            self._held.append(text[len(body) :])
        self._after_frame = self._may_think = False
        self._line_start = text.endswith("\n")

    def _release(self) -> None:
        """Tell the white space that was held back, without the line breaks of a frame at the beginning."""
        space = "".join(self._held)
        self._held.clear()
        self._tell_content(space.lstrip("\n") if self._after_frame and not self._has_content else space)

    # Calls.

    def _open_call(self) -> None:
        if self._closed:
            del self._held[0]
            self._closed = self._in_response = False
            self._after_frame = True
        self._call = CallReader(self._tools)
        self._call_text = [TOOL_CALL]
        self._state = "call"

    def _read_call(self, text: str, at: int) -> int:
        call = self._call
        end = call.feed(text, at)
        if not call.begun:
            self._call_text.append(text[at:end])
            if call.failed:
                self._give_call_back()
            return end
        if self._call_text:
            self._call_text.clear()
            self._held.clear()
            self._tell(CallBegin(self._num_calls, self._new_id(), call.name))
            self._num_calls += 1
        index = self._num_calls - 1
        if arguments := call.take():
            self._tell(CallArguments(index, arguments))
            if call.complete:
                self._tell(CallEnd(index))
        if self._num_calls == self._max_calls and (call.complete or call.failed):
            self._state = "done"
        elif call.failed or call.closed:
            self._state = "call end"
        return end

    def _give_call_back(self) -> None:
        """It was no call after all."""
        self._state = "answer"
        self._add("".join(self._call_text))

    def _read_call_end(self, text: str, at: int) -> int:
        if text[at] in _SPACE:
            self._held.append(text[at])
            return at + 1
        if text.startswith(END_OF_TOOL_CALL, at):
            self._held.clear()
            self._enter_answer()
            return at + len(END_OF_TOOL_CALL)
        if len(text) - at < len(END_OF_TOOL_CALL) and END_OF_TOOL_CALL.startswith(text[at:]):
            return self._keep(text, at)
        self._enter_answer()
        return at

    # Telling.

    def _tell_content(self, text: str) -> None:
        self._has_content = self._has_content or bool(text)
        self._tell(ContentDelta(text))

    def _tell(self, event: Event) -> None:
        if isinstance(event, CallBegin | CallEnd) or event.text:
            self._events.append(event)

    def _keep(self, text: str, at: int) -> int:
        """Keep the rest, shorter than a tag, until more is there."""
        self._tail = text[at:]
        return len(text)

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return merged(events)


def _before_partial(text: str, at: int, *tags: str) -> int:
    """Where the beginning of a tag stands at the end of a text that does not hold one whole; else the end."""
    angle = text.rfind("<", max(at, len(text) - max(map(len, tags)) + 1))
    return angle if angle >= 0 and any(tag.startswith(text[angle:]) for tag in tags) else len(text)
