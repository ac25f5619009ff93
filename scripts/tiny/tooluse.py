"""Conversations with tools: the right one of several, two calls at once, a result put into words, and no tool at all.

Knows how a conversation goes. What the tools are is drawn in `tools.py`.
"""

import re

from tiny.dialogue import Dialogue, Message
from tiny.families import WISHES, WISHES_ZH
from tiny.phrases import CHINESE, ENGLISH, Exchange
from tiny.talk import TASKS, is_chinese, memory, system, thought
from tiny.tools import DrawnTool, Use, draw_near, draw_tool
from tiny.words import Words

WORLDLY = (
    "weather",
    "rain",
    "time",
    "date",
    "day is it",
    "joke",
    "story",
    "eat",
    "dinner",
    "天气",
    "雨",
    "几点",
    "几号",
    "星期",
    "吃",
)
"""Small talk that some tool might claim is left out where tools are listed."""

NO_TOOL = [
    "I am sorry, I have no tool for that.",
    "I am sorry, none of my tools can do that.",
    "Sorry, I cannot do that with my tools.",
]
NO_TOOL_ZH = ["抱歉，我没有合适的工具。", "抱歉，我的工具做不到这个。"]


def tool_list(
    words: Words, first: list[DrawnTool], size: int, avoid: frozenset[str] | set[str] = frozenset()
) -> list[DrawnTool]:
    """`first` and strangers, some of which look like one of the others, `size` in all, in any order."""
    tools = list(first)
    while len(tools) < size:
        keys = {t.key for t in tools} | avoid
        alike = tools and words.chance(0.25)
        tools.append(draw_near(words, words.one(tools), keys) if alike else draw_tool(words, keys))
    words.rng.shuffle(tools)
    return tools


def calling(words: Words, ask: str, tool: DrawnTool, *uses: Use) -> list[Message]:
    """The user's question and the assistant's calls."""
    given = " and ".join(", ".join(f"{k} = {v}" for k, v in use.arguments.items()) for use in uses)
    think = (
        f"The user wants: {ask} The tool {tool.name} can do this with {given}."
        if len(ask) < 70
        else f"I can use {tool.name} with {given}."
    )
    return [
        Message("user", ask),
        Message("assistant", calls=[(tool.name, dict(u.arguments)) for u in uses], think=think),
    ]


def told(*uses: Use) -> list[Message]:
    """The results and what the assistant makes of them."""
    answer = ("" if uses[0].chinese else " ").join(u.answer for u in uses)
    return [
        *(Message("tool", u.result) for u in uses),
        Message("assistant", answer, think="The tool has answered. I can tell the user now."),
    ]


def single(words: Words, size: int | None = None, answered: float = 0.5) -> Dialogue:
    """One question, one call out of `size` tools; often the result and the answer; sometimes more after that."""
    tool = draw_tool(words, set())
    tools = tool_list(words, [tool], size or words.one((1, 2, 2, 3, 3, 4, 4)))
    messages = system(words, 0.3)
    if words.chance(0.12):
        messages += chat(words)
    use = tool.use(words)
    messages += calling(words, use.ask, tool, use)
    if words.chance(answered):
        messages += told(use)
        if words.chance(0.3):
            other = tool if words.chance(0.6) else words.one(tools)
            use = other.use(words)
            messages += calling(words, use.ask, other, use)
            if words.chance(0.4):
                messages += told(use)
        elif words.chance(0.3):
            messages += chat(words)
    return Dialogue(messages, [t.schema for t in tools], words.chance(0.22))


def parallel(words: Words, size: int | None = None, answered: float = 0.4) -> Dialogue:
    """One question about two things: two calls in one turn."""
    while True:
        tool = draw_tool(words, set())
        drawn = tool.pair(words)
        if drawn:
            break
    ask, a, b = drawn
    tools = tool_list(words, [tool], size or words.one((1, 1, 2, 3, 4)))
    messages = [*system(words, 0.3), *calling(words, ask, tool, a, b)]
    if words.chance(answered):
        messages += told(a, b)
    return Dialogue(messages, [t.schema for t in tools], words.chance(0.22))


def together(words: Words) -> Dialogue:
    """Two questions for two different tools in one message."""
    one = draw_tool(words, set())
    two = draw_tool(words, {one.key})
    a, b = one.use(words), two.use(words)
    while a.chinese != b.chinese:
        a, b = one.use(words), two.use(words)
    ask = (
        a.ask.rstrip()
        + ("" if a.chinese else " ")
        + words.one(["还有，", "另外，"] if a.chinese else ["And ", "Also: ", ""])
        + b.ask
    )
    tools = tool_list(words, [one, two], words.one((2, 3, 4)))
    think = f"I need {one.name} and {two.name}."
    calls = [(one.name, dict(a.arguments)), (two.name, dict(b.arguments))]
    messages = [*system(words, 0.2), Message("user", ask), Message("assistant", calls=calls, think=think)]
    if words.chance(0.4):
        messages += told(a, b)
    return Dialogue(messages, [t.schema for t in tools], words.chance(0.22))


