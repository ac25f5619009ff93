import json
import random
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ernie_serve.errors import CheckpointError, InvalidRequest
from ernie_serve.text.conversation import normalise_messages
from ernie_serve.text.template import ChatTemplate

FRAGMENTS = [
    *["<|im_start|>", "<|im_end|>", "<|end_of_sentence|>", "<s>", "</s>", "<mask:1>", "<think>", "</think>"],
    *[
        "<|IM_END|>",
        "<a|im_end|>",
        "<|im_aend|>",
        "<tool_call>",
        "</response>",
        "<",
        "<|",
        "<|im_",
        "end|>",
        "|>",
        ">",
        "\ufdd0",
        '"',
        "\\",
        "\n",
        " ",
        "a",
        "你",
    ],
]
hostile = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)
benign = st.lists(
    st.sampled_from(["Hello", " ", "\n", "你好", "🙂", "1 < 2", "<b>", "</b>", "|", ">", "<", "User: ", "assistant"]),
    max_size=8,
).map("".join)


def messages_of(text):
    call = st.fixed_dictionaries(
        {
            "id": text,
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": text, "arguments": st.dictionaries(text, text, max_size=2).map(json.dumps)}
            ),
        }
    )
    return st.lists(
        st.one_of(
            st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": text}),
            st.fixed_dictionaries(
                {"role": st.just("assistant"), "content": text},
                optional={"tool_calls": st.lists(call, max_size=2), "reasoning_content": text, "name": text},
            ),
        ),
        min_size=1,
        max_size=5,
    )


def tools_of(text):
    function = st.fixed_dictionaries(
        {"name": text, "description": text, "parameters": st.dictionaries(text, st.lists(text, max_size=2), max_size=2)}
    )
    return st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": function}), max_size=2)


LOWERING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | lower | replace('a', '') }}<|im_end|>{% endfor %}"
)
TIGHT = "{% for m in messages %}{{ m.content | trim }}{{ m.content }}{% endfor %}<|im_start|>"
SPLITTING = "{% for m in messages %}{{ m.content.split('a') | join('') }}<|im_end|>{% endfor %}"
ASCII = "{% for m in messages %}{{ m | tojson(ensure_ascii=true) }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="session")
def templates(tokenizer, pt_template, thinking_template):
    sources = {"pt": pt_template, "thinking": thinking_template, "lowering": LOWERING, "tight": TIGHT}
    sources |= {"splitting": SPLITTING, "ascii": ASCII}
    return {name: ChatTemplate(source, tokenizer) for name, source in sources.items()}


@pytest.fixture(scope="session")
def reference(tokenizer_folder):
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


def apply(reference, template, messages, **options):
    """What transformers makes of the same messages."""
    options.setdefault("add_generation_prompt", True)
    return reference.apply_chat_template(messages, chat_template=template.source, return_dict=False, **options)


def harmless(value):
    """The same shape without a dangerous letter."""
    if isinstance(value, str):
        return "x" if value else ""
    if isinstance(value, dict):
        return {key if key in _KEYS else "k": harmless(item) if key != "role" else item for key, item in value.items()}
    return [harmless(item) for item in value] if isinstance(value, list) else value


_KEYS = {
    *["role", "content", "tool_calls", "id", "type", "function", "name", "arguments", "description", "parameters"],
    *["reasoning_content", "thinking"],
}


@pytest.mark.parametrize("name", ["pt", "thinking", "lowering", "tight", "splitting", "ascii"])
@settings(deadline=None, max_examples=40, derandomize=True)
@given(messages=messages_of(hostile), tools=tools_of(hostile))
def test_what_clients_write_never_becomes_a_control_token(tokenizer, templates, name, messages, tools):
    template = templates[name]
    ids = template.render(messages, tools=tools)
    plain = normalise_messages(messages, split_reasoning=template.thinks)
    own = template.render([harmless(message) for message in plain], tools=harmless(tools))
    controls = tokenizer.control_ids
    assert [i for i in ids if i in controls] == [i for i in own if i in controls]


@pytest.mark.parametrize("name", ["pt", "thinking", "lowering", "tight"])
@settings(deadline=None, max_examples=30, derandomize=True)
@given(messages=messages_of(benign), tools=tools_of(benign), prompted=st.booleans())
def test_other_text_is_tokenised_as_transformers_does(reference, templates, name, messages, tools, prompted):
    template = templates[name]
    ids = template.render(messages, tools=tools or None, add_generation_prompt=prompted)
    plain = normalise_messages(messages)
    assert ids == apply(reference, template, plain, tools=tools or None, add_generation_prompt=prompted)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(messages=messages_of(hostile), tools=tools_of(hostile))
def test_the_text_itself_is_what_transformers_renders(tokenizer, reference, templates, messages, tools):
    template = templates["thinking"]
    text = tokenizer.decode(template.render(messages, tools=tools or None), skip_special_tokens=False)
    plain = normalise_messages(messages, split_reasoning=True)
    assert text == apply(reference, template, plain, tools=tools or None, tokenize=False).replace("\ufdd0", "\ufffd")


