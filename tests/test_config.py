"""Settings: sources, precedence, and errors that name what is wrong."""

from pathlib import Path

import pytest

from ernie_serve import config
from ernie_serve.errors import SettingsError

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def _file(folder: Path, text: str) -> Path:
    path = folder / "preset.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(tmp_path: Path) -> None:
    file = _file(tmp_path, "port = 1\nmax-num-seqs = 2\nthreads = 3\n")
    environ = {"ERNIE_SERVE_PORT": "4", "ERNIE_SERVE_MAX_NUM_SEQS": "5", "OTHER": "6"}
    settings, origins = config.load({"port": "7"}, config=file, environ=environ)
    assert (settings.port, settings.max_num_seqs, settings.threads, settings.max_num_batched_tokens) == (7, 5, 3, 2048)
    assert origins["port"] == "flag --port"
    assert origins["max_num_seqs"] == "environment ERNIE_SERVE_MAX_NUM_SEQS"
    assert origins["threads"] == f"file {file}"
    assert origins["max_num_batched_tokens"] == "default"


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GiB", 4 << 30), ("512m", 512_000_000), ("1.5gib", 3 << 29), ("1000", 1000), (7, 7), ("2 kib", 2048)],
)
def test_byte_counts_are_read_with_units(text: str | int, count: int) -> None:
    assert config.load({"kv_cache_memory_bytes": text}, environ={})[0].kv_cache_memory_bytes == count


def test_names_are_read_from_lists_and_from_commas(tmp_path: Path) -> None:
    file = _file(tmp_path, 'served-model-name = ["a", "b"]\n')
    assert config.load({}, config=file, environ={})[0].served_model_name == ("a", "b")
    assert config.load({}, environ={"ERNIE_SERVE_SERVED_MODEL_NAME": "a, b"})[0].served_model_name == ("a", "b")


def test_names_of_a_flag_are_split_at_commas_and_empty_ones_are_dropped() -> None:
    flags = {
        "served_model_name": ["a, b,", "c"],
        "api_key": ["k[1,'k2\""],
        "allowed_origins": ["https://a.com,http://[::1]:3000", "*", "null", "app://obsidian.md"],
    }
    settings, _ = config.load(flags, environ={})
    assert settings.served_model_name == ("a", "b", "c")
    assert settings.api_key == ("k[1", "'k2\"")
    assert settings.allowed_origins == ("https://a.com", "http://[::1]:3000", "*", "null", "app://obsidian.md")


def test_quotes_and_brackets_are_those_of_a_list_only_where_they_close() -> None:
    for text, keys in (("['a', \"b\"]", ("a", "b")), ("[a,b'", ("[a", "b'")), ('"a"', ("a",)), ("", ()), ("[]", ())):
        assert config.load({}, environ={"ERNIE_SERVE_API_KEY": text})[0].api_key == keys


def test_a_list_as_json_may_be_a_flag_too() -> None:
    assert config.load({"api_key": ['["a", "b"]']}, environ={})[0].api_key == ("a", "b")


@pytest.mark.parametrize("name", ["served_model_name", "api_key"])
@pytest.mark.parametrize("given", [[""], [" , "], ["", ","]])
def test_names_that_name_nothing_are_refused(name: str, given: list[str]) -> None:
    with pytest.raises(SettingsError, match=rf"flag {config.flag_name(name)}\): it is empty; give one, or several"):
        config.load({name: given}, environ={})


def test_a_key_with_white_space_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError, match="white space in it; between keys there are commas") as caught:
        config.load({"api_key": ["sk-1 sk-2"]}, environ={})
    assert "sk-1" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "https://a.com/",
        "https://a.com/page",
        "a.com",
        "https://A.com",
        "https://*.a.com",
        "https://a.com:443",
        "https://",
    ],
)
def test_what_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"from flag --allowed-origins\): `.*` is not an origin; give https://host"):
        config.load({"allowed_origins": ["https://b.com", text]}, environ={})


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"max-model-length.*did you mean 'max-model-len'\?$"):
        config.load({}, config=_file(tmp_path, "max-model-length = 5\n"), environ={})
    with pytest.raises(SettingsError, match=r"max_model_length.*did you mean 'max_model_len'\?$"):
        config.load({}, config=_file(tmp_path, "max_model_length = 5\n"), environ={})
    with pytest.raises(SettingsError, match=r"unknown key 'q'\.$"):
        config.load({}, config=_file(tmp_path, "q = 5\n"), environ={})


def test_a_table_in_a_file_is_told_that_settings_stand_in_none(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"a table \[serve\]: settings stand at the top, in no table"):
        config.load({}, config=_file(tmp_path, "[serve]\nport = 5\n"), environ={})


def test_an_unknown_name_in_the_environment_names_the_nearest_and_not_its_value() -> None:
    told = r"ERNIE_SERVE_API_KEYS'; did you mean 'ERNIE_SERVE_API_KEY'\?$"
    with pytest.raises(SettingsError, match=told) as caught:
        config.load({}, environ={"ERNIE_SERVE_API_KEYS": "sk-secret"})
    assert "sk-secret" not in str(caught.value)
    config.load({}, environ={"ERNIE_SERVE_PORTABLE": "1", "OTHER": "1"})


