"""How a checkpoint's answers are framed: chosen once from its template and its tokenizer.

Knows templates, tokenizers, and the tags of the family. Knows nothing of requests, grammars or HTTP.
"""

from collections.abc import Collection, Iterable, Sequence

from ernie_serve.text.content import END_OF_RESPONSE
from ernie_serve.text.stream import (
    END_OF_THINK,
    END_OF_TOOL_CALL,
    RESPONSE,
    TAGS,
    THINK,
    TOOL_CALL,
    AnswerStream,
    Start,
)
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer

_STARTS: dict[str, Start] = {THINK: "reasoning", RESPONSE: "response"}


class OutputFormat:
    """The frames that a checkpoint's chat answers come in."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self.thinks = template.thinks
        """Whether answers may hold reasoning."""
        self.framed = template.thinks or RESPONSE in template.source
        """Whether answers are in the family's newer form; the others are plain text, but for tool calls."""
        self.frames_words = RESPONSE in template.source
        """Whether `<response>` stands around an answer in words."""
        self._tokenizer = tokenizer
        ids = {tag: tokenizer.token_id(tag) for tag in TAGS}
        self._control_ids = {tag: i for tag, i in ids.items() if i is not None and i in tokenizer.control_ids}
        tags = set(self._control_ids.values())
        self.hidden_ids: frozenset[int] = frozenset(
            token_id
            for token_id in tokenizer.control_ids - tags
            if not any(True for _ in tokenizer.iter_bytes([token_id], skip_special_tokens=True))
        )
        """Special tokens that are no frame. With `skip_special_tokens`, drop these from an answer that is to be read
        by an `AnswerStream`, and detokenise the others with their spellings."""
        self.seen_ids = tuple(sorted(tokenizer.control_ids - self.hidden_ids))
        """The other control tokens."""
        self.end_of_think_id: int | None = self._control_ids.get(END_OF_THINK)
        """`</think>`, where it is one control token."""
        self.end_of_think_ids: tuple[int, ...] = tuple(tokenizer.encode(f"\n{END_OF_THINK}\n\n"))
        """What ends reasoning whose budget is spent, as the model would have written it."""
        self.begin_call_id: int | None = self._control_ids.get(TOOL_CALL)
        self.end_call_id: int | None = self._control_ids.get(END_OF_TOOL_CALL)
        """`<tool_call>` and `</tool_call>`, each where it is one control token."""
        self.begin_words_id: int | None = self._control_ids.get(RESPONSE)
        self.end_words_id: int | None = self._control_ids.get(END_OF_RESPONSE)
        """`<response>` and `</response>`, each where it is one control token."""

    def start(self, prompt_ids: Sequence[int], *, bound: bool = False) -> Start:
        """Where an answer to this prompt begins; `bound` tells that it is of a form of the client's, without frames.

        The last control token of the prompt says so (`<think>`, `</think>`, `<response>`, …): none can come from a
        client. Where the tags are no control tokens, the prompt's very end does.
        """
        start = self._start(prompt_ids) if self.framed else "text"
        return "text" if bound and start != "reasoning" else start

    def _start(self, prompt_ids: Sequence[int]) -> Start:
        tokenizer = self._tokenizer
        if END_OF_THINK in self._control_ids or RESPONSE in self._control_ids:
            last = next((i for i in reversed(prompt_ids) if i in tokenizer.control_ids), None)
            return _STARTS.get(tokenizer.token_text(last) if last is not None else "", "answer")
        end = tokenizer.decode(prompt_ids[-32:], skip_special_tokens=False).rstrip("\n")
        return next((start for tag, start in _STARTS.items() if end.endswith(tag)), "answer")

    def stream(
        self,
        prompt_ids: Sequence[int],
        *,
        tools: Collection[str] = (),
        max_calls: int | None = None,
        bound: bool = False,
    ) -> AnswerStream:
        """What reads an answer to this prompt. `tools` are the names that the request allows to be called."""
        start = self.start(prompt_ids, bound=bound)
        return AnswerStream(start, tools=tools, max_calls=max_calls, bound=bound)


class ReasoningTokens:
    """Counts the tokens of one answer's reasoning, its tags included, exactly and by token."""

    def __init__(self, tokenizer: Tokenizer, start: Start) -> None:
        self._tokenizer = tokenizer
        self._state = start
        self._text = b""
        self._num_waiting = 0
        self.num_tokens = 0
        """Tokens of reasoning so far."""

    def push(self, ids: Iterable[int]) -> None:
        """Count the next tokens of the answer."""
        for token_id in ids:
            if self._state == "reasoning":
                self._read_reasoning(token_id)
            elif self._state == "answer":
                self._read_opening(token_id)

    def _read_reasoning(self, token_id: int) -> None:
        self.num_tokens += 1
        end = END_OF_THINK.encode()
        text = self._text + self._tokenizer.token_bytes(token_id)
        self._text = text[1 - len(end) :]
        if end in text:
            self._state = "text"

    def _read_opening(self, token_id: int) -> None:
        """An answer that did not start with reasoning may open it, before anything else."""
        self._num_waiting += 1
        self._text = (self._text + self._tokenizer.token_bytes(token_id)).lstrip()
        think = THINK.encode()
        if self._text.startswith(think):
            self.num_tokens, self._text, self._state = self._num_waiting, self._text[len(think) :], "reasoning"
        elif not think.startswith(self._text):
            self._state = "text"
