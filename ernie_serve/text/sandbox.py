"""Runs a chat template with the powers of a form letter and no more.

Knows Jinja. Knows nothing about tokens, messages or HTTP.

Jinja's immutable sandbox keeps a template away from Python's insides. On top of it a render is bounded: every turn of
a loop and every macro call counts one step, checked against `max_steps` and against the processor time of the thread;
the output is counted as it grows; `*` and `**` make nothing larger than the output may be; `range` is bounded by the
sandbox itself. One single built-in operation (a filter over one text, a field of a thousand million characters) is not
interrupted.
"""

import json
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateLimit(jinja2.TemplateError):
    """A render took too many steps, too long, or wrote too much."""


class SandboxedTemplate:
    """A compiled template. Safe to render from several threads at once."""

    def __init__(
        self, source: str, *, max_steps: int = 1_000_000, max_seconds: float = 5.0, max_chars: int = 16 << 20
    ) -> None:
        """Compile. `max_seconds` is processor time of the rendering thread. Raises `jinja2.TemplateSyntaxError`."""
        self.source = source
        self._limits = (max_steps, max_seconds, max_chars)
        self._environment = _Environment(max_chars)
        tree = self._environment.parse(source)
        self.variables: frozenset[str] = frozenset(find_undeclared_variables(tree))
        self.constants: frozenset[str] = frozenset(
            node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)
        )
        self.operations: frozenset[str] = frozenset(
            {node.name for node in tree.find_all(nodes.Filter)} | {node.attr for node in tree.find_all(nodes.Getattr)}
        )
        bodies = [node.body for node in tree.find_all(nodes.For)]
        bodies += [node.body for node in tree.find_all(nodes.Macro)]
        for body in bodies:
            body.insert(0, _count_a_step())
        self._template = self._environment.from_string(tree)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. Raises `jinja2.TemplateError`, or whatever Python error the template runs into."""
        max_steps, max_seconds, max_chars = self._limits
        budget = _Budget(max_steps, max_seconds)
        self._environment.running.budget = budget
        written: list[str] = []
        num_chars = 0
        for piece in self._template.generate(variables):
            budget.spend()
            num_chars += len(piece)
            if num_chars > max_chars:
                raise TemplateLimit(f"the rendered prompt is longer than {max_chars} characters")
            written.append(piece)
        return "".join(written)


class _Budget:
    """What is left of one render's steps and seconds."""

    def __init__(self, max_steps: int, max_seconds: float) -> None:
        self._steps_left = max_steps
        self._max_seconds = max_seconds
        self._deadline = time.thread_time() + max_seconds

    def spend(self) -> None:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise TemplateLimit("the template takes too many steps")
        if self._steps_left % 64 == 0 and time.thread_time() > self._deadline:
            raise TemplateLimit(f"the template takes longer than {self._max_seconds} seconds")


def _count_a_step() -> nodes.Node:
    """`{{ environment.count_step() }}`, which no template can spell or replace. It writes nothing."""
    return nodes.Output([nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)], lineno=1)


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox as chat templates expect it: block trimming and the helpers that Hugging Face templates use."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, max_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.running = threading.local()
        self._max_chars = max_chars
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals.pop("lipsum")

    def count_step(self) -> str:
        self.running.budget.spend()
        return ""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if (
                    isinstance(text, str | list | tuple)
                    and isinstance(times, int)
                    and len(text) * times > self._max_chars
                ):
                    raise TemplateLimit("the template multiplies a text beyond the longest prompt")
        elif isinstance(right, int) and abs(right) > 1024:
            raise TemplateLimit("the template raises a number to a power above 1024")
        return super().call_binop(context, operator, left, right)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates mean it: readable characters stay, nothing is escaped for HTML.

    With `ensure_ascii` the noncharacters U+FDD0 to U+FDEF still stand as they are: those in a template's strings are
    marks of ours, not text.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    return "".join(c if c < "\x80" or "\ufdd0" <= c <= "\ufdef" else json.dumps(c)[1:-1] for c in text)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
