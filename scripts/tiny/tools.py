"""Draws a concrete tool: its name, description and schema, something to ask of it, the call, a result and the answer.

Knows families, attributes and invented tools alike under one face, `DrawnTool`. Knows nothing about conversations.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tiny.families import ATTRIBUTES, FAMILIES, NEAR, SUBJECTS, Family, Slot
from tiny.words import Words, invented

Value = str | int | float


@dataclass
class Use:
    """One use of a tool: what is asked, the arguments that follow, what comes back and what is said then."""

    ask: str
    arguments: dict[str, Value]
    result: str
    answer: str
    chinese: bool = False


@dataclass
class DrawnTool:
    """A tool of one conversation. `key` tells what it does: two tools of one key never share a list.

    `near` draws a tool that looks alike but does something else.
    """

    key: str
    name: str
    schema: dict[str, Any]
    use: Callable[[Words], Use]
    near: Callable[[Words], "DrawnTool"]
    pair: Callable[[Words], tuple[str, Use, Use] | None] = field(default=lambda words: None)


def draw_tool(words: Words, avoid: set[str]) -> DrawnTool:
    """A tool whose key is not in `avoid`."""
    while True:
        kind = words.rng.random()
        tool = (
            from_family(words, words.one(FAMILIES))
            if kind < 0.62
            else from_attribute(words)
            if kind < 0.86
            else from_nothing(words)
        )
        if tool.key not in avoid:
            return tool


def draw_near(words: Words, tool: DrawnTool, avoid: set[str]) -> DrawnTool:
    """A tool that looks like `tool`, with a key of its own that is not in `avoid` either."""
    for _ in range(20):
        near = tool.near(words)
        if near.key != tool.key and near.key not in avoid:
            return near
    return draw_tool(words, avoid | {tool.key})


def near_family(words: Words, family: Family) -> DrawnTool:
    """One of the families that look alike."""
    keys = {key for group in NEAR if family.names[0] in group for key in group}
    alike = [f for f in FAMILIES if f.names[0] in keys]
    return from_family(words, words.one(alike or FAMILIES))


def from_family(words: Words, family: Family, plain: bool = False) -> DrawnTool:
    """A tool of a known kind under one of its many names. `plain` keeps to real names."""
    about = words.one(family.about)
    has_extra = bool(family.extra) and words.chance(0.5)
    slots = {**family.slots, **(family.extra if has_extra else {})}
    hidden = bool(about) and not plain and words.chance(0.15)
    name = invented(words.rng, (2, 3)) if hidden else words.one(family.names)
    if not hidden and not plain and words.chance(0.2):
        name = (
            camel(name)
            if words.chance(0.5)
            else name + words.one(["_v2", "_tool", "_api", "_" + invented(words.rng, (1,))])
        )
    params = {
        key: (invented(words.rng, (1, 2)) if not plain and words.chance(0.12) else words.one(slot.names))
        for key, slot in slots.items()
    }
    if len(set(params.values())) < len(params):
        params = {key: slot.names[0] for key, slot in slots.items()}
    if words.chance(0.08):
        params = {key: camel(p + "_" + key) if "_" not in p else camel(p) for key, p in params.items()}

    def arguments(values: dict[str, str]) -> dict[str, Value]:
        return {params[key]: typed(slots[key], value) for key, value in values.items()}

    def use(words: Words, given: dict[str, str] | None = None, chinese: bool | None = None) -> Use:
        zh = words.chance(0.35) if chinese is None else chinese
        ask = words.one(family.asks_zh if zh else family.asks)
        if has_extra and not zh and words.chance(0.5):
            ask = words.one(family.asks_extra)
        wanted = [key for key in slots if "{" + key + "}" in ask]
        values = given or {key: words.draw(slots[key].kind_zh if zh else slots[key].kind) for key in wanted}
        got = {key: returned(words, kind, zh) for key, kind in family.result.items()}
        answer = (family.answer_zh if zh else family.answer).format(**values, **got)
        return Use(ask.format(**values), arguments(values), result_text(words, got), answer, zh)

    def pair(words: Words) -> tuple[str, Use, Use] | None:
        zh = bool(family.pairs_zh) and words.chance(0.35)
        forms = family.pairs_zh if zh else family.pairs
        if not forms:
            return None
        key, slot = next(iter(family.slots.items()))
        a, b = words.draw(slot.kind_zh if zh else slot.kind), words.draw(slot.kind_zh if zh else slot.kind)
        while a == b:
            b = words.draw(slot.kind_zh if zh else slot.kind)
        both = []
        for v in (a, b):
            got = {key: returned(words, kind, zh) for key, kind in family.result.items()}
            answer = (family.answer_zh if zh else family.answer).format(**{key: v}, **got)
            both.append(Use("", arguments({key: v}), result_text(words, got), answer, zh))
        return words.one(forms).format(a=a, b=b), both[0], both[1]

    shown = {params[key]: describe(words, slot) for key, slot in slots.items()}
    required = [params[key] for key in family.slots]
    return DrawnTool(
        family.names[0],
        name,
        schema(words, name, about, shown, required),
        use,
        lambda words: near_family(words, family),
        pair,
    )


def from_attribute(words: Words, of: tuple[str, str] | None = None) -> DrawnTool:
    """A tool that gives one attribute of a kind of subject, such as the salary of an employee; `of` is the subject."""
    attribute = words.one(ATTRIBUTES) if words.chance(0.85) else invented(words.rng)
    subject, kind = of or words.one(SUBJECTS)
    verb = words.one(["get", "find", "fetch", "lookup", "check", "query", "read", "show"])
    name = words.one(
        [
            f"{verb}_{attribute}",
            f"{verb}_{subject}_{attribute}",
            f"{subject}_{attribute}",
            camel(f"{verb}_{attribute}"),
            f"{attribute}_of_{subject}",
        ]
    )
    about = words.one(
        [
            f"Get the {attribute} of a {subject}",
            f"Returns the {attribute} of the given {subject}",
            f"Look up the {attribute} of a {subject}",
            f"Find the {attribute} for a {subject}",
        ]
    )
    param = words.one([subject, "name", f"{subject}_name", f"{subject}_id", "id", "key", invented(words.rng, (1, 2))])
    got_kind = words.one(["number", "small", "decimal", "code", "invented"])

    def answered(v: str, words: Words) -> Use:
        got = words.draw(got_kind)
        return Use(
            "",
            {param: v},
            result_text(
                words,
                {
                    attribute: typed(Slot([], "", "", "", "number"), got)
                    if got_kind in ("number", "small", "decimal")
                    else got
                },
            ),
            f"The {attribute} of {v} is {got}.",
        )

    def use(words: Words) -> Use:
        v = words.draw(kind)
        used = answered(v, words)
        used.ask = words.one(
            [
                f"What is the {attribute} of {v}?",
                f"Tell me the {attribute} of {v}.",
                f"Give me the {attribute} of {v}",
                f"What {attribute} does {v} have?",
                f"Find the {attribute} of {subject} {v}.",
                f"Do you know the {attribute} of {v}?",
                f"Show the {attribute} for {v}",
                f"What is the {attribute} of the {subject} {v}?",
            ]
        )
        return used

    def pair(words: Words) -> tuple[str, Use, Use] | None:
        a, b = words.draw(kind), words.draw(kind)
        while a == b:
            b = words.draw(kind)
        return (
            words.one(
                [
                    f"What is the {attribute} of {a} and {b}?",
                    f"Get the {attribute} of {a} and of {b}.",
                    f"Compare the {attribute} of {a} and {b}.",
                ]
            ),
            answered(a, words),
            answered(b, words),
        )

    shown = {param: describe(words, Slot([], "", "", f"The {subject}"))}
    return DrawnTool(
        attribute,
        name,
        schema(words, name, about, shown, [param]),
        use,
        lambda words: from_attribute(words, (subject, kind)),
        pair,
    )


def from_nothing(words: Words) -> DrawnTool:
    """A tool with an invented name and invented parameters, asked for by that name or by its description."""
    name = (
        invented(words.rng, (2, 3))
        if words.chance(0.4)
        else f"{invented(words.rng, (1, 2))}_{invented(words.rng, (1, 2))}"
    )
    deed, object_ = invented(words.rng), invented(words.rng)
    params = list(dict.fromkeys(invented(words.rng, (1, 2)) for _ in range(words.one((1, 1, 2, 2, 3)))))
    kinds = {
        p: words.one(("city", "person", "number", "code", "invented", "thing", "date", "clock", "title"))
        for p in params
    }
    by_deed = len(params) == 1 and words.chance(0.6)

    def use(words: Words) -> Use:
        values: dict[str, Value] = {
            p: typed(Slot([], "", "", "", "number"), words.draw(k)) if k == "number" else words.draw(k)
            for p, k in kinds.items()
        }
        link = words.one([" = ", " ", ": ", " is "])
        given = words.one([" and ", ", "]).join(f"{p}{link}{v}" for p, v in values.items())
        if by_deed:
            ask = words.one(
                [
                    f"{deed.capitalize()} the {object_} {values[params[0]]}.",
                    f"Please {deed} the {object_} {values[params[0]]}",
                    f"I want to {deed} {values[params[0]]}.",
                ]
            )
        else:
            ask = words.one(
                [f"Use {name} with {given}.", f"Call {name} with {given}", f"Run {name}: {given}", f"{name} {given}"]
            )
        got = words.draw(words.one(("number", "invented", "code")))
        return Use(ask, values, result_text(words, {invented(words.rng, (1,)): got}), f"The result is {got}.")

    shown = {
        p: describe(words, Slot([], "", "", f"The {p}", "number" if kinds[p] == "number" else "string")) for p in params
    }
    about = (
        f"{deed.capitalize()} the {object_}"
        if by_deed
        else words.one([f"{deed.capitalize()} the {object_}", f"The {object_} tool", ""])
    )
    return DrawnTool(name, name, schema(words, name, about, shown, params), use, from_nothing)


def schema(
    words: Words, name: str, about: str, shown: dict[str, dict[str, Any]], required: list[str]
) -> dict[str, Any]:
    """The OpenAI object of a tool, in one of the forms that clients send."""
    parameters: dict[str, Any] = {"type": "object", "properties": shown}
    if words.chance(0.8):
        parameters["required"] = required
    if words.chance(0.2):
        parameters["additionalProperties"] = False
    function: dict[str, Any] = {"name": name}
    if about:
        function["description"] = about + (words.one([".", ""]) if about.isascii() else "")
    function["parameters"] = parameters
    if words.chance(0.1):
        function["strict"] = True
    if words.chance(0.1):
        keys = list(function)
        words.rng.shuffle(keys)
        function = {key: function[key] for key in keys}
    return {"type": "function", "function": function}


def describe(words: Words, slot: Slot) -> dict[str, Any]:
    """The schema of one parameter."""
    shown: dict[str, Any] = {"type": slot.type if slot.type != "number" else words.one(["number", "integer", "number"])}
    if slot.kind == "unit":
        shown["enum"] = ["celsius", "fahrenheit"]
    elif slot.kind.startswith("@") and words.chance(0.5):
        shown["enum"] = slot.kind[1:].split("|")
    if words.chance(0.5):
        shown["description"] = (
            slot.about if words.chance(0.8) else slot.about.lower() + words.one([", e.g. Rome", " to use", ""])
        )
    return shown


def typed(slot: Slot, value: str) -> Value:
    """The value as JSON writes it: a number where the schema says so."""
    if slot.type == "string":
        return value
    return float(value) if "." in value else int(value)


def returned(words: Words, kind: str, chinese: bool) -> Value:
    """A field of a result: "=word" is that word; numbers are numbers."""
    if kind.startswith("="):
        return kind[1:]
    value = words.draw("weather_zh" if kind == "weather" and chinese and words.chance(0.7) else kind)
    return typed(Slot([], "", "", "", "number"), value) if kind in ("number", "small", "decimal") else value


def result_text(words: Words, got: dict[str, Any]) -> str:
    """What the tool sends back: JSON mostly, else the bare values."""
    style = words.rng.random()
    if style < 0.6:
        return json.dumps(got, ensure_ascii=False)
    if style < 0.7:
        return json.dumps({words.one(["ok", "success"]): True, **got}, ensure_ascii=False)
    if style < 0.8:
        return json.dumps({"result": got if len(got) > 1 else next(iter(got.values()))}, ensure_ascii=False)
    return ", ".join(str(v) for v in got.values())


def camel(name: str) -> str:
    """get_weather to getWeather."""
    return re.sub(r"_(\w)", lambda m: m[1].upper(), name)
