"""Conversations without tools: small talk, memory of what was said, small tasks, and plain text.

Knows phrases and values. Knows nothing about tools or tokens.
"""

import json
from collections.abc import Callable

from tiny.dialogue import Dialogue, Message
from tiny.phrases import CHINESE, ENGLISH, PLAIN, SYSTEMS, Exchange
from tiny.words import Words

FACTS: list[tuple[str, list[str], list[str], list[str], str, str]] = [
    # kind, the user tells, the assistant confirms, the user asks, the answer, the answer in a thought
    (
        "person",
        [
            "My name is {v}.",
            "Hi, I am {v}.",
            "I'm {v}.",
            "Hello, my name is {v}!",
            "Call me {v}.",
            "Hey, I'm {v}, nice to meet you.",
            "my name is {v}",
        ],
        ["Nice to meet you, {v}! How can I help you?", "Hello {v}! What can I do for you?", "Nice to meet you, {v}!"],
        [
            "What is my name?",
            "What's my name?",
            "Do you remember my name?",
            "Who am I?",
            "Do you know my name?",
            "Can you tell me my name?",
        ],
        ["Your name is {v}."],
        "The user's name is {v}.",
    ),
    (
        "full_name",
        ["My name is {v}.", "I am {v}."],
        ["Nice to meet you, {v}!"],
        ["What is my name?", "What is my full name?", "Do you remember my name?"],
        ["Your name is {v}."],
        "The user's name is {v}.",
    ),
    (
        "city",
        ["I live in {v}.", "I am from {v}.", "My home is {v}.", "I'm in {v} right now."],
        ["{v} sounds like a nice place!", "I hope you like it in {v}!"],
        [
            "Where do I live?",
            "Where am I from?",
            "Which city do I live in?",
            "Do you remember where I live?",
            "What is my city?",
        ],
        ["You live in {v}."],
        "The user lives in {v}.",
    ),
    (
        "color",
        ["My favorite color is {v}.", "I like {v} the most of all colors."],
        ["{v} is a beautiful color!"],
        ["What is my favorite color?", "Which color do I like?", "Do you remember my favorite color?"],
        ["Your favorite color is {v}."],
        "The user likes {v}.",
    ),
    (
        "food",
        ["My favorite food is {v}.", "I love {v}."],
        ["{v} is a good choice!"],
        ["What is my favorite food?", "Which food do I like?", "What do I like to eat?"],
        ["Your favorite food is {v}."],
        "The user likes {v}.",
    ),
    (
        "small",
        ["I am {v} years old.", "My age is {v}.", "I'm {v}."],
        ["{v} is a fine age!"],
        ["How old am I?", "What is my age?", "Do you remember how old I am?"],
        ["You are {v} years old."],
        "The user is {v} years old.",
    ),
    (
        "number",
        [
            "My favorite number is {v}.",
            "Remember the number {v}.",
            "The number is {v}.",
            "Please remember this number: {v}.",
        ],
        ["I will remember the number {v}.", "Noted: {v}."],
        ["What is the number?", "What is my number?", "Which number did I tell you?", "What was the number?"],
        ["The number is {v}."],
        "The number is {v}.",
    ),
    (
        "code",
        ["The code is {v}.", "My booking code is {v}.", "Remember the code {v}."],
        ["I will remember the code {v}."],
        ["What is the code?", "What was the code?", "Which code did I give you?"],
        ["The code is {v}."],
        "The code is {v}.",
    ),
    (
        "invented",
        ["The secret word is {v}.", "The password is {v}.", "Remember the word {v}."],
        ["I will remember the word {v}."],
        ["What is the secret word?", "What is the word?", "What was the password?", "Which word did I tell you?"],
        ["The word is {v}."],
        "The word is {v}.",
    ),
    (
        "person",
        ["My cat is called {v}.", "I have a dog called {v}.", "My pet is {v}."],
        ["{v} is a lovely name!"],
        ["What is my pet called?", "What is the name of my pet?"],
        ["Your pet is called {v}."],
        "The pet is called {v}.",
    ),
    (
        "person",
        ["My sister is called {v}.", "My brother's name is {v}.", "My friend {v} is here."],
        ["Please say hello to {v}!"],
        ["What is the name of my family member?", "Who did I tell you about?"],
        ["You told me about {v}."],
        "The user told me about {v}.",
    ),
    (
        "person_zh",
        ["我叫{v}。", "我的名字是{v}。", "你好，我是{v}。", "我是{v}", "我叫{v}"],
        ["很高兴认识你，{v}！", "你好，{v}！有什么可以帮你的吗？"],
        ["我叫什么名字？", "我叫什么？", "你还记得我的名字吗？", "我是谁？"],
        ["你叫{v}。"],
        "用户叫{v}。",
    ),
    (
        "city_zh",
        ["我住在{v}。", "我来自{v}。", "我在{v}"],
        ["{v}是个好地方！"],
        ["我住在哪里？", "我住在哪个城市？", "我来自哪里？"],
        ["你住在{v}。"],
        "用户住在{v}。",
    ),
    (
        "color_zh",
        ["我最喜欢{v}。", "我喜欢的颜色是{v}。"],
        ["{v}很漂亮！"],
        ["我喜欢什么颜色？", "我最喜欢的颜色是什么？"],
        ["你喜欢{v}。"],
        "用户喜欢{v}。",
    ),
    (
        "small",
        ["我今年{v}岁。", "我{v}岁了"],
        ["{v}岁，真好！"],
        ["我几岁？", "我多大了？"],
        ["你{v}岁。"],
        "用户{v}岁。",
    ),
    (
        "number",
        ["请记住数字{v}。", "数字是{v}。"],
        ["我记住了：{v}。"],
        ["数字是多少？", "我说的数字是多少？"],
        ["数字是{v}。"],
        "数字是{v}。",
    ),
]


