"""Reads the JSON object of one tool call as it is made: the name, and the arguments as text.

Knows `{"name": …, "arguments": {…}}` and the tools' names. Knows nothing of the tags around it, nor of HTTP.

    {"name": "get_weather", "arguments": {"city": "北京"}}
                                         ^              ^
                                         begun          complete; what follows changes nothing

The keys may come in either order; arguments that come first wait for the name. Other keys are read past. An object
without `arguments` calls the tool with `{}`.
"""

import json
from collections.abc import Collection

from ernie_serve.text.json_scanner import JsonScanner


class CallReader:
    """One call. It is `begun` once its tool is known and its arguments are an object; only then is anything sent.

    It has `failed` when its text is no JSON, names no known tool, has arguments that are no object, or repeats a key.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._scanner = JsonScanner()
        self._seen: set[str] = set()
        self._field = ""
        self._string: list[str] = []
        self._arguments: list[str] = []
        self._has_arguments = False
        self.name = ""
        self.failed = False
        self.begun = False

    @property
    def complete(self) -> bool:
        """Whether the call's name and arguments are whole."""
        return self.begun and self._has_arguments

    @property
    def closed(self) -> bool:
        """Whether the whole object has been read."""
        return self._scanner.done

    def feed(self, text: str, at: int) -> int:
        """Read on from `at` to the end of the text or of the object, or to what does not belong; return where."""
        scanner = self._scanner
        while at < len(text) and not self.failed and not scanner.done:
            if self._field == "arguments" and scanner.depth > 1:
                at = self._feed_arguments(text, at)
                continue
            state, depth = scanner.state, scanner.depth
            end = scanner.step(text, at)
            if end == at:
                self.failed = True
            elif depth < 2 and not self.complete:
                self._read(text[at:end], state, depth)
            at = end
        return at

    def take(self) -> str:
        """The arguments' text that is new since the last time; nothing before the call has begun."""
        if not self.begun:
            return ""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def _feed_arguments(self, text: str, at: int) -> int:
        scanner, start = self._scanner, at
        while at < len(text) and scanner.depth > 1:
            end = scanner.step(text, at)
            if end == at:
                self.failed = True
                break
            at = end
        self._arguments.append(text[start:at])
        if scanner.depth == 1:
            self._field, self._has_arguments = "", True
        return at

    def _read(self, piece: str, state: str, depth: int) -> None:
        """A piece of the outer object; the scanner was in this state, at this depth, before it."""
        scanner = self._scanner
        if piece.isspace() and state != "string":
            return
        if depth == 0:
            self.failed = piece != "{"
        elif scanner.done:
            self._end()
        elif state in ("first key", "key"):
            self._string = [piece]
        elif state == "value":
            self._begin_value(piece)
        elif state in ("string", "escape", "hex") and (scanner.in_key or self._field == "name"):
            self._string.append(piece)
            if scanner.state not in ("string", "escape", "hex"):
                self._end_string(json.loads("".join(self._string)))

    def _begin_value(self, piece: str) -> None:
        if self._field == "name":
            self._string = [piece]
            self.failed = piece != '"'
        elif self._field == "arguments":
            self._arguments.append(piece)
            self.failed = piece != "{"
            self.begun = not self.failed and bool(self.name)

    def _end_string(self, value: str) -> None:
        """A key, or the tool's name."""
        if self._scanner.in_key:
            self.failed = value in self._seen
            self._seen.add(value)
            self._field = value
            return
        self._field = ""
        self.name = value
        self.failed = value not in self._names
        self.begun = not self.failed and self._has_arguments

    def _end(self) -> None:
        """The outer object ends before the call is complete."""
        self.failed = not self.name or "arguments" in self._seen
        if not self.failed:
            self._arguments.append("{}")
            self.begun = self._has_arguments = True