@pytest.mark.parametrize("text", ["port = ", "= 1", "\x00"])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, text: str) -> None:
    file = _file(tmp_path, text)
    with pytest.raises(SettingsError, match="not valid TOML") as caught:
        config.load({}, config=file, environ={})
    assert str(file) in str(caught.value)
    assert "Only TOML is read" not in str(caught.value)


@pytest.mark.parametrize("name", ["vllm.yaml", "vllm.yml", "settings.json", "settings"])
def test_a_file_of_another_form_is_told_that_it_is_to_be_toml(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("max-model-len: 8192\n")
    with pytest.raises(SettingsError, match=r"Only TOML is read, with lines such as max-model-len = 8192$"):
        config.load({}, config=file, environ={})


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        config.load({}, config=tmp_path / "none.toml", environ={})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "x"),
        ("port", "65536"),
        ("dtype", "int3"),
        ("device", "tpu"),
        ("kv_cache_memory_bytes", "4 pounds"),
        ("kv_cache_memory_bytes", "9" * 400),
        ("kv_cache_memory_bytes", "9999999999GiB"),
    ],
)
def test_a_wrong_value_is_told_with_its_name_and_source(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        config.load({}, environ={config.env_name(name): value})
    assert name in str(caught.value)
    assert config.env_name(name) in str(caught.value)


def test_a_key_is_never_shown_in_an_error() -> None:
    with pytest.raises(SettingsError) as caught:
        config.load({"api_key": 5}, environ={})
    assert "5" not in str(caught.value)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_valid(path: Path) -> None:
    config.load({"model": "x"}, config=path, environ={})


def test_the_card_s_preset_has_the_card_s_limits() -> None:
    path = next(path for path in PRESETS if path.stem == "ernie-4.5-21b-a3b")
    settings, _ = config.load({}, config=path, environ={})
    assert settings.max_model_len == 131_072
    assert settings.max_output_tokens == 8_000
    assert "baidu/ernie-4.5-21b-a3b" in settings.served_model_name


def test_responses_are_kept_in_memory_unless_a_file_is_named(tmp_path: Path) -> None:
    assert config.load({}, environ={})[0].responses_file is None
    file = _file(tmp_path, 'responses-file = "/var/lib/r.sqlite"\n')
    assert config.load({}, config=file, environ={})[0].responses_file == "/var/lib/r.sqlite"


def of_a_service(name: str) -> dict[str, str]:
    """What Kubernetes tells every pod of a service, after `name` in capitals."""
    return {
        f"{name}_SERVICE_HOST": "10.96.0.12",
        f"{name}_SERVICE_PORT": "8000",
        f"{name}_SERVICE_PORT_HTTP": "8000",
        f"{name}_PORT": "tcp://10.96.0.12:8000",
        f"{name}_PORT_8000_TCP": "tcp://10.96.0.12:8000",
        f"{name}_PORT_8000_TCP_ADDR": "10.96.0.12",
        f"{name}_PORT_8000_TCP_PORT": "8000",
        f"{name}_PORT_8000_TCP_PROTO": "tcp",
    }


@pytest.mark.parametrize("name", ["ERNIE_SERVE", "ERNIE_SERVE_CANARY", "ERNIE_SERVE_MODEL", "ERNIE_SERVE_21B_PORT"])
def test_what_kubernetes_says_of_a_service_that_is_called_like_us_is_not_ours(name: str) -> None:
    settings, origins = config.load({}, environ=of_a_service("ERNIE_SERVE") | of_a_service(name))
    assert settings == config.load({}, environ={})[0]
    assert set(origins.values()) == {"default"}
    ours = {"ERNIE_SERVE_PORT": "9000", "ERNIE_SERVE_MODEL": "m", "ERNIE_SERVE_HOST": "::1"}
    settings, _ = config.load({}, environ=of_a_service(name) | ours)
    assert (settings.port, settings.model, settings.host) == (9000, "m", "::1")


@pytest.mark.parametrize("typo", ["ERNIE_SERVE_PORTS", "ERNIE_SERVE_CANARY_PORT", "ERNIE_SERVE_CANARY_HOST"])
def test_a_name_beside_those_of_a_service_is_refused_as_ever(typo: str) -> None:
    for beside in ({}, of_a_service("ERNIE_SERVE"), of_a_service("ERNIE_SERVE_BLUE")):
        with pytest.raises(SettingsError, match=f"{typo}'"):
            config.load({}, environ={typo: "8000"} | beside)
    with pytest.raises(SettingsError, match="ERNIE_SERVE_CANARY_PORTS'"):
        config.load({}, environ=of_a_service("ERNIE_SERVE_CANARY") | {"ERNIE_SERVE_CANARY_PORTS": "8000"})
