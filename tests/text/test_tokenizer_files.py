import json
import shutil

import pytest

from ernie_serve.errors import CheckpointError
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.text.tokenizer_files import read_json, read_tokenizer_files


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    return shutil.copytree(tokenizer_folder, tmp_path / "copy")


def change_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_without_a_tokenizer_says_what_it_needs(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        read_tokenizer_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_a_broken_tokenizer_json_is_named(folder):
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    with pytest.raises(CheckpointError, match=r"cannot be used"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAAA="}),
    ],
    ids=["unreadable", "out of bounds"],
)
def test_a_tokenizer_json_at_which_the_library_panics_is_named(folder, name, value):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=r"cannot be used: the tokenizers library refuses it"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_marks_at_the_ends_of_pieces_are_refused_by_name(folder, name):
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    description["model"][name] = "x"
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=rf"its model has a {name}, 'x'"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("token_id", [float("inf"), [], "x", None])
def test_ids_that_are_none_are_refused(folder, token_id):
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": token_id}))
    with pytest.raises(CheckpointError, match="added tokens of its tokenizer files are malformed"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(("key", "value"), [("id", "x"), ("id", None), ("content", [])])
def test_added_tokens_that_are_none_are_refused(folder, key, value):
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    description["added_tokens"][0][key] = value
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="added tokens of its tokenizer files are malformed"):
        Tokenizer.from_folder(folder)


def test_tokens_of_the_config_are_special_where_it_says_so(folder):
    plain = Tokenizer.from_folder(folder)
    think = plain.token_id("<think>")
    assert plain.decode([think]) == "<think>"
    change_config(folder, added_tokens_decoder={str(think): {"content": "<think>", "special": True}})
    assert Tokenizer.from_folder(folder).decode([think]) == ""


def test_tokens_of_added_tokens_json_are_read(folder):
    size = Tokenizer.from_folder(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": size}))
    grown = Tokenizer.from_folder(folder)
    assert grown.encode("a<|new|>")[-1] == size
    assert size in grown.control_ids


def test_a_piece_named_special_becomes_special(folder):
    piece = Tokenizer.from_folder(folder).encode("think")[0]
    spelling = {index: text for text, index in read_tokenizer_files(folder)[0]["model"]["vocab"].items()}[piece]
    assert piece not in Tokenizer.from_folder(folder).control_ids
    named = {"additional_special_tokens": [spelling, "<absent>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    assert Tokenizer.from_folder(folder).encode(spelling) == [piece]
    assert piece in Tokenizer.from_folder(folder).control_ids


def test_files_that_contradict_each_other_are_refused(folder):
    change_config(folder, added_tokens_decoder={"0": {"content": "<other>"}})
    with pytest.raises(CheckpointError, match="do not belong together"):
        Tokenizer.from_folder(folder)


def test_an_id_outside_the_order_of_the_vocabulary_is_refused(folder):
    (folder / "added_tokens.json").write_text(json.dumps({"<|new|>": 10**6}))
    with pytest.raises(CheckpointError, match="declared as id 1000000"):
        Tokenizer.from_folder(folder)


def test_malformed_added_tokens_are_refused(folder):
    change_config(folder, added_tokens_decoder={"x": {"content": "<a>"}})
    with pytest.raises(CheckpointError, match="malformed"):
        Tokenizer.from_folder(folder)


def test_the_config_has_the_last_word_on_roles(folder):
    (folder / "special_tokens_map.json").write_text(json.dumps({"sep_token": "</s>", "cls_token": {"content": "<s>"}}))
    change_config(folder, cls_token=None)
    roles = Tokenizer.from_folder(folder).role_tokens
    assert (roles["sep_token"], roles["cls_token"]) == ("<|end_of_sentence|>", "<s>")
