import itertools
import json
import random
import re
import sys

import pytest
from folded import fold
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_serve.text.events import CallArguments, CallBegin, ContentDelta, ReasoningDelta, merged
from ernie_serve.text.json_scanner import JsonScanner
from ernie_serve.text.stream import TAGS, AnswerStream, new_call_id

TOOLS = {"get_weather", "a", "b"}


def stream_of(start, **options):
    count = itertools.count()
    return AnswerStream(start, **{"tools": TOOLS, "new_id": lambda: f"call_{next(count)}"} | options)


def events_of(start, pieces, **options):
    stream = stream_of(start, **options)
    return merged([event for piece in pieces for event in stream.push(piece)] + stream.flush())


def parse(start, text, **options):
    """(reasoning, content, [(name, arguments), …]); whole and letter by letter, which must be the same."""
    events = events_of(start, [text], **options)
    assert events_of(start, text, **options) == events
    return fold(events)


def call(name="a", arguments="{}"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


X = '{"x": 1}'
WEATHER = '{"location": "北京", "o": {"u": "c"}}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abc\n</think>\n\n<response>\ndef\n</response>\n", ("abc", "def", [])),
        (f"abc\n</think>\n\n\n{call('get_weather', WEATHER)}\n", ("abc", None, [("get_weather", WEATHER)])),
        (
            f"abc\n</think>\n\n\n{call('a')}\n\n{call('b', X)}\n",
            ("abc", None, [("a", "{}"), ("b", X)]),
        ),
        ("abc\n</think>\ndef", ("abc", "def", [])),
        ("abc only", ("abc only", None, [])),
        (
            f"r\n</think>\n<response>\nhi\n</response>\n\n\n{call('get_weather', WEATHER)}\n",
            ("r", "hi", [("get_weather", WEATHER)]),
        ),
    ],
)
def test_the_familys_answers(text, expected):
    assert parse("reasoning", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n</think>\n\nx", (None, "x", [])),
        ("</think>x", (None, "x", [])),
        ("\nr\n\n</think>\n\n\n  x\n\n", ("\nr\n", "  x\n\n", [])),
        ("r</think>\n\n<response>x</response>", ("r", "x", [])),
        ("r</think> \n<response>\n\n x \n\n</response> \n", ("r", "\n x \n", [])),
        ("r\n</think>\n\n<response>\n\n</response>\n", ("r", None, [])),
        ("r\n", ("r\n", None, [])),
        ("r\n</thin", ("r\n</thin", None, [])),
        ("r\n</think>\n\n", ("r", None, [])),
        ("a </thinks> <think> b\n</think>c", ("a </thinks> <think> b", "c", [])),
        (f"{call()}\n</think>\n\nx", (call(), "x", [])),
    ],
)
def test_framing_line_breaks_are_taken_off_and_no_others(text, expected):
    assert parse("reasoning", text) == expected


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("<response>\nx\n</resp", "x\n</resp"),
        ("<response>\nx\n", "x\n"),
        ("<response>\nx\n</response>\ny", "x\n</response>\ny"),
        ("<response>\nx\n</response>\ny\n</response>\n", "x\n</response>\ny"),
        ("<response>\nx\n</response>\n</response>\n", "x\n</response>"),
        ("<response>\nSo:\n<response><ok/></response>\nis it.\n</response>", "So:\n<response><ok/></response>\nis it."),
        ("<response>\nx</response></response>", "x</response>"),
        ("x\n<response>\ny\n</response>", "x\n<response>\ny\n</response>"),
        ("x </response>", "x </response>"),
        ("x </think> <think> y", "x </think> <think> y"),
        ("<respons>", "<respons>"),
        ("<respon", "<respon"),
        ("1 < 2 <b> <", "1 < 2 <b> <"),
    ],
)
def test_tags_out_of_place_are_content(text, content):
    assert parse("answer", text) == (None, content, [])


def test_an_answer_may_open_its_own_reasoning():
    assert parse("answer", "\n<think>\nr\n</think>\n\n<response>\nx\n</response>\n") == ("r", "x", [])
    assert parse("answer", "<think>\n\n</think>\n\nx") == (None, "x", [])
    assert parse("answer", "<think>r") == ("r", None, [])
    assert parse("answer", "x<think>r</think>") == (None, "x<think>r</think>", [])
    assert parse("answer", f"{call()}\n<think>r</think>") == (None, "<think>r</think>", [("a", "{}")])
    assert parse("text", "<think>r</think>") == (None, "<think>r</think>", [])


def test_an_answer_may_start_inside_its_frame():
    assert parse("response", "\n more\n</response>\n") == (None, "\n more", [])
    assert parse("response", f"{call()}") == (None, None, [("a", "{}")])


