import json
import re
from pathlib import Path

import pytest
from folded import fold

import ernie_serve
from ernie_serve.grammar.tools import Framing
from ernie_serve.text.detokenize import Detokenizer
from ernie_serve.text.formats import OutputFormat, ReasoningTokens
from ernie_serve.text.stream import TAGS
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer

BUNDLED = Path(ernie_serve.__file__).parent / "bundled" / "ernie-tiny"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "北京 🙂", "n": 1.5}'}},
    {"id": "2", "type": "function", "function": {"name": "get_weather", "arguments": '{"q": "\\"}\\\\ </tool_call>"}'}},
]
QUESTION = {"role": "user", "content": "<response> hi <think>"}


@pytest.fixture(scope="session")
def thinking(tokenizer, thinking_template):
    return ChatTemplate(thinking_template, tokenizer)


@pytest.fixture(scope="session")
def plain(tokenizer, pt_template):
    return ChatTemplate(pt_template, tokenizer)


@pytest.fixture(scope="session")
def tiny():
    if not (BUNDLED / "tokenizer.json").is_file():
        pytest.skip("the bundled tokenizer is not here")
    tokenizer = Tokenizer.from_folder(BUNDLED)
    return tokenizer, ChatTemplate.from_folder(BUNDLED, tokenizer)