def chat(words: Words) -> list[Message]:
    """One exchange that needs no tool."""
    if words.chance(0.2):
        task = words.one([t for t in TASKS if t.__name__ != "_sum"])
        asked, answer = task(words)
        return [Message("user", asked), Message("assistant", answer, think=no_need(asked))]
    exchange: Exchange = words.one(CHINESE if words.chance(0.35) else ENGLISH)
    said = words.one(exchange[0])
    if any(word in said.lower() for word in WORLDLY):
        return chat(words)
    return [Message("user", said), Message("assistant", words.one(exchange[1]), think=no_need(said))]


def no_need(asked: str) -> str:
    """What the model thinks before it answers in words although it has tools."""
    return thought(asked)


def refusing(words: Words, ask: str) -> list[Message]:
    """A wish that no tool of the list can meet."""
    chinese = is_chinese(ask)
    answer = words.one(NO_TOOL_ZH if chinese else NO_TOOL)
    return [
        Message("user", ask),
        Message("assistant", answer, think="没有合适的工具。" if chinese else "I have no tool for that."),
    ]


def wish(words: Words) -> str:
    """Something that no tool of ours can do."""
    text = words.one(WISHES_ZH if words.chance(0.35) else WISHES)
    return re.sub(r"\{(\w+)\}", lambda m: words.draw(m[1]), text)


def strange_ask(words: Words, tools: list[DrawnTool]) -> str:
    """A question for a tool that is not among `tools`, often for one that looks like one of them."""
    avoid = {t.key for t in tools}
    tool = draw_near(words, words.one(tools), avoid) if words.chance(0.5) else draw_tool(words, avoid)
    return tool.use(words).ask


def contrast(words: Words) -> list[Dialogue]:
    """One question over a list with its tool and over the same list with another in its place, and more of that kind.

    What differs is what decides, so the list must be read.
    """
    tool = draw_tool(words, set())
    use = tool.use(words)
    others = tool_list(words, [], words.one((0, 1, 1, 2, 2, 3)), {tool.key})
    avoid = {tool.key} | {t.key for t in others}
    instead = draw_near(words, tool, avoid) if words.chance(0.6) else draw_tool(words, avoid)
    place = words.rng.randint(0, len(others))
    fitting = [*others[:place], tool, *others[place:]]
    without = [*others[:place], instead, *others[place:]]
    setting, thinking = system(words, 0.2), words.chance(0.12)
    asked = [
        ([*setting, *calling(words, use.ask, tool, use)], fitting),
        ([*setting, *refusing(words, use.ask)], without),
    ]
    if words.chance(0.5):
        other = instead.use(words)
        asked.append(([*setting, *calling(words, other.ask, instead, other)], without))
    if words.chance(0.5):
        asked.append(([*setting, *refusing(words, strange_ask(words, fitting))], fitting))
    return [Dialogue(messages, [t.schema for t in tools], thinking) for messages, tools in asked]


def session(words: Words) -> Dialogue:
    """Several turns over one list: questions that a tool of it fits, questions that none fits, small talk."""
    tools = tool_list(words, [], words.one((1, 2, 3, 3, 4)))
    messages = system(words, 0.2)
    for _ in range(words.rng.randint(2, 5)):
        kind = words.rng.random()
        if kind < 0.48:
            tool = words.one(tools)
            use = tool.use(words)
            messages += [*calling(words, use.ask, tool, use), *told(use)]
        elif kind < 0.85:
            messages += refusing(words, strange_ask(words, tools))
        else:
            messages += chat(words)
    return Dialogue(messages, [t.schema for t in tools], words.chance(0.1))


def drill(words: Words) -> Dialogue:
    """Many questions over one list, without results: choosing is practised where the list has been read once."""
    tools = tool_list(words, [], words.one((2, 3, 3, 4, 4)))
    messages = system(words, 0.1)
    for _ in range(words.rng.randint(5, 9)):
        if words.chance(0.6):
            tool = words.one(tools)
            use = tool.use(words)
            messages += calling(words, use.ask, tool, use)
        else:
            messages += refusing(words, strange_ask(words, tools))
    return Dialogue(messages, [t.schema for t in tools])


def no_tool(words: Words, size: int | None = None, worldly: float = 0.55, wishes: float = 0.25) -> Dialogue:
    """Tools are listed but none fits: small talk, memory, or a wish that no tool of the list can meet.

    A share `wishes` of the `worldly` questions asks for what no tool whatever can do.
    """
    tools = tool_list(words, [], size or words.one((1, 1, 2, 3, 4)))
    schemas = [t.schema for t in tools]
    if words.chance(worldly):
        ask = wish(words) if words.chance(wishes) else strange_ask(words, tools)
        return Dialogue([*system(words, 0.3), *refusing(words, ask)], schemas, words.chance(0.22))
    if words.chance(0.2):
        dialogue = memory(words, (0, 1))
        return Dialogue(dialogue.messages, schemas, dialogue.thinking)
    return Dialogue(
        [*system(words, 0.3), *chat(words), *(chat(words) if words.chance(0.2) else [])], schemas, words.chance(0.22)
    )