@pytest.mark.parametrize("text", ["", "\n\nhi \n", "<response>\nx\n</response>", "</think>", "\n"])
def test_plain_text_passes_as_it_is(text):
    assert parse("text", text) == parse("text", text, tools=()) == (None, text or None, [])


def test_text_that_nothing_can_change_is_told_at_once():
    stream = stream_of("text", tools=())
    assert stream.push("a \n<") == [ContentDelta("a \n<")]
    stream = stream_of("answer")
    assert stream.push("Hello, ") == [ContentDelta("Hello,")]
    assert stream.push("1 <2") == [ContentDelta(" 1 <2")]
    assert stream.push(" \n<to") == []
    assert stream.push("p>") == [ContentDelta(" \n<top>")]
    assert stream_of("reasoning").push("r\n</thi") == [ReasoningDelta("r")]


# Calls.


@pytest.mark.parametrize("start", ["text", "answer"])
@pytest.mark.parametrize(
    ("text", "content", "names"),
    [
        (call("a"), None, "a"),
        (f"\n{call('a')}\n", None, "a"),
        (f"{call('a')}\n{call('b')}", None, "ab"),
        (call("a") + call("b"), None, "ab"),
        (f"{call('a')}  {call('b')}", None, "ab"),
        (f"One moment. \n\n\n{call('a')}\n", "One moment.", "a"),
        (f"One.\n{call('a')}\nTwo.\n", "One.\nTwo.\n", "a"),
        (f"{call('a')}\n\nTwo.", "Two.", "a"),
        (f"One.\n{call('a')}\nTwo.\n{call('b')}\n\nThree.", "One.\nTwo.\n\nThree.", "ab"),
        ('<tool_call>{"name":"a"}</tool_call>', None, "a"),
        ('<tool_call>\n{"name": "a", "arguments": {}}', None, "a"),
        ('<tool_call>\n{"name": "a", "arguments": {}\n</tool_call>\n', None, "a"),
        ('<tool_call>\n{"name": "a", "arguments": {}}</tool_c', None, "a"),
        ('<tool_call>\n{"name": "a", "arguments": {}}\n' + call("b"), None, "ab"),
        ('<tool_call>\n{"name": "a", "arguments": {}}\nDone.', "Done.", "a"),
        ("<tool_call>\n" + call("a"), "<tool_call>", "a"),
    ],
)
def test_calls_at_the_start_of_a_line(start, text, content, names):
    assert parse(start, text) == (None, content, [(name, "{}") for name in names])


@pytest.mark.parametrize("start", ["text", "answer", "response"])
@pytest.mark.parametrize(
    "text",
    [
        f"Write {call()} to call it.\n",
        f"`{call()}`",
        f"- {call()}",
        f"x\n {call()}",
        "Use <tool_call> tags",
        "<tool_call>\nwords\n</tool_call>\n",
        call("unknown"),
        call("a", '"{}"'),
        call("a", "[]"),
        call("a", "null"),
        "<tool_call>\n{'name': 'a'}\n</tool_call>",
        '<tool_call>\n{"name": "a" "arguments": {}}\n</tool_call>',
        "a\n\n</tool_call>\nb",
    ],
)
def test_what_is_no_call_comes_back_word_for_word(start, text):
    assert parse(start, text) == (None, text, [])


@pytest.mark.parametrize("start", ["text", "answer", "response"])
@pytest.mark.parametrize("before", ["", "Yes.\n"])
@pytest.mark.parametrize(
    "cut", ["<tool_call>", "<tool_call>\n", '<tool_call>\n{"na', '<tool_call>\n{"name": "a", "argum']
)
def test_a_call_that_is_cut_off_before_its_arguments_is_not_told(start, before, cut):
    assert parse(start, before + cut) == (None, before.strip() or None, [])


def test_without_tools_every_call_is_prose():
    assert parse("text", f"x\n{call()}\n", tools=()) == (None, f"x\n{call()}\n", [])
    assert parse("answer", f"<response>\nx\n</response>\n\n{call()}\n", tools=()) == (
        None,
        f"x\n</response>\n\n{call()}\n",
        [],
    )


def test_a_call_inside_the_frame_is_a_call():
    text = f"<response>\nOne moment.\n{call()}\n</response>\n"
    assert parse("answer", text) == (None, "One moment.", [("a", "{}")])
    assert parse("answer", f"<response>\n{call()}\nDone.\n</response>\n{call('b')}") == (
        None,
        "Done.",
        [("a", "{}"), ("b", "{}")],
    )


