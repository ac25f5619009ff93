"""The first lessons: repeat a list, look a value up by its key. They teach the heads that copy.

Knows values only. Its texts carry a mark at each place from which on everything can be known.
"""

import json

from tiny.dialogue import Dialogue, Message
from tiny.words import Words, invented

Pieces = list[tuple[str, bool]]
MIXED = (
    "city",
    "person",
    "number",
    "code",
    "invented",
    "thing",
    "person_zh",
    "city_zh",
    "invented_zh",
    "date",
    "clock",
    "text",
    "email",
)


def repeated(words: Words) -> Pieces:
    """A list of values, then the same list again."""
    values = [words.draw(words.one(MIXED)) for _ in range(words.rng.randint(2, 10))]
    joint = words.one([", ", "\n", " ", "; ", " and "])
    text = joint.join(values)
    return [(text + "\n", False), (text + "</s>", True)]


def looked_up(words: Words) -> Pieces:
    """Pairs of key and value, then some keys again with their values."""
    count = words.rng.randint(2, 9)
    keys = list(dict.fromkeys(words.draw(words.one(("invented", "person", "thing", "invented"))) for _ in range(count)))
    values = [words.draw(words.one(MIXED)) for _ in keys]
    pairs = list(zip(keys, values, strict=True))
    if words.chance(0.5):
        link, joint = words.one([(": ", "\n"), (" = ", "\n"), (" is ", ". "), (": ", ", ")])
        shown = joint.join(k + link + v for k, v in pairs) + "\n\n"
    else:
        link, shown = ": ", json.dumps(dict(pairs), ensure_ascii=False) + "\n\n"
    pieces: Pieces = [(shown, False)]
    for key, value in words.rng.sample(pairs, min(len(pairs), 4)):
        pieces += [(key + link, False), (value + "\n", True)]
    return [*pieces, ("</s>", True)]


def as_json(words: Words) -> Pieces:
    """Sentences that name keys and values, then the JSON object they make."""
    keys = list(dict.fromkeys(invented(words.rng, (1, 2)) for _ in range(words.rng.randint(1, 4))))
    values: dict[str, str | int] = {}
    for key in keys:
        kind = words.one(MIXED)
        value = words.draw(kind)
        values[key] = int(value) if kind == "number" else value
    link = words.one([" is ", " = ", ": ", " "])
    name = f"{invented(words.rng)}_{invented(words.rng)}" if words.chance(0.5) else invented(words.rng)
    shown = f"{words.one(['Use', 'Call', 'Run'])} {name} with " + words.one([", ", " and "]).join(
        f"{k}{link}{v}" for k, v in values.items()
    )
    call = json.dumps({"name": name, "arguments": values}, ensure_ascii=False)
    return [(shown + ".\n", False), (call + "</s>", True)]


def in_chat(words: Words) -> Pieces:
    """A look-up as a conversation."""
    keys = list(dict.fromkeys(words.draw(words.one(("invented", "thing"))) for _ in range(words.rng.randint(2, 6))))
    values = [words.draw(words.one(MIXED)) for _ in keys]
    shown = ". ".join(f"The {k} is {v}" for k, v in zip(keys, values, strict=True)) + "."
    messages = [Message("user", shown), Message("assistant", "I will remember that.")]
    for n in words.rng.sample(range(len(keys)), min(2, len(keys))):
        messages += [Message("user", f"What is the {keys[n]}?"), Message("assistant", f"The {keys[n]} is {values[n]}.")]
    return Dialogue(messages, thinking=False).document()


def lesson(words: Words) -> Pieces:
    """One of the above."""
    return words.one([repeated, looked_up, looked_up, as_json, in_chat])(words)
