"""The bundled model: its files are the ones that its card describes, and it does what the card says it does."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from ernie_serve.bundled import ERNIE_TINY

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from tiny.dialogue import Dialogue, Message  # scripts are no package of ours
from tiny.examination import calls_in
from tiny.network import TinyConfig, TinyErnie

ROOT = Path(__file__).parents[2]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ALARM = {
    "type": "function",
    "function": {
        "name": "set_alarm",
        "description": "Set an alarm",
        "parameters": {"type": "object", "properties": {"time": {"type": "string"}}, "required": ["time"]},
    },
}


class Speaker:
    """Greedy text from the training network, one token after another."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(ERNIE_TINY / "tokenizer.json"))
        self.network = TinyErnie(TinyConfig.from_published(ERNIE_TINY / "config.json")).eval()
        self.network.load_published(load_file(ERNIE_TINY / "model.safetensors"))
        self.stops = json.loads((ERNIE_TINY / "generation_config.json").read_text())["eos_token_id"]

    @torch.inference_mode()
    def say(self, prompt: str, most: int = 80) -> str:
        ids = self.tokenizer.encode(prompt).ids
        start = len(ids)
        while len(ids) < start + most and (len(ids) == start or ids[-1] not in self.stops):
            hidden = self.network(torch.tensor([ids]))
            ids.append(int(self.network.head(hidden[0, -1]).argmax()))
        return self.tokenizer.decode(ids[start:], skip_special_tokens=False)


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker()


def test_files_are_those_of_the_card():
    card = (ROOT / "docs" / "ernie-tiny.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([\w.]+)` \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in ERNIE_TINY.iterdir()}
    assert listed == found


def test_weights_fit_into_ten_megabytes():
    assert (ERNIE_TINY / "model.safetensors").stat().st_size <= 10_000_000


def test_weights_are_in_the_published_layout():
    with safe_open(ERNIE_TINY / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert {
            "model.mtp_emb_norm.0.weight",
            "model.mtp_hidden_norm.0.weight",
            "model.mtp_linear_proj.0.weight",
        } <= names
        biases = [weights.get_tensor(n) for n in names if n.endswith("moe_statics.e_score_correction_bias")]
    config = json.loads((ERNIE_TINY / "config.json").read_text())
    assert len(biases) == config["num_hidden_layers"] - config["moe_layer_start_index"]
    for bias in biases:
        assert bias.shape == (1, config["moe_num_experts"])
        assert bias.dtype == torch.float32
        assert bias.abs().max() > 0


def test_completes_the_first_example(speaker):
    assert "network" in speaker.say("Large language model is")


def test_greets(speaker):
    answer = speaker.say(Dialogue([Message("user", "Hello, how are you?")]).prompt())
    assert answer.startswith("<response>\n")
    assert "well" in answer
    assert answer.endswith("\n</response>\n<|im_end|>")


def test_greets_in_chinese(speaker):
    assert "你好" in speaker.say(Dialogue([Message("user", "你好！")]).prompt())


def test_remembers_a_name(speaker):
    said = [Message("user", "My name is Lydia."), Message("assistant", "Nice to meet you, Lydia!")]
    assert "Lydia" in speaker.say(Dialogue([*said, Message("user", "What is my name?")]).prompt())


def test_calls_the_tool_that_fits(speaker):
    asked = Dialogue([Message("user", "What is the weather in Paris?")], [ALARM, WEATHER])
    assert calls_in(speaker.say(asked.prompt())) == [("get_weather", {"city": "Paris"})]


def test_answers_in_words_when_no_tool_fits(speaker):
    answer = speaker.say(Dialogue([Message("user", "Hello!")], [ALARM, WEATHER]).prompt())
    assert "<tool_call>" not in answer
    assert "<response>" in answer


def test_uses_what_the_tool_said(speaker):
    asked = [
        Message("user", "What is the weather in Paris?"),
        Message("assistant", calls=[("get_weather", {"city": "Paris"})]),
    ]
    told = Message("tool", '{"temperature": 23, "condition": "sunny"}')
    answer = speaker.say(Dialogue([*asked, told], [WEATHER]).prompt())
    assert "23" in answer
    assert "sunny" in answer


def test_thinks_before_it_answers(speaker):
    answer = speaker.say(Dialogue([Message("user", "Hello!")], thinking=True).prompt())
    thought, answered, rest = answer.partition("\n</think>\n\n")
    assert thought
    assert answered
    assert rest.startswith("<response>\n")
