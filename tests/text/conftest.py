"""Two small tokenizers of the family's kinds, with its special tokens, and its two chat templates."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from ernie_serve.text.tokenizer import Tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
CONTROL = [
    "<|end_of_sentence|>",
    "<|begin_of_sentence|>",
    "<mask:1>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
]
TAGS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
TRAINING_TEXT = [
    "User: Hello, who are you? I am an assistant that answers in one sentence.",
    "Assistant: It is <b>bold</b> | {name: value} [1, 2] im_start im_end think response tool_call",
    "北京是中国的首都，今天的天气很好。你好，世界！",
    "def main():\n    return {'a': 1}\n\n",
    "<global_setting>\nthink_mode=True\n</global_setting> <system_setting> function arguments location",
]

PT_TEMPLATE = """\
{%- if not add_generation_prompt is defined -%}
    {%- set add_generation_prompt = true -%}
{%- endif -%}
{{- cls_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + sep_token -}}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""

THINKING_TEMPLATE = """\
{%- set start = "<|im_start|>" -%}
{%- set end = "<|im_end|>\\n\\n" -%}
{%- set ns = namespace(turns=messages) -%}
{{- start + "system\\n" -}}
{%- if messages[0].role == "system" -%}
    {{- "<system_setting>\\n" + messages[0].content + "\\n</system_setting>\\n\\n" -}}
    {%- set ns.turns = messages[1:] -%}
{%- endif -%}
{{- "<global_setting>\\nthink_mode=True\\n</global_setting>" -}}
{%- if tools -%}
    {{- "\\n\\n<tool_list>\\n[" -}}
    {%- for tool in tools -%}
        {{- tool | tojson -}}
        {%- if not loop.last %}{{ ", " }}{% endif -%}
    {%- endfor -%}
    {{- "]\\n</tool_list>" -}}
{%- endif -%}
{{- end -}}
{%- for message in ns.turns -%}
    {%- if message.role == "assistant" -%}
        {{- start + "assistant\\n" -}}
        {%- if message.reasoning_content is defined -%}
            {{- "<think>\\n" + message.reasoning_content + "\\n</think>\\n" -}}
        {%- endif -%}
        {%- if message.content -%}
            {{- "<response>\\n" + message.content + "\\n</response>\\n" -}}
        {%- endif -%}
        {%- for call in message.tool_calls or [] -%}
            {{- "\\n<tool_call>\\n" + {"name": call.function.name, "arguments": call.function.arguments} | tojson -}}
            {{- "\\n</tool_call>\\n" -}}
        {%- endfor -%}
        {{- end -}}
    {%- elif message.role == "tool" -%}
        {{- start + "user\\n<tool_response>\\n" + message.content + "\\n</tool_response>" + end -}}
    {%- else -%}
        {{- start + message.role + "\\n" + message.content + end -}}
    {%- endif -%}
{%- endfor -%}
{{- start + "assistant\\n<think>\\n" -}}
"""


def _add_controls(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in TAGS])
    return tokenizer


def _metaspace() -> tokenizers.Tokenizer:
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *byte_pieces], show_progress=False)
    learner.train_from_iterator([text.replace("\n", " ") for text in TRAINING_TEXT], trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(learnt["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return _add_controls(tokenizer)


def _byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return _add_controls(tokenizer)


@pytest.fixture(scope="session", params=["metaspace", "byte_level"])
def tokenizer_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json, once for each kind of vocabulary."""
    folder = tmp_path_factory.mktemp(request.param)
    built = _metaspace() if request.param == "metaspace" else _byte_level()
    built.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "mask_token": {"content": "<mask:1>", "__type": "AddedToken", "lstrip": False},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


@pytest.fixture(scope="session")
def pt_template() -> str:
    return PT_TEMPLATE


@pytest.fixture(scope="session")
def thinking_template() -> str:
    return THINKING_TEMPLATE