def without_tags(tokenizer_folder):
    """The same vocabulary, in which the tags are ordinary text."""
    description = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in TAGS]
    return Tokenizer(description, {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"})


def test_a_plain_template_makes_plain_answers(tokenizer, plain):
    form = OutputFormat(plain, tokenizer)
    prompt = plain.render([QUESTION])
    assert (form.thinks, form.framed, form.start(prompt)) == (False, False, "text")
    assert fold(form.stream(prompt).push("<response>x</response>")).content == "<response>x</response>"


def test_a_thinking_template_starts_answers_in_reasoning(tokenizer, thinking):
    form = OutputFormat(thinking, tokenizer)
    prompt = thinking.render([QUESTION])
    assert (form.thinks, form.framed, form.start(prompt)) == (True, True, "reasoning")
    assert fold(form.stream(prompt).push("x")).reasoning == "x"


def test_without_control_tokens_the_prompts_end_tells_where_an_answer_starts(tokenizer_folder, thinking_template):
    tokenizer = without_tags(tokenizer_folder)
    template = ChatTemplate(thinking_template, tokenizer)
    form = OutputFormat(template, tokenizer)
    assert form.end_of_think_id is None
    assert form.start(template.render([QUESTION])) == "reasoning"
    assert form.start(tokenizer.encode("<think>\n\n</think>\n\n")) == "answer"
    assert form.start(tokenizer.encode("</think>\n\n<response>\n")) == "response"
    assert form.start([]) == "answer"


@pytest.mark.parametrize(
    ("end", "start"),
    [
        ("<|im_start|>assistant\n", "answer"),
        ("<|im_start|>assistant\n<think>\n", "reasoning"),
        ("<|im_start|>assistant\n<think>\nso far", "reasoning"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "answer"),
        ("<|im_start|>assistant\n<response>\nso far", "response"),
        ("<|im_start|>assistant\n<response>\nx\n</response>\n", "answer"),
    ],
)
def test_the_last_control_token_tells_where_an_answer_starts(tokenizer, thinking, end, start):
    form = OutputFormat(thinking, tokenizer)
    assert form.start(tokenizer.encode(end)) == start
    told_by_a_client = tokenizer.encode("<think> <response>", parse_special=False)
    assert form.start(tokenizer.encode("<|im_start|>assistant\n") + told_by_a_client) == "answer"
    assert form.start(tokenizer.encode(end), bound=True) == ("reasoning" if start == "reasoning" else "text")


@pytest.mark.parametrize(("switch", "start"), [({}, "answer"), ({"enable_thinking": True}, "reasoning")])
def test_the_bundled_templates_switch_tells_where_an_answer_starts(tiny, switch, start):
    tokenizer, template = tiny
    assert OutputFormat(template, tokenizer).start(template.render([QUESTION], variables=switch)) == start


def test_hidden_tokens_are_the_special_ones_that_frame_nothing(tokenizer, thinking, tiny):
    hidden = OutputFormat(thinking, tokenizer).hidden_ids
    assert {tokenizer.token_id("<|im_end|>"), tokenizer.token_id("</s>")} <= hidden
    assert not hidden & {tokenizer.token_id(tag) for tag in TAGS}
    bundled, template = tiny
    hidden = OutputFormat(template, bundled).hidden_ids
    assert bundled.token_id("<tool_list>") in hidden
    assert not hidden & {bundled.token_id(tag) for tag in TAGS}


def test_what_ends_reasoning_is_known_in_tokens(tokenizer, thinking):
    form = OutputFormat(thinking, tokenizer)
    assert form.end_of_think_id == tokenizer.token_id("</think>")
    assert form.end_of_think_id in form.end_of_think_ids
    events = form.stream(thinking.render([QUESTION])).push("r" + tokenizer.decode(form.end_of_think_ids) + "x")
    assert (fold(events).reasoning, fold(events).content) == ("r", "x")


def test_forced_calls_are_framed_as_the_templates_frame_them(tokenizer, thinking, plain):
    turns = [QUESTION, {"role": "assistant", "content": "", "tool_calls": CALLS}]
    text = tokenizer.decode(thinking.render(turns, add_generation_prompt=False), skip_special_tokens=False)
    form, frame = OutputFormat(thinking, tokenizer), Framing()
    assert (form.begin_call_id, form.end_call_id) == (
        tokenizer.token_id("<tool_call>"),
        tokenizer.token_id("</tool_call>"),
    )
    begin, end = frame.before + frame.begin + frame.after_begin, frame.before_end + frame.end + frame.after
    head = "<|im_start|>assistant" + "\n"
    assert head + begin + '{"name": "get_weather", "arguments": {"city"' in text
    assert "}" + end + begin + "{" in text
    for each, last in ((form, end), (OutputFormat(plain, tokenizer), frame.before_end + frame.end)):
        stream = each.stream(tokenizer.encode("</think>") if each.framed else [], tools=["f"])
        one = begin + '{"name": "f", "arguments": {"a": 1}}' + last
        message = fold(stream.push(one + one) + stream.flush())
        assert message.content is None
        assert message.calls == [("f", '{"a": 1}')] * 2


@pytest.mark.parametrize("switch", [{}, {"enable_thinking": True}])
def test_what_the_bundled_template_writes_is_read_back(tiny, switch):
    """Through token ids: the turn that the template renders is the answer that the model would make."""
    tokenizer, template = tiny
    form = OutputFormat(template, tokenizer)
    question = {"role": "user", "content": "weather?"}
    answer = {"role": "assistant", "content": "好的。", "reasoning_content": "Think.", "tool_calls": CALLS}
    prompt = template.render([question], tools=[TOOL], variables=switch)
    whole = template.render([question, answer], tools=[TOOL], variables=switch, add_generation_prompt=False)
    assert whole[: len(prompt)] == prompt
    stream, detokenizer = form.stream(prompt, tools=["get_weather"]), Detokenizer(tokenizer, skip_special_tokens=False)
    shown = [token_id for token_id in whole[len(prompt) :] if token_id not in form.hidden_ids]
    message = fold([event for i in shown for event in stream.push(detokenizer.push([i]))] + stream.flush())
    assert (message.content, message.reasoning) == ("好的。", "Think." if switch else None)
    assert message.calls == [(call["function"]["name"], call["function"]["arguments"]) for call in CALLS]


@pytest.mark.parametrize(
    ("start", "text", "reasoning"),
    [
        ("reasoning", "so it is\n</think>\n\nyes", "so it is\n</think>"),
        ("reasoning", "so it is", "so it is"),
        ("reasoning", "a</think></think>b", "a</think>"),
        ("answer", "\n<think>\nso</think>yes", "\n<think>\nso</think>"),
        ("answer", "yes <think> no </think>", ""),
        ("response", "<think> no </think>", ""),
        ("text", "<think> no </think>", ""),
    ],
)
@pytest.mark.parametrize("as_controls", [True, False])
def test_reasoning_is_counted_by_token(tokenizer, start, text, reasoning, as_controls):
    pieces = re.split("(</?think>)", text)
    ids = [i for piece in pieces for i in tokenizer.encode(piece, parse_special=as_controls)]
    counter = ReasoningTokens(tokenizer, start)
    for each in ids:
        counter.push([each])
    assert tokenizer.decode(ids[: counter.num_tokens]) == reasoning
