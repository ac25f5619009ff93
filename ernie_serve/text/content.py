"""The content of an answer, with the white space and the `<response>` frame around it taken off.

Knows where a frame may stand. Knows nothing of reasoning, of what a call says, or of tokens.

White space is held back, because it is framing if a frame follows. So is `</response>`, with one newline before it:
it ends its frame if nothing or a tool call follows; if text follows, it was part of the answer.

    words ··· <tool_call>              the white space is dropped
    </tool_call> ··· words             kept, but for the line breaks at the very beginning of a framed answer
    words ··· \\n</response> ··· words   all of it was content
"""

from ernie_serve.text.events import ContentDelta, Event

SPACE = " \t\r\n"
END_OF_RESPONSE = "</response>"


class Content:
    """Text in, content out: appended to `events`. However the text is cut, the same content is told."""

    def __init__(self, events: list[Event], *, framed: bool, in_response: bool) -> None:
        self._events = events
        self._held: list[str] = []
        self._has_content = False
        self.behind_frame = framed and not in_response
        """Whether nothing but white space came since a frame, or since the beginning of a framed answer."""
        self.in_response = in_response
        """Whether `<response>` is open, or held as closed."""
        self.closing = False
        """Whether `</response>` is held back."""
        self.line_start = True
        """Whether a tool call could begin here: behind a line break, or behind a frame and white space."""

    @property
    def is_free(self) -> bool:
        """Whether no frame but a tool call can follow."""
        return not (self.behind_frame or self.in_response)

    def add(self, text: str) -> None:
        """Text that is no frame."""
        body = text.rstrip(SPACE)
        if not body:
            self._held.append(text)
            if not (self.behind_frame or self.closing):
                self.line_start = text.endswith("\n")
            return
        words = body.lstrip(SPACE)
        if len(words) < len(body):
            self._held.append(body[: len(body) - len(words)])
        self.reopen_response()
        self._release()
        self._tell(words)
        if len(body) < len(text):
            self._held.append(text[len(body) :])
        self.behind_frame = False
        self.line_start = text.endswith("\n")

    def add_verbatim(self, text: str) -> None:
        """Text that no frame can follow, so that nothing of it need be held back."""
        self._release()
        self._tell(text)

    def end_frame(self) -> None:
        """A frame ended here: the white space before it is framing, and so is what follows."""
        self._held.clear()
        self.behind_frame = self.line_start = True

    def open_response(self) -> None:
        """`<response>` stands here."""
        self._held.clear()
        self.in_response = self.line_start = True
        self.behind_frame = False

    def close_response(self) -> None:
        """`</response>` stands here: perhaps the end of the frame."""
        space = "" if self.behind_frame else "".join(self._held)
        before = space.removesuffix("\n")
        self._tell(before)
        self._held = [space[len(before) :] + END_OF_RESPONSE]
        self.closing = self.line_start = True
        self.behind_frame = False

    def reopen_response(self) -> None:
        """The `</response>` that was held back, if one was, is content: something follows it that is no frame."""
        if not self.closing:
            return
        tag, *self._held = self._held
        self._tell(tag)
        self.closing = False
        self.line_start = bool(self._held) and self._held[-1].endswith("\n")

    def open_call(self) -> None:
        """A tool call may stand here: a `</response>` before it ended its frame. White space stays held back."""
        if self.closing:
            del self._held[0]
            self.closing = self.in_response = False
            self.behind_frame = True

    def flush(self) -> None:
        """The answer ends here."""
        if not (self.behind_frame or self.closing):
            self._release()
        self._held.clear()

    def _release(self) -> None:
        space = "".join(self._held)
        self._held.clear()
        self._tell(space.lstrip("\n") if self.behind_frame and not self._has_content else space)

    def _tell(self, text: str) -> None:
        if text:
            self._has_content = True
            self._events.append(ContentDelta(text))
