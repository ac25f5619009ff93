"""The data of `ernie-tiny`: what it says, what it keeps back, and that the template says the same."""

import json
import random
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer as ServedTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from tiny import batches, copying, talk, tokens, tools, tooluse, words  # scripts are no package of ours

KINDS = [
    talk.small_talk,
    talk.identity,
    talk.memory,
    talk.persona,
    talk.task,
    tooluse.single,
    tooluse.parallel,
    tooluse.together,
    tooluse.no_tool,
    tooluse.session,
    tooluse.drill,
    lambda drawn: drawn.one(tooluse.contrast(drawn)),
]


@pytest.fixture(scope="module")
def render():
    tokenizer = ServedTokenizer.from_folder(ERNIE_TINY)
    template = ChatTemplate.from_folder(ERNIE_TINY, tokenizer)
    assert template is not None
    return lambda *args, **options: tokenizer.decode(template.render(*args, **options), skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_template_says_what_training_said(kind, render):
    drawn = words.Words(random.Random(7))
    for _ in range(25):
        dialogue = kind(drawn)
        published = [m.published() for m in dialogue.messages]
        variables = {"enable_thinking": dialogue.thinking}
        text = render(published, tools=dialogue.tools, variables=variables)
        assert text == dialogue.prompt()
        whole = render(published, tools=dialogue.tools, add_generation_prompt=False, variables=variables)
        assert whole == "".join(text for text, _ in dialogue.pieces())


def test_arguments_as_text_or_as_object_render_alike(render):
    def asked(arguments):
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return render([{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}])

    assert asked('{"a": "\u00e9"}') == asked({"a": "\u00e9"})


def test_training_and_held_out_values_never_meet():
    for kind in words.KINDS:
        if kind in words.UNDIVIDED:
            continue
        seen = {words.Words(random.Random(1)).draw(kind) for _ in range(50)}
        kept = words.Words(random.Random(2), held_out=True)
        assert not seen & {kept.draw(kind) for _ in range(50)}


def test_every_right_answer_stands_in_the_prompt():
    drawn = words.Words(random.Random(3), held_out=True)
    for _ in range(100):
        dialogue = tooluse.single(drawn, answered=0.0)
        call = next(m for m in dialogue.messages if m.calls)
        question = dialogue.messages[dialogue.messages.index(call) - 1].content
        name, arguments = call.calls[0]
        assert name in [t["function"]["name"] for t in dialogue.tools]
        assert all(
            str(value) in question or str(value).rstrip("0").rstrip(".") in question for value in arguments.values()
        )


def test_one_question_over_two_lists_is_called_where_its_tool_is_and_refused_where_not():
    drawn = words.Words(random.Random(6))
    for _ in range(50):
        called, refused, *more = tooluse.contrast(drawn)
        (name, _), names = (
            called.messages[-1].calls[0],
            [[t["function"]["name"] for t in d.tools] for d in (called, refused)],
        )
        assert called.messages[-2] == refused.messages[-2]
        assert len(names[0]) == len(names[1])
        assert name in names[0]
        assert not refused.messages[-1].calls
        assert all(d.tools in (called.tools, refused.tools) for d in more)


def test_a_question_where_no_tool_fits_is_for_none_of_the_list():
    drawn = words.Words(random.Random(9))
    for _ in range(100):
        listed = tooluse.tool_list(drawn, [], 3)
        keys = {t.key for t in listed}
        assert len(keys) == 3
        for near in (tools.draw_near(drawn, t, keys) for t in listed):
            assert near.key not in keys


def test_every_character_of_a_held_out_chinese_word_is_seen_in_training():
    seen, kept = words.Words(random.Random(1)), words.Words(random.Random(2), held_out=True)
    characters = {c for _ in range(3000) for c in seen.draw("city_zh") + seen.draw("thing_zh")}
    assert {c for _ in range(300) for c in kept.draw("city_zh") + kept.draw("thing_zh")} <= characters


def test_the_tokens_that_decide_weigh_most():
    tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
    drawn = batches.Batches(tokenizer, 5, 4000, 2048, 512, 0.0)
    (document,) = drawn.encode([[("hello", False), ('good {"name": "Rome"}', True)]], random.Random(1), 0.0)
    start, name = len(tokenizer.encode("hello").ids), len(tokenizer.encode('hellogood {"name": "').ids)
    expected = [0.0] * start + [1.0] * (len(document.ids) - start)
    expected[start] = expected[name] = batches.DECISION
    assert document.weights == expected


def test_prompts_are_learned_less_and_less():
    tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
    drawn = batches.Batches(tokenizer, 5, 4000, 2048, 512, 1.0)
    first, last = ([d.weights for group in drawn.step(3, place) for d in group] for place in (0.0, 1.0))
    assert all(all(weights) for weights in first)
    left_out = [weight == 0 for weights in last for weight in weights]
    assert sum(left_out) > len(left_out) / 2


def test_same_seed_same_documents():
    tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
    first, second = (batches.Batches(tokenizer, 5, 4000, 2048, 512, 0.1).step(11, 0.5) for _ in range(2))
    assert first == second
    assert all(len(d.ids) <= 512 and len(d.ids) == len(d.weights) for group in first for d in group)


def test_tokenizer_gives_any_text_back():
    tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
    drawn = words.Words(random.Random(4), held_out=True)
    texts = ["".join(t for t, _ in copying.lesson(drawn)) for _ in range(50)] + [
        " a  b\n\n c ",
        "\U0001f600 \u9f98\u00e9",
        "x" * 300,
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_name_has_the_same_pieces_after_a_space_and_after_a_quotation_mark():
    tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
    for name in ("Lisbon", "Nairobi", "Kestrin"):
        after_space, after_quote = tokenizer.encode(f"in {name}?").tokens, tokenizer.encode(f'{{"{name}"}}').tokens
        pieces = after_space[after_space.index("\u2581") + 1 : -1]
        assert "".join(pieces) == name
        assert json.dumps(pieces)[1:-1] in json.dumps(after_quote)


def test_control_tokens_are_one_piece_each():
    tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
    for token in [*tokens.SPECIAL, *tokens.CONTROL]:
        assert tokenizer.encode(token).tokens == [token]
    assert [tokenizer.token_to_id(t) for t in tokens.SPECIAL] == [0, 1, 2]
    assert tokenizer.encode("\n0").tokens == ["<0x0A>", "0"]
