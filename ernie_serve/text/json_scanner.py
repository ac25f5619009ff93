"""Reads one JSON value that arrives bit by bit, and knows at every character whether it can still become one.

Knows JSON's grammar (RFC 8259). Builds no values, and knows nothing of tools or models.
"""

import re

_SPACE = re.compile(r"[ \t\n\r]+")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_DIGITS = "0123456789"
_HEX_DIGITS = "0123456789abcdefABCDEF"

# The parts of a number: what may follow in each, and the part that follows then.
_NUMBER: dict[str, dict[str, str]] = {
    "minus": {"0": "zero"} | dict.fromkeys("123456789", "whole"),
    "zero": {".": "point", "e": "e", "E": "e"},
    "whole": {".": "point", "e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "whole"),
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {"e": "e", "E": "e"} | dict.fromkeys(_DIGITS, "fraction"),
    "e": {"+": "sign", "-": "sign"} | dict.fromkeys(_DIGITS, "exponent"),
    "sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}
_NUMBER_BEGINS = {"-": "minus", "0": "zero"} | dict.fromkeys("123456789", "whole")
_NUMBER_ENDS = frozenset({"zero", "whole", "fraction", "exponent"})


class JsonScanner:
    """The state of one value. Every character is read once, in constant time."""

    def __init__(self) -> None:
        self.state: str = "value"
        self.in_key = False
        """Whether the string being read, or the last one, is a key."""
        self._closers: list[str] = []
        self._rest = ""
        self._part = ""
        self._num_hex = 0

    @property
    def depth(self) -> int:
        """How many objects and arrays are open."""
        return len(self._closers)

    @property
    def done(self) -> bool:
        """Whether the value is whole. A number at the top never is: more digits could follow."""
        return self.state == "done"

    def step(self, text: str, at: int) -> int:
        """Read one character, or a run of them inside a string or of white space; return where the next one is.

        Returns `at` itself when what stands there cannot follow, and then, and only then, nothing has changed.
        """
        char = text[at]
        if self.state == "string":
            return self._step_string(text, at, char)
        if self.state in ("escape", "hex", "literal"):
            return at + self._step_inside(char)
        if self.state == "number":
            if following := _NUMBER[self._part].get(char):
                self._part = following
                return at + 1
            if self._part not in _NUMBER_ENDS or not self._closers or char not in f" \t\n\r,{self._closers[-1]}":
                return at
            self._end_value()
        if self.state != "done" and (space := _SPACE.match(text, at)):
            return space.end()
        return at + self._step_between(char)

    def _step_string(self, text: str, at: int, char: str) -> int:
        if plain := _PLAIN.match(text, at):
            return plain.end()
        if char == "\\":
            self.state = "escape"
        elif char != '"':
            return at
        elif self.in_key:
            self.state = "colon"
        else:
            self._end_value()
        return at + 1

    def _step_inside(self, char: str) -> bool:
        """Inside an escape or a literal: whether the character belongs there."""
        if self.state == "escape":
            if char not in '"\\/bfnrtu':
                return False
            self.state, self._num_hex = ("hex", 0) if char == "u" else ("string", 0)
        elif self.state == "hex":
            if char not in _HEX_DIGITS:
                return False
            self._num_hex += 1
            if self._num_hex == 4:
                self.state = "string"
        else:
            if char != self._rest[0]:
                return False
            self._rest = self._rest[1:]
            if not self._rest:
                self._end_value()
        return True

    def _step_between(self, char: str) -> bool:
        """Between tokens: whether the character may begin or separate something here."""
        state = self.state
        if state in ("value", "first item"):
            if state == "first item" and char == "]":
                return self._close()
            return self._begin_value(char)
        if state in ("key", "first key"):
            if char == '"':
                self.state, self.in_key = "string", True
                return True
            return state == "first key" and char == "}" and self._close()
        if state == "colon" and char == ":":
            self.state = "value"
            return True
        if state == "after value":
            if char == ",":
                self.state = "key" if self._closers[-1] == "}" else "value"
                return True
            return char == self._closers[-1] and self._close()
        return False

    def _begin_value(self, char: str) -> bool:
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self.state = "first key" if char == "{" else "first item"
        elif char == '"':
            self.state, self.in_key = "string", False
        elif char in _LITERALS:
            self.state, self._rest = "literal", _LITERALS[char]
        elif char in _NUMBER_BEGINS:
            self.state, self._part = "number", _NUMBER_BEGINS[char]
        else:
            return False
        return True

    def _close(self) -> bool:
        self._closers.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self.state = "after value" if self._closers else "done"
