import json
import shutil

import pytest

from ernie_serve.errors import CheckpointError
from ernie_serve.text.generation import GenerationDefaults
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    return shutil.copytree(tokenizer_folder, tmp_path / "copy")


def read(folder, tokenizer):
    return GenerationDefaults.from_folder(folder, tokenizer, ChatTemplate.from_folder(folder, tokenizer))


def write(folder, name, **values):
    (folder / name).write_text(json.dumps(values))


def test_stop_ids_are_those_of_both_files(folder, tokenizer):
    write(folder, "config.json", eos_token_id=2)
    write(folder, "generation_config.json", eos_token_id=[5, 2])
    assert read(folder, tokenizer).stop_token_ids == (2, 5)


def test_a_folder_without_the_files_states_nothing(folder, tokenizer):
    assert read(folder, tokenizer) == GenerationDefaults()


@pytest.mark.parametrize(
    ("name", "ends"),
    [("pt_template", ["</s>", "<|end_of_sentence|>"]), ("thinking_template", ["</s>", "<|im_end|>"])],
)
def test_a_chat_also_stops_where_its_template_ends_a_turn(folder, tokenizer, request, name, ends):
    write(folder, "config.json", eos_token_id=5)
    (folder / "chat_template.jinja").write_text(request.getfixturevalue(name))
    defaults = read(folder, tokenizer)
    assert defaults.stop_ids(chat=False) == (5,)
    assert set(defaults.stop_ids(chat=True)) == {5, *map(tokenizer.token_id, ends)}


def test_a_turn_end_that_is_an_ordinary_piece_stops_nothing(folder, tokenizer, thinking_template):
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    description["model"]["vocab"].update({token["content"]: token["id"] for token in description["added_tokens"]})
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] != "<|im_end|>"]
    path.write_text(json.dumps(description))
    (folder / "chat_template.jinja").write_text(thinking_template)
    defaults = read(folder, Tokenizer.from_folder(folder))
    assert defaults.chat_stop_token_ids == (tokenizer.token_id("</s>"),)


def test_without_a_template_a_chat_has_no_stops_of_its_own(folder, tokenizer):
    write(folder, "config.json", eos_token_id=5)
    assert read(folder, tokenizer).chat_stop_token_ids == (5,)


def test_sampling_values_are_read(folder, tokenizer):
    stated = {"temperature": 0.8, "top_p": 1, "top_k": 0, "repetition_penalty": 1.1}
    write(folder, "generation_config.json", **stated, do_sample=True)
    defaults = read(folder, tokenizer)
    assert {key: getattr(defaults, key) for key in stated} == stated


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", "2"),
        ("eos_token_id", [2, True]),
        ("eos_token_id", -1),
        ("eos_token_id", 10**9),
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_k", 10**30),
        ("repetition_penalty", 0),
    ],
)
def test_a_malformed_value_names_file_and_key(folder, tokenizer, key, value):
    write(folder, "generation_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf'generation_config\.json: "{key}"'):
        read(folder, tokenizer)