def test_an_unknown_call_behind_the_frame_leaves_the_frame_whole():
    text = f"<response>\nhi\n</response>\n\n{call('unknown')}"
    assert parse("answer", text) == (None, f"hi\n\n{call('unknown')}", [])


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": "}}\\n</tool_call>", "b": "\\"{\\\\"}',
        '{"a": "</tool_call>"}',
        '{ "城市" : "北京 🙂" , "n" : [ 1.50 , -2e+3 , null ] }',
        '{"a": {"b": {"c": [{}, [], "\\u5317\\ud83d\\ude42"]}}}',
        '{"name": "b", "arguments": {"name": "x"}}',
    ],
)
def test_arguments_are_the_models_own_text(arguments):
    json.loads(arguments)
    assert parse("text", call("a", arguments)) == (None, None, [("a", arguments)])
    other_order = f'<tool_call>\n{{"arguments": {arguments}, "name": "a"}}\n</tool_call>\n'
    assert parse("text", other_order) == (None, None, [("a", arguments)])


def test_the_name_comes_first_and_then_the_arguments_as_they_are_made():
    stream = stream_of("answer")
    assert stream.push('\n<tool_call>\n{"name": "a", "argu') == []
    assert stream.push('ments": ') == []
    assert stream.push('{"x": "lo') == [CallBegin(0, "call_0", "a"), CallArguments(0, '{"x": "lo')]
    assert stream.push("ng") == [CallArguments(0, "ng")]
    assert stream.push('"}') == [CallArguments(0, '"}')]
    assert stream.push('}\n</tool_call>\n\n<tool_call>\n{"name": "b"}') == [
        *[CallBegin(1, "call_1", "b"), CallArguments(1, "{}")]
    ]
    assert stream.flush() == []
    assert stream.has_called


def test_a_call_that_is_cut_off_keeps_what_was_sent():
    text = '<tool_call>\n{"name": "a", "arguments": {"x": "lo'
    assert parse("answer", text) == (None, None, [("a", '{"x": "lo')])


def test_a_call_that_breaks_after_it_was_sent_ends_there():
    assert parse("text", call("a", '{"x": tru!}') + "\nbye") == (
        None,
        "!}}\n</tool_call>\nbye",
        [("a", '{"x": tru')],
    )


def test_nothing_is_told_behind_the_last_call_that_is_wanted():
    stream = stream_of("text", max_calls=1)
    events = stream.push(f"x\n{call('a')}\n{call('b')}\ny")
    assert stream.done
    message = fold(events + stream.push("z") + stream.flush())
    assert message == (None, "x", [("a", "{}")])
    broken = call("a", '{"x": tru!}') + "\nbye"
    assert parse("text", broken, max_calls=1) == (None, None, [("a", '{"x": tru')])


@pytest.mark.parametrize(
    ("text", "has_called"),
    [
        ("words", False),
        (call("a") + call("b"), True),
        (call("a", '{"x": ' + "[" * 500 + "]" * 500 + "}"), True),
        (call("a").removesuffix("}\n</tool_call>"), True),
        (call("a") + call("nothing"), True),
        (call("a", '{"x": tru!}'), False),
        (call("a", '{"x": tru!}') + call("b"), False),
        (call("a") + call("b", '{"x": tru!}'), False),
        (call("a") + '<tool_call>\n{"name": "a", "arguments": {"x": 1', False),
    ],
    ids=lambda value: str(value)[-60:],
)
@pytest.mark.parametrize("step", [1, 7, 10000])
def test_tools_were_called_where_every_call_that_was_sent_is_whole(text, has_called, step):
    stream = stream_of("text")
    for at in range(0, len(text), step):
        stream.push(text[at : at + step])
    stream.flush()
    assert stream.has_called == has_called