def is_chinese(text: str) -> bool:
    """True when the text has a Chinese character."""
    return any("\u4e00" <= c <= "\u9fff" for c in text)


def thought(text: str) -> str:
    """What the model thinks before it answers a plain message in words."""
    if is_chinese(text):
        return f"用户说：{text}我可以直接回答。" if len(text) < 30 else "这个问题我可以直接回答。"
    return f"The user says: {text} I can answer this in words." if len(text) < 60 else "I can answer this in words."


def say(words: Words, exchange: Exchange) -> list[Message]:
    """One exchange of small talk."""
    asked = loosely(words, words.one(exchange[0]))
    return [Message("user", asked), Message("assistant", words.one(exchange[1]), think=thought(asked))]


def loosely(words: Words, said: str) -> str:
    """As people type it: now and then without capitals or without the last sign."""
    if words.chance(0.12):
        said = said.lower()
    return said.rstrip(".!?。！？") or said if words.chance(0.12) else said


def identity(words: Words) -> Dialogue:
    """The model is asked who it is, at once or after some small talk."""
    chinese = words.chance(0.35)
    own = [e for e in exchanges(chinese) if any("ernie-tiny" in answer or "script" in answer for answer in e[1])]
    messages = system(words, 0.3)
    for _ in range(words.one((0, 0, 0, 1))):
        messages += say(words, words.one(exchanges(chinese)))
    for exchange in words.rng.sample(own, words.one((1, 1, 2))):
        messages += say(words, exchange)
    return Dialogue(messages, thinking=words.chance(0.2))


def exchanges(chinese: bool) -> list[Exchange]:
    """The small talk of a language."""
    return CHINESE if chinese else ENGLISH


def system(words: Words, share: float = 0.4) -> list[Message]:
    """A system prompt, sometimes."""
    return [Message("system", words.one(SYSTEMS))] if words.chance(share) else []


def small_talk(words: Words) -> Dialogue:
    """One to three exchanges of small talk."""
    chinese = words.chance(0.4)
    messages = system(words)
    for _ in range(words.one((1, 1, 1, 2, 3))):
        messages += say(words, words.one(exchanges(chinese)))
    return Dialogue(messages, thinking=words.chance(0.25))


def memory(words: Words, fillers: tuple[int, ...] = (0, 0, 1, 1, 2, 3), fact: int | None = None) -> Dialogue:
    """The user tells something, talks of other things, and asks for it. `fact` is an index of `FACTS`."""
    told = [FACTS[fact]] if fact is not None else words.rng.sample(FACTS, words.one((1, 1, 2)))
    chinese = is_chinese(told[0][1][0])
    told = [f for f in told if is_chinese(f[1][0]) == chinese and (f is told[0] or f[4] != told[0][4])]
    values = [words.draw(kind) for kind, *_ in told]
    messages = system(words)
    for (_, tells, confirms, *_), v in zip(told, values, strict=True):
        said = words.one(tells).format(v=v)
        messages += [Message("user", said), Message("assistant", words.one(confirms).format(v=v), think=thought(said))]
    for _ in range(words.one(fillers)):
        messages += say(words, words.one(exchanges(chinese)))
    order = list(range(len(told)))
    words.rng.shuffle(order)
    for n in order:
        _, _, _, asks, answers, think = told[n]
        messages += [
            Message("user", words.one(asks)),
            Message("assistant", words.one(answers).format(v=values[n]), think=think.format(v=values[n])),
        ]
    return Dialogue(messages, thinking=words.chance(0.25))


