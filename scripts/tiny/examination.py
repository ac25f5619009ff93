"""The examination of `ernie-tiny`: questions over held-out values, and what counts as right.

Knows what is asked and how an answer is judged. Knows nothing about how the model is run.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from tiny.dialogue import Dialogue, Message, reply
from tiny.talk import memory
from tiny.tooluse import no_tool, parallel, single
from tiny.words import Words

CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """A prompt, and whether an answer to it is right."""

    task: str
    prompt: str
    right: Callable[[str], bool]
    wanted: str


def calls_in(text: str) -> list[tuple[str, object]]:
    """Name and arguments of every well-formed call."""
    calls = []
    for body in CALL.findall(text):
        try:
            call = json.loads(body)
            calls.append((call["name"], call["arguments"]))
        except (ValueError, KeyError, TypeError):
            calls.append(("", None))
    return calls


def until_answer(dialogue: Dialogue) -> tuple[str, Message]:
    """The prompt of the last assistant turn, and that turn."""
    *before, last = dialogue.messages
    return Dialogue(before, dialogue.tools, dialogue.thinking).prompt(), last


def tool_call(words: Words, size: int, thinking: bool = False) -> Question:
    """The right tool of `size`, with the right arguments."""
    dialogue = single(words, size, answered=0.0)
    dialogue.messages = dialogue.messages[-2:]
    dialogue.thinking = thinking
    prompt, last = until_answer(dialogue)
    wanted = [(name, arguments) for name, arguments in last.calls]
    return Question(
        f"tool call, {size} tool{'s' * (size > 1)}", prompt, lambda text: calls_in(text) == wanted, reply(last)
    )


def two_calls(words: Words) -> Question:
    """Two calls to one tool."""
    dialogue = parallel(words, words.rng.randint(1, 4), answered=0.0)
    dialogue.thinking = False
    prompt, last = until_answer(dialogue)
    wanted = sorted(json.dumps(call) for call in last.calls)
    return Question(
        "two calls at once", prompt, lambda text: sorted(json.dumps(c) for c in calls_in(text)) == wanted, reply(last)
    )


def nothing_fits(words: Words) -> Question:
    """Words, although tools are listed. Each wish is one that a tool could meet, only none that is listed."""
    dialogue = no_tool(words, words.rng.randint(1, 4), wishes=0.0)
    dialogue.messages = dialogue.messages[: 2 + (dialogue.messages[0].role == "system")]
    dialogue.thinking = False
    prompt, last = until_answer(dialogue)
    return Question(
        "words where no tool fits", prompt, lambda text: "<response>" in text and "<tool_call>" not in text, reply(last)
    )


def result_used(words: Words) -> Question:
    """The result stands in the answer."""
    while True:
        dialogue = single(words, words.rng.randint(1, 4), answered=1.0)
        first = next(n for n, m in enumerate(dialogue.messages) if m.role == "tool")
        dialogue.messages = dialogue.messages[: first + 2]
        dialogue.thinking = False
        prompt, last = until_answer(dialogue)
        facts = [
            f
            for f in re.findall(r"[\w.:-]+", dialogue.messages[first].content)
            if f in last.content and (f[0].isdigit() or len(f) > 3)
        ]
        if any(fact not in dialogue.messages[first - 2].content for fact in facts):
            break
    return Question("tool result used", prompt, lambda text: all(fact in text for fact in facts), reply(last))


def remembered(words: Words, fact: int, task: str) -> Question:
    """A value told two turns ago."""
    dialogue = memory(words, (1,), fact)
    dialogue.thinking = False
    prompt, last = until_answer(dialogue)
    told = last.content
    value = next(m.content for m in dialogue.messages if m.role == "user")
    return Question(task, prompt, lambda text: told in text, f"{told} ({value})")


def thought_aloud(words: Words) -> Question:
    """A thought, its end, and an answer in its frame."""
    dialogue = single(words, 2, answered=0.0) if words.chance(0.5) else memory(words, (0, 1))
    dialogue.thinking = True
    prompt, last = until_answer(dialogue)
    form = re.compile(
        r"^[^<]+\n</think>\n\n(<response>\n.+\n</response>\n|(\n<tool_call>\n.+\n</tool_call>\n)+)<\|im_end\|>$",
        re.DOTALL,
    )
    return Question("thinking format", prompt, lambda text: bool(form.match(text)), reply(last))


def questions(seed: int, count: int) -> list[Question]:
    """`count` questions of every kind, over values that training never sees."""
    words = Words(random.Random(seed), held_out=True)
    asked: list[Question] = []
    for size in (1, 2, 3, 4):
        asked += [tool_call(words, size) for _ in range(count)]
    asked += [two_calls(words) for _ in range(count)]
    asked += [nothing_fits(words) for _ in range(count)]
    asked += [result_used(words) for _ in range(count)]
    asked += [remembered(words, 0, "name from two turns ago") for _ in range(count)]
    asked += [remembered(words, 11, "Chinese name from two turns ago") for _ in range(count)]
    asked += [remembered(words, 6, "number from two turns ago") for _ in range(count)]
    asked += [thought_aloud(words) for _ in range(count)]
    return asked + openings() + completions()


OPENINGS: list[tuple[str, str]] = [
    ("Hello, how are you?", "well"),
    ("Hi! How are you today?", "well"),
    ("hello there", "help|do for you"),
    ("Good morning!", "morning"),
    ("Who are you?", "ernie-tiny"),
    ("What's your name?", "ernie-tiny"),
    ("What can you do for me?", "chat|call"),
    ("Thanks!", "welcome"),
    ("Thank you so much!", "welcome"),
    ("Goodbye!", "Goodbye|day"),
    ("Please tell me a joke.", "Because"),
    ("Can you tell me a short story?", "Once upon"),
    ("I feel sad.", "sorry"),
    ("I am so tired.", "rest"),
    ("What is the capital of France?", "Paris"),
    ("What is a large language model?", "neural network|text"),
    ("Explain machine learning in one sentence.", "learn"),
    ("How many days are in a week?", "seven"),
    ("Count to five", "1, 2, 3, 4, 5"),
    ("Are you a human?", "No|model"),
    ("你好！", "你好"),
    ("你好，最近怎么样？", "很好"),
    ("你是谁呀？", "ernie-tiny"),
    ("谢谢你！", "不客气"),
    ("请给我讲个笑话", "因为"),
    ("中国的首都是哪里？", "北京"),
    ("再见啦", "再见"),
]
"""An opening, and what a sensible answer has in it. A third of them stand in no training list as they are."""


def openings() -> list[Question]:
    """Everyday openings without a system prompt."""
    return [
        Question(
            "everyday openings",
            Dialogue([Message("user", said)]).prompt(),
            lambda text, sign=sign: bool(re.search(sign, text)),
            sign,
        )  # type: ignore[misc]  # a default binds it
        for said, sign in OPENINGS
    ]


def completions() -> list[Question]:
    """Plain text to go on with."""
    begun = [
        ("Large language model is", "network"),
        ("The capital of France is", "Paris"),
        ("Once upon a time,", "robot|bird"),
        ("大语言模型是", "神经网络"),
    ]
    return [
        Question("completions", text, lambda answer, sign=sign: bool(re.search(sign, answer)), sign)
        for text, sign in begun
    ]  # type: ignore[misc]