def test_ids_look_like_openais_and_differ():
    ids = {new_call_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(re.fullmatch(r"call_[A-Za-z0-9]{24}", each) for each in ids)
    events = events_of("text", [call() + call()], new_id=new_call_id)
    assert len({event.id for event in events if isinstance(event, CallBegin)}) == 2


WORDS = [
    "\n\nfoo",
    "foo\n",
    " foo \n\n",
    "<response>\nfoo\n</response>",
    "</response>",
    "<think>r</think>",
    "\n",
    "</thi",
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("tools", [(), TOOLS])
def test_what_a_grammar_binds_is_told_word_for_word(words, tools):
    assert parse("text", words, tools=tools, bound=True) == (None, words, [])
    assert parse("reasoning", f"r\n</think>{words}", tools=tools, bound=True) == ("r", words, [])


def test_calls_beside_what_a_grammar_binds_are_calls():
    assert parse("text", f"\n{call('a')}\n{call('b')}\n", bound=True) == (None, None, [("a", "{}"), ("b", "{}")])
    assert parse("reasoning", f"r</think>\n{call('a')}\n", bound=True) == ("r", None, [("a", "{}")])


# Fuzz.

PIECES = [
    *TAGS,
    *["\n", "\n\n", " ", "x", "Hello, ", "北京", "🙂", "<", "</", ">", "<tool", "_call>", "</thi", "nk>", "response>"],
    *[
        '{"name": "',
        '{"name": "a", "arguments": ',
        '"arguments": {"k": ["}", 1',
        "}}",
        "}",
        "]",
        '"',
        "\\",
        ", ",
        "tru",
    ],
    *[
        call("a", '{"x": 1}'),
        call("unknown"),
        f"\n{call('b')}\n",
        '<tool_call>\n{"arguments": {"y": "<"}, "name": "b"}',
    ],
]
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
starts = st.sampled_from(["reasoning", "answer", "response", "text"])


@settings(deadline=None, max_examples=1000, derandomize=True)
@given(start=starts, text=texts, seed=st.integers(0, 1000), limit=st.sampled_from([None, 1]), known=st.booleans())
def test_any_cut_tells_the_same_events(start, text, seed, limit, known):
    rng = random.Random(seed)
    options = {"max_calls": limit, "tools": TOOLS if known else ()}
    whole = events_of(start, [text], **options)
    assert events_of(start, text, **options) == whole
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(4))
    pieces = [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]
    assert events_of(start, pieces, **options) == whole


@settings(deadline=None, max_examples=1000, derandomize=True)
@given(start=starts, text=texts)
def test_calls_are_whole_or_the_beginning_of_something_whole(start, text):
    for name, arguments in fold(events_of(start, [text])).calls:
        assert name in TOOLS
        assert arguments.startswith("{")
        scanner, at = JsonScanner(), 0
        while at < len(arguments):
            at, before = scanner.step(arguments, at), at
            assert at > before
        if scanner.done:
            assert isinstance(json.loads(arguments), dict)


def bare(text):
    """A text without what framing is made of."""
    return re.sub("|".join([*TAGS, r"\s"]), "", text)


@settings(deadline=None, max_examples=1000, derandomize=True)
@given(start=starts, text=texts, tools=st.sampled_from([("another",), ()]))
def test_nothing_but_framing_is_lost(start, text, tools):
    message = fold(events_of(start, [text], tools=tools))
    assert bare((message.reasoning or "") + (message.content or "")) == bare(text)
    if start == "text":
        assert message.content == (text or None)


class Copied(str):
    """A text that counts the characters that are copied out of it."""

    num_chars = 0

    def __getitem__(self, place):
        piece = str.__getitem__(self, place)
        Copied.num_chars += len(piece)
        return piece

    def __radd__(self, before):
        Copied.num_chars += len(before) + len(self)
        return Copied(str.__add__(before, self))


def work_of(start, pieces):
    """How many functions run, Python's own included, and how many characters are copied."""
    stream = stream_of(start)
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    Copied.num_chars = 0
    sys.setprofile(counted)
    try:
        for piece in pieces:
            stream.push(Copied(piece))
        stream.flush()
    finally:
        sys.setprofile(None)
    return count, Copied.num_chars


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("start", ["reasoning", "answer", "response", "text"])
@pytest.mark.parametrize(
    "unit",
    [
        *["<", "\n", "</", "\n</thin", "\n</respons", "</response>\n", "\n</response>", "</think>", "<response>"],
        *[
            "<tool_call>",
            "\n<tool_call>",
            '\n<tool_call>{"',
            '\n<tool_call>{"a":',
            '\n<tool_call>{"name":"a","arguments":{',
        ],
        *[call(), call("unknown"), "\n\n" + call("a", '{"a": [[[1, 2], {}], "\\\\"]}')],
    ],
)
def test_the_work_grows_with_the_text_and_no_faster(unit, start, one_by_one):
    def work(repeats):
        text = unit * repeats
        return work_of(start, text if one_by_one else [text])

    once, twice = work(40), work(80)
    assert twice[0] < 2.2 * once[0] + 40
    assert twice[1] < 2.2 * once[1] + 40


@pytest.mark.parametrize("head", ['"', "[", "[1,", '{"b":', "1", " "])
def test_the_work_grows_with_a_calls_arguments_and_no_faster(head):
    def work(repeats):
        return work_of("text", ['<tool_call>{"name": "a", "arguments": {"a": ', *(head * repeats)])

    once, twice = work(100), work(200)
    assert twice[0] < 2.2 * once[0] + 40
    assert twice[1] < 2.2 * once[1] + 40