def persona(words: Words) -> Dialogue:
    """The system prompt says who the assistant is, or who the user is."""
    v = words.draw("person")
    if words.chance(0.6):
        setting = words.one(
            ["Your name is {v}.", "You are {v}, a friendly assistant.", "You are called {v}. Be brief.", "You are {v}."]
        )
        asked = words.one(["What is your name?", "Who are you?", "What's your name?", "What should I call you?"])
        answer, think = "My name is {v}.", "My name is {v}."
    else:
        setting = words.one(["The user is called {v}.", "You are talking to {v}.", "The name of the user is {v}."])
        asked = words.one(["What is my name?", "Who am I?", "Do you know my name?"])
        answer, think = "Your name is {v}.", "The user's name is {v}."
    messages = [Message("system", setting.format(v=v))]
    for _ in range(words.one((0, 0, 1))):
        messages += say(words, words.one([e for e in ENGLISH if not any("name" in a or "ernie" in a for a in e[1])]))
    messages += [Message("user", asked), Message("assistant", answer.format(v=v), think=think.format(v=v))]
    return Dialogue(messages, thinking=words.chance(0.25))


def _repeat(words: Words) -> tuple[str, str]:
    v = words.draw(words.one(("text", "title", "invented", "full_name", "code", "number", "thing")))
    return words.one(
        ["Say {v}", "Repeat after me: {v}", "Please say: {v}", "Repeat: {v}", "Write this: {v}", "Echo {v}"]
    ).format(v=v), v


def _repeat_zh(words: Words) -> tuple[str, str]:
    v = words.draw(words.one(("person_zh", "city_zh", "thing_zh", "number")))
    return words.one(["请说{v}", "跟我说：{v}", "重复：{v}"]).format(v=v), v


def _sum(words: Words) -> tuple[str, str]:
    a, b = words.rng.randint(0, 20), words.rng.randint(0, 20)
    return words.one(
        [f"What is {a} + {b}?", f"{a} + {b} = ?", f"What is {a} plus {b}?", f"Add {a} and {b}."]
    ), f"{a} + {b} = {a + b}"


def _who(words: Words) -> tuple[str, str]:
    count = words.one((2, 2, 3, 4))
    people, kind = [words.draw("person") for _ in range(count)], words.one(("city", "small", "thing", "color"))
    verb, asked = {
        "city": ("lives in", "Where does {p} live?"),
        "small": ("is", "How old is {p}?"),
        "thing": ("has a", "What does {p} have?"),
        "color": ("likes", "Which color does {p} like?"),
    }[kind]
    values = [words.draw(kind) for _ in people]
    n = words.rng.randrange(count)
    facts = " ".join(f"{p} {verb} {v}." for p, v in zip(people, values, strict=True))
    return f"{facts} {asked.format(p=people[n])}", f"{people[n]} {verb} {values[n]}."


def _extract(words: Words) -> tuple[str, str]:
    person, city, age = words.draw("person"), words.draw("city"), words.draw("small")
    asked = words.one(["Answer in JSON", "Reply in JSON", "Give JSON", "Extract as JSON"])
    text, keys = words.one(
        [
            (f"{person} lives in {city}.", {"name": person, "city": city}),
            (f"{person} is {age} years old.", {"name": person, "age": int(age)}),
            (f"{person} is {age} years old and lives in {city}.", {"name": person, "age": int(age), "city": city}),
        ]
    )
    names = words.one([" with the keys " + ", ".join(keys), ""])
    return f"{asked}{names}: {text}", json.dumps(keys, ensure_ascii=False)


TASKS: list[Callable[[Words], tuple[str, str]]] = [_repeat, _repeat, _repeat_zh, _sum, _who, _who, _extract]


def task(words: Words) -> Dialogue:
    """One or two small tasks: say this, add that, who lives where, as JSON please."""
    messages = system(words, 0.2)
    for _ in range(words.one((1, 1, 2))):
        asked, answer = words.one(TASKS)(words)
        messages += [Message("user", asked), Message("assistant", answer, think=thought(asked))]
    return Dialogue(messages, thinking=words.chance(0.2))


def plain(words: Words) -> str:
    """Text without any tag, as the completions endpoint continues it."""
    kind = words.rng.random()
    if kind < 0.6:
        return words.one(PLAIN)
    if kind < 0.8:
        asked, answer = words.one([_who, _sum])(words)
        return f"Question: {asked}\nAnswer: {answer}"
    v, c, a = words.draw("person"), words.draw("city"), words.draw("animal")
    walk = f"Every morning {v} walks through {c} with the {a}, and in the evening {v} and the {a} go home."
    return f"{v} lives in {c}. {v} has a {a}. {walk}"
