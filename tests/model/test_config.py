"""A config.json of either layout becomes a shape, or an error that names the key."""

import json

import pytest

from ernie_serve.errors import CheckpointError
from ernie_serve.model.config import ModelConfig

MOE = {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}
DENSE = {
    key: value
    for key, value in MOE.items()
    if not key.startswith("moe_") and key not in ("architectures", "model_type")
} | {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "head_dim": 128, "hidden_size": 1024}


def without(values, *keys):
    return {key: value for key, value in values.items() if key not in keys}


def test_reads_the_21b_geometry():
    config = ModelConfig.from_dict(MOE)
    assert (config.head_dim, config.rope_theta, config.bos_token_id) == (128, 500000.0, 1)
    assert [config.is_moe_layer(i) for i in (0, 1, 27, 28)] == [False, True, True, False]
    assert config.shared_intermediate_size == 3072
    assert config.dtype == "bfloat16"


def test_reads_the_dense_geometry_whose_heads_are_wider_than_the_hidden_size():
    config = ModelConfig.from_dict(DENSE)
    assert config.num_attention_heads * config.head_dim == 2560 != config.hidden_size
    assert not any(config.is_moe_layer(i) for i in range(28))


def test_accepts_the_older_spelling_of_the_dense_architecture():
    assert ModelConfig.from_dict(DENSE | {"architectures": ["Ernie4_5_ForCausalLM"]}).moe_num_experts == 0


@pytest.mark.parametrize("values", [MOE | {"moe_layer_end_index": -1}, without(MOE, "moe_layer_end_index")])
def test_end_index_minus_one_or_absent_is_the_last_layer(values):
    config = ModelConfig.from_dict(values)
    assert config.moe_layer_end_index == 27
    assert config.is_moe_layer(27)


def test_interval_two_routes_every_second_layer():
    config = ModelConfig.from_dict(MOE | {"moe_layer_interval": 2})
    assert [config.is_moe_layer(i) for i in range(5)] == [False, True, False, True, False]


def test_rope_theta_is_read_from_its_new_place_too():
    values = without(MOE, "rope_theta", "rope_scaling")
    config = ModelConfig.from_dict(values | {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})
    assert config.rope_theta == 10000.0


def test_what_the_network_does_not_use_may_be_anything():
    unused = {"eos_token_id": [2, "3"], "pad_token_id": -1, "num_nextn_predict_layers": "many"}
    assert ModelConfig.from_dict(MOE | unused) == ModelConfig.from_dict(MOE)


def test_new_dtype_key_is_read():
    assert ModelConfig.from_dict(without(MOE, "torch_dtype") | {"dtype": "float32"}).dtype == "float32"


def test_keys_that_serving_does_not_need_are_ignored():
    extra = {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "fuse_rope": True}
    assert ModelConfig.from_dict(MOE | extra) == ModelConfig.from_dict(MOE)


def test_reads_a_paddle_style_config():
    values = without(MOE, "torch_dtype", "hidden_act", "moe_norm_min", "moe_layer_end_index", "rope_scaling")
    values |= {"dtype": "bfloat16", "moe_use_aux_free": True, "use_rmsnorm": True, "compression_ratio": 1.0}
    assert ModelConfig.from_dict(values) == ModelConfig.from_dict(MOE)


def test_tied_head_may_be_unsaid_only_in_a_file_that_torch_tools_wrote():
    assert ModelConfig.from_dict(without(MOE, "tie_word_embeddings")).tie_word_embeddings
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        ModelConfig.from_dict(without(MOE, "tie_word_embeddings", "torch_dtype"))


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "moe_num_experts",
        "moe_k",
        "moe_intermediate_size",
        "moe_num_shared_experts",
        "moe_layer_start_index",
        "moe_layer_interval",
    ],
)
def test_a_missing_key_without_a_safe_default_is_named(key):
    with pytest.raises(CheckpointError, match=f'"{key}" is missing'):
        ModelConfig.from_dict(without(MOE, key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("model_type", "ernie4_5_moe_vl"),
        ("architectures", ["Ernie4_5ForCausalLM"]),
        ("architectures", [["Ernie4_5_MoeForCausalLM"]]),
        ("architectures", [{}]),
        ("hidden_act", "gelu"),
        ("use_bias", True),
        ("attention_bias", True),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_theta": 1.0, "rope_type": "dynamic"}),
        ("rope_parameters", {"rope_theta": 500000.0, "mrope_section": [22, 22, 20]}),
        ("rope_scaling", "linear"),
        ("vision_config", {"depth": 32}),
        ("sliding_window", 4096),
        ("compression_ratio", 2.0),
        ("quantization_config", {"quant_method": "gptq"}),
        ("moe_gate_act", "sigmoid"),
        ("moe_norm_gate_logits", False),
        ("moe_num_experts", [64, 64]),
        ("moe_k", 65),
        *((key, 10**30) for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")),
        *((key, 10**30) for key in ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")),
        *((key, 10**30) for key in ("moe_num_experts", "moe_intermediate_size", "moe_num_shared_experts")),
        ("num_hidden_layers", 10**12),
        ("moe_layer_interval", 10**30),
        ("moe_k", 0),
        ("moe_num_shared_experts", -1),
        ("moe_layer_start_index", 28),
        ("moe_norm_min", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 127),
        ("hidden_size", 2561),
        ("hidden_size", "2560"),
        ("vocab_size", True),
        ("rms_norm_eps", -1e-5),
        ("rope_theta", 0),
        ("rope_theta", 10**400),
        ("tie_word_embeddings", "yes"),
        ("torch_dtype", "int8"),
        ("bos_token_id", "1"),
        ("bos_token_id", 103424),
    ],
)
def test_what_is_not_implemented_or_impossible_is_refused_by_name(key, value):
    named = {"hidden_size": "hidden_size|head_dim"}.get(key, key)
    with pytest.raises(CheckpointError, match=named):
        ModelConfig.from_dict(MOE | {key: value})


def test_two_different_thetas_are_refused():
    with pytest.raises(CheckpointError, match="rope_theta"):
        ModelConfig.from_dict(MOE | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}})


def test_experts_in_a_dense_model_are_refused():
    with pytest.raises(CheckpointError, match="moe_num_experts"):
        ModelConfig.from_dict(DENSE | {"moe_num_experts": 8})


def test_null_key_value_heads_are_as_many_as_query_heads():
    assert ModelConfig.from_dict(MOE | {"num_key_value_heads": None}).num_key_value_heads == 20


def test_reads_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(MOE)


@pytest.mark.parametrize("content", [None, "{", "[1]", "[" * 100_000])
def test_a_folder_without_a_readable_config_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        ModelConfig.from_dict(MOE).hidden_size = 1
