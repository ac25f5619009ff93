"""Conversations with tools: the right one of several, two calls at once, a result put into words, and no tool at all.

Knows how a conversation goes. What the tools are is drawn in `tools.py`.
"""

from tiny.dialogue import Dialogue, Message
from tiny.phrases import CHINESE, ENGLISH, Exchange
from tiny.talk import TASKS, memory, system, thought
from tiny.tools import DrawnTool, Use, draw_tool
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


def tool_list(words: Words, first: list[DrawnTool], size: int) -> list[DrawnTool]:
    """`first` and strangers, `size` in all, in any order."""
    tools = list(first)
    while len(tools) < size:
        tools.append(draw_tool(words, {t.key for t in tools}))
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


def no_tool(words: Words, size: int | None = None, worldly: float = 0.45) -> Dialogue:
    """Tools are listed but none fits: small talk, memory, or a wish that no tool of the list can meet."""
    tools = tool_list(words, [], size or words.one((1, 1, 2, 3, 4)))
    schemas = [t.schema for t in tools]
    if words.chance(worldly):
        use = draw_tool(words, {t.key for t in tools}).use(words)
        answer = words.one(NO_TOOL_ZH if use.chinese else NO_TOOL)
        think = "I have no tool for that." if not use.chinese else "没有合适的工具。"
        return Dialogue(
            [*system(words, 0.3), Message("user", use.ask), Message("assistant", answer, think=think)],
            schemas,
            words.chance(0.22),
        )
    if words.chance(0.2):
        dialogue = memory(words, (0, 1))
        return Dialogue(dialogue.messages, schemas, dialogue.thinking)
    return Dialogue(
        [*system(words, 0.3), *chat(words), *(chat(words) if words.chance(0.2) else [])], schemas, words.chance(0.22)
    )
