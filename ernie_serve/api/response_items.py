"""The items of a response as they grow, and the typed events that tell of it.

Knows reasoning, messages and calls of functions as items, one open at a time. Knows nothing of what stands around them.
"""

from collections.abc import Callable
from typing import Any

from ernie_serve.api.events import CallBegun, CallDelta, Event, ReasoningDelta, TextDelta

Fields = dict[str, Any]
RESPONSE = "resp_"
Typed = tuple[str, Fields]
"""An event: its type, and what it says."""


class ResponseItems:
    """The output of one response. `tell_logprobs` spells the log-probabilities of a text's tokens.

    An item's id tells whose response's it is: `response_of`.
    """

    def __init__(self, response_id: str, tell_logprobs: Callable[[TextDelta], list[Fields]]) -> None:
        self._response_id = response_id
        self._unsaid: list[Fields] = []  # the log-probabilities of tokens whose text was held back
        self.output: list[Fields] = []
        """The items so far, the open one last."""
        self._tell_logprobs = tell_logprobs
        self._is_open = False

    def add(self, event: Event) -> list[Typed]:
        """What an event of the answer makes of the items; the tokens of a call are nothing that was said."""
        match event:
            case ReasoningDelta():
                told = self._open_if_not("reasoning", {"summary": [], "content": []})
                return [*told, *self._grow(event.text, "reasoning_text", {})]
            case TextDelta() if event.text or self._is_open_as("message"):
                return self.say(event)
            case TextDelta():
                if not self._is_open_as("function_call"):
                    self._unsaid += self._tell_logprobs(event)
            case CallBegun():
                self._unsaid = []
                call = {"call_id": event.id, "name": event.name, "arguments": ""}
                return [*self.close(), self._open("function_call", call)]
            case CallDelta():
                self.output[-1]["arguments"] += event.arguments
                return [("response.function_call_arguments.delta", {**self._place(), "delta": event.arguments})]
        return []

    def say(self, event: TextDelta) -> list[Typed]:
        """More of a message, which is begun where none is open."""
        logprobs, self._unsaid = [*self._unsaid, *self._tell_logprobs(event)], []
        told = self._open_if_not("message", {"role": "assistant", "content": []})
        return [*told, *self._grow(event.text, "output_text", {"logprobs": logprobs})]

    def close(self, status: str = "completed") -> list[Typed]:
        """The end of the open item, if one is open."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self.output[-1]
        item["status"] = status
        told: list[Typed] = []
        if item["type"] == "function_call":
            done = {**self._place(), "arguments": item["arguments"], "name": item["name"]}
            told.append(("response.function_call_arguments.done", done))
        elif item["content"]:
            (part,) = item["content"]
            place = {**self._place(), "content_index": 0}
            done = {**place, "text": part["text"]}
            if "logprobs" in part:
                done["logprobs"] = part["logprobs"]
            told.append((f"response.{part['type']}.done", done))
            told.append(("response.content_part.done", {**place, "part": part}))
        told.append(("response.output_item.done", {"output_index": len(self.output) - 1, "item": item}))
        return told

    def _open_if_not(self, kind: str, fields: Fields) -> list[Typed]:
        if self._is_open_as(kind):
            return []
        return [*self.close(), self._open(kind, fields)]

    def _is_open_as(self, kind: str) -> bool:
        return self._is_open and self.output[-1]["type"] == kind

    def _open(self, kind: str, fields: Fields) -> Typed:
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        own_id = f"{prefix}_{self._response_id.removeprefix(RESPONSE)}{len(self.output):04x}"
        item = {"id": own_id, "type": kind, "status": "in_progress", **fields}
        self.output.append(item)
        self._is_open = True
        return "response.output_item.added", {"output_index": len(self.output) - 1, "item": _copy(item)}

    def _grow(self, text: str, kind: str, more: Fields) -> list[Typed]:
        """More of the one part that a message or a reasoning has."""
        item, place, told = self.output[-1], {**self._place(), "content_index": 0}, []
        if not item["content"]:
            empty: Fields = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
            item["content"].append({"type": kind, "text": "", **empty})
            told.append(("response.content_part.added", {**place, "part": _copy(item["content"][0])}))
        part = item["content"][0]
        part["text"] += text
        if "logprobs" in more:
            part["logprobs"] += more["logprobs"]
        return [*told, (f"response.{kind}.delta", {**place, "delta": text, **more})]

    def _place(self) -> Fields:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}


def response_of(item_id: str) -> str:
    """The id of the response that an item with this id would be of."""
    return RESPONSE + item_id.partition("_")[2][:-4]


def _copy(fields: Fields) -> Fields:
    """A copy that later growth leaves alone."""
    return {name: list(value) if isinstance(value, list) else value for name, value in fields.items()}