PT_CASES = [
    (["user:Hello, who are you?"], "User: Hello, who are you?\nAssistant: "),
    (["system:You are terse.", "user:Hi"], "You are terse.\nUser: Hi\nAssistant: "),
    (
        ["system:S", "user:a", "assistant:b", "user:c"],
        "S\nUser: a\nAssistant: b<|end_of_sentence|>User: c\nAssistant: ",
    ),
    (
        ["user:weather?", "assistant:x", "tool:{...}", "user:y"],
        "User: weather?\nAssistant: x<|end_of_sentence|>User: y\nAssistant: ",
    ),
]


@pytest.mark.parametrize(("turns", "expected"), PT_CASES)
def test_the_pt_template_writes_the_known_prompts(tokenizer, templates, turns, expected):
    messages = [dict(zip(("role", "content"), turn.split(":", 1), strict=True)) for turn in turns]
    ids = templates["pt"].render(messages)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin_of_sentence|>" + expected
    assert tokenizer.token_bytes(ids[-1]).endswith(b" ")


def test_the_thinking_template_writes_the_known_prompt(tokenizer, templates):
    ids = templates["thinking"].render(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], add_generation_prompt=False
    )
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\n<system_setting>\nBe brief.\n</system_setting>\n\n<global_setting>\nthink_mode=True\n"
        "</global_setting><|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n<|im_start|>assistant\n<think>\n"
    )


def test_raw_answers_sent_back_are_framed_by_the_template(tokenizer, templates):
    raw = "r\n</think>\n\n<response>\na\n</response>\n"
    split = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    ids = templates["thinking"].render([{"role": "user", "content": "q"}, {"role": "assistant", "content": raw}])
    assert ids == templates["thinking"].render([{"role": "user", "content": "q"}, split])
    assert ids.count(tokenizer.token_id("</think>")) == 1


def test_what_a_template_can_is_told_from_its_source(templates):
    assert (templates["pt"].uses_tools, templates["pt"].thinks) == (False, False)
    assert (templates["thinking"].uses_tools, templates["thinking"].thinks) == (True, True)


def test_a_role_cannot_be_made_into_a_control_token(tokenizer):
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", tokenizer)
    ids = template.render([{"role": "im_end", "content": "x"}, {"role": "<s>", "content": "x"}])
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids) == "<|im_end|>x<|<s>|>x"


def test_variables_reach_the_template_as_text(tokenizer):
    template = ChatTemplate("{{ a }}{{ b }}{{ messages | length }}", tokenizer)
    ids = template.render([], variables={"a": "</s>", "b": False})
    assert tokenizer.decode(ids) == "</s>False0"
    assert tokenizer.control_ids.isdisjoint(ids)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].x.y }}",
        "{{ 'a' + 1 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_a_400_about_the_messages(tokenizer, source):
    template = ChatTemplate(source, tokenizer, max_steps=10_000)
    with pytest.raises(InvalidRequest) as caught:
        template.render([{"role": "user", "content": "secret"}])
    assert caught.value.param == "messages"
    assert "secret" not in caught.value.message


def test_nesting_without_end_is_a_400(templates):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidRequest):
        templates["thinking"].render([{"role": "user", "content": "a"}], tools=[{"a": deep}])
    for _ in range(100_000):  # taken apart by hand: the interpreter's own way down is recursive
        deep = deep[0]


def test_the_words_of_a_template_reach_the_client(tokenizer):
    template = ChatTemplate("{{ raise_exception('Roles must alternate.') }}", tokenizer)
    with pytest.raises(InvalidRequest, match=r"refuses these messages: Roles must alternate\.$"):
        template.render([])


def write(folder, target, **config):
    copy = shutil.copytree(folder, target)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def test_templates_are_found_where_checkpoints_keep_them(tokenizer_folder, tokenizer, tmp_path):
    folder = write(tokenizer_folder, tmp_path / "a", chat_template="in config")
    assert ChatTemplate.from_folder(folder, tokenizer).source == "in config"
    (folder / "chat_template.jinja").write_text("in a file")
    assert ChatTemplate.from_folder(folder, tokenizer).source == "in a file"
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    folder = write(tokenizer_folder, tmp_path / "b", chat_template=named)
    assert ChatTemplate.from_folder(folder, tokenizer).source == "c"


def test_a_base_checkpoint_has_no_template(tokenizer_folder, tokenizer):
    assert ChatTemplate.from_folder(tokenizer_folder, tokenizer) is None


def test_a_broken_template_is_refused_at_the_start(tokenizer_folder, tokenizer, tmp_path):
    folder = write(tokenizer_folder, tmp_path / "a", chat_template="a\n{% if %}")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: .*line 2"):
        ChatTemplate.from_folder(folder, tokenizer)
    folder = write(tokenizer_folder, tmp_path / "b", chat_template=3)
    with pytest.raises(CheckpointError, match="chat_template"):
        ChatTemplate.from_folder(folder, tokenizer)


def test_a_long_conversation_renders_within_the_limits(templates):
    rng = random.Random(4)
    turns = [{"role": rng.choice(["user", "assistant"]), "content": "Hello " * 20} for _ in range(2048)]
    assert len(templates["thinking"].render(turns)) > 40_000
