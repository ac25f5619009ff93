"""What is free is found where the system says it, and the cache is made to fit."""

from dataclasses import replace

import pytest
import torch

from ernie_serve.engine_process import advice_for
from ernie_serve.errors import NotEnoughMemory, SettingsError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.quantize import model_bytes, parameter_shapes, widened_bytes
from ernie_serve.model.random_checkpoint import GEOMETRIES
from ernie_serve.model.recipes import Quantization
from ernie_serve.worker import memory

CPU = torch.device("cpu")
F32 = torch.float32
BLOCK = 2 * 3 * 4 * 2 * 16 * 4  # keys and values, layers, tokens, heads, head size, bytes


def machine(root, available=1000):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999 kB\nMemFree: 10 kB\nMemAvailable: {available} kB\n")
    return root


def put(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_cache_larger_than_what_is_free_is_refused_with_both_numbers(tiny_config):
    with pytest.raises(NotEnoughMemory, match=r"--kv-cache-memory-bytes asks for 1048576\.00 GiB; .* free on cpu"):
        plan(tiny_config, kv_cache_memory_bytes=1 << 50)


def test_without_groups_the_available_memory_is_free(tmp_path):
    assert memory.free_bytes(CPU, machine(tmp_path)) == 1000 * 1024


def test_a_group_of_version_2_and_those_above_it_bound_what_is_free(tmp_path):
    machine(tmp_path)
    put(tmp_path, "proc/self/cgroup", "0::/outer/inner\n")
    put(tmp_path, "sys/fs/cgroup/outer/inner/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/outer/inner/memory.current", "5\n")
    put(tmp_path, "sys/fs/cgroup/outer/memory.max", "300000\n")
    put(tmp_path, "sys/fs/cgroup/outer/memory.current", "120000\n")
    put(tmp_path, "sys/fs/cgroup/outer/memory.stat", "anon 1\ninactive_file 20000\n")
    assert memory.free_bytes(CPU, tmp_path) == 200000


def test_a_group_of_version_1_bounds_what_is_free(tmp_path):
    machine(tmp_path)
    put(tmp_path, "proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/box\n0::/\n")
    put(tmp_path, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", "9223372036854771712\n")
    put(tmp_path, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", "7\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "1000\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "600\n")
    put(tmp_path, "sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50\n")
    assert memory.free_bytes(CPU, tmp_path) == 450


def test_a_machine_that_says_nothing_of_its_memory_is_told_what_is_missing(tmp_path):
    with pytest.raises(NotEnoughMemory, match=r"not known here: .* Mount /proc"):
        memory.free_bytes(CPU, tmp_path)


def test_this_machine_has_memory():
    assert memory.free_bytes(CPU) > 1 << 20


def test_a_block_holds_keys_and_values_of_all_layers(tiny_config):
    assert memory.bytes_per_block(tiny_config, F32, 4) == BLOCK
    assert memory.bytes_per_block(tiny_config, torch.bfloat16, 4) == BLOCK // 2


def test_as_many_blocks_as_fit_and_no_more(tiny_config):
    assert memory.blocks_that_fit(tiny_config, F32, 5 * BLOCK - 1, block_size=4) == 4
    assert memory.blocks_that_fit(tiny_config, F32, 5 * BLOCK, block_size=4, max_model_len=20) == 5


def test_a_text_that_does_not_fit_is_refused_with_both_numbers_and_the_flags(tiny_config):
    with pytest.raises(NotEnoughMemory) as caught:
        memory.blocks_that_fit(tiny_config, F32, 5 * BLOCK, block_size=4, max_model_len=21)
    message = str(caught.value)
    assert f"--kv-cache-memory-bytes to {6 * BLOCK}" in message
    assert "--max-model-len to 20" in message


def test_sizes_below_a_gib_are_told_in_mib(tiny_config):
    with pytest.raises(NotEnoughMemory, match=r"needs 11\.7 MiB; 5\.9 MiB are there"):
        memory.blocks_that_fit(tiny_config, F32, 2000 * BLOCK, block_size=4, max_model_len=16_000)


def test_not_even_one_block_is_refused(tiny_config):
    with pytest.raises(NotEnoughMemory, match="--kv-cache-memory-bytes"):
        memory.blocks_that_fit(tiny_config, F32, BLOCK - 1, block_size=4)


def plan(config, free=None, monkeypatch=None, **settings):
    if free is not None:
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    settings = {
        "block_size": 4,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "gpu_memory_utilization": 0.9,
    } | settings
    return memory.plan_cache(config, F32, CPU, **settings)


def test_a_given_size_is_taken_at_its_word(tiny_config):
    cache = plan(tiny_config, kv_cache_memory_bytes=100 * BLOCK)
    assert (cache.num_blocks, cache.num_bytes, cache.max_model_len) == (100, 100 * BLOCK, 400)


def test_no_more_is_taken_than_all_requests_could_use(tiny_config, monkeypatch):
    cache = plan(tiny_config, 1 << 34, monkeypatch, max_model_len=41)
    assert (cache.num_blocks, cache.max_model_len) == (22, 41)


def test_on_a_cpu_at_most_4_gib_are_taken_unasked(tiny_config, monkeypatch):
    cache = plan(tiny_config, 1 << 40, monkeypatch, max_num_seqs=1000)
    assert (4 << 30) - BLOCK < cache.num_bytes <= 4 << 30
    assert cache.max_model_len == 131072


def test_on_a_cpu_the_cache_leaves_room_for_what_is_remembered_later(tiny_config, monkeypatch):
    for free, left in ((1 << 30, 256 << 20), (200 << 20, 45 << 20), (4 << 30, 407 << 20)):
        cache = plan(tiny_config, free, monkeypatch, max_num_seqs=10_000)
        assert left < free - cache.num_bytes < left + (32 << 20)  # and the largest step


def test_texts_are_as_long_as_the_checkpoint_allows_or_the_cache_holds(tiny_config):
    assert plan(tiny_config, kv_cache_memory_bytes=10 * BLOCK).max_model_len == 40
    short = replace(tiny_config, max_position_embeddings=12)
    assert plan(short, kv_cache_memory_bytes=10 * BLOCK).max_model_len == 12


def test_a_step_that_does_not_fit_names_its_flags(tiny_config, monkeypatch):
    with pytest.raises(NotEnoughMemory, match="--max-num-batched-tokens or --max-num-seqs"):
        plan(tiny_config, 1000, monkeypatch)


def test_a_longer_text_than_the_checkpoint_reads_is_refused(tiny_config):
    with pytest.raises(SettingsError, match="--max-model-len 131073"):
        memory.require_length(tiny_config, 131073)
    memory.require_length(tiny_config, 131072)
    memory.require_length(tiny_config, None)


def test_weights_that_do_not_fit_are_refused_before_they_are_read(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    memory.require_room(999, CPU, 1, "Buy more.")
    for passing in (0, 4900):
        with pytest.raises(NotEnoughMemory, match=r"are free on cpu\. Buy more\."):
            memory.require_room(5000 - passing, CPU, passing, "Buy more.")


CARD = ModelConfig.from_dict(GEOMETRIES["21b"])
GPU = torch.device("cuda:0")


def on_a_card(monkeypatch, quantization, kept=torch.bfloat16, gib=24, **settings):
    """Pretend a GPU of so many GiB that has taken the weights, with the settings' defaults."""
    total = gib << 30
    weights = model_bytes(parameter_shapes(CARD), quantization, torch.bfloat16)
    monkeypatch.setattr(memory, "device_bytes", lambda device: total)
    monkeypatch.setattr(memory, "free_bytes", lambda device: total - (512 << 20))
    memory.require_room(weights, GPU, 0, advice_for(CARD, parameter_shapes(CARD), quantization, torch.bfloat16, GPU))
    monkeypatch.setattr(memory, "free_bytes", lambda device: total - (512 << 20) - weights)
    sizes = {"block_size": 16, "max_num_seqs": 64, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.92}
    smaller = () if quantization else ("--quantization int4",)
    sizes["widened_bytes"] = widened_bytes(parameter_shapes(CARD), quantization, torch.bfloat16)
    return memory.plan_cache(CARD, torch.bfloat16, GPU, cache_dtype=kept, smaller=smaller, **sizes | settings)


def test_the_21b_in_int4_fits_a_gpu_of_24_gb_with_a_long_context(monkeypatch):
    plan = on_a_card(monkeypatch, Quantization.of("int4", "cuda"))
    assert plan.max_model_len == 131072
    assert plan.num_bytes > 7 << 30


def test_the_21b_as_it_is_is_told_what_it_needs_and_what_would_fit(monkeypatch):
    with pytest.raises(NotEnoughMemory) as caught:
        on_a_card(monkeypatch, None)
    message = str(caught.value)
    assert (
        "The weights need 40.66 GiB; 23.50 GiB are free on cuda:0. With --quantization int4 they need 11.41 GiB;"
        in message
    )
    assert message.endswith("or use a GPU with more memory.")


def test_a_cache_of_8_bits_holds_twice_the_text(monkeypatch):
    int4 = Quantization.of("int4", "cuda")
    plain = on_a_card(monkeypatch, int4, kv_cache_memory_bytes=4 << 30)
    eight = on_a_card(monkeypatch, int4, torch.float8_e4m3fn, kv_cache_memory_bytes=4 << 30)
    assert eight.num_blocks == 2 * plain.num_blocks


@pytest.mark.parametrize(("tokens", "seqs"), [(512, 256), (2048, 64), (8192, 256)])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8])
def test_the_largest_step_over_the_longest_text_has_room_beside_the_cache(monkeypatch, tokens, seqs, kept):
    """All that the 21B in int4 has on a card of 24 GiB at once, from its shapes and from nothing else."""
    settings = {"max_num_batched_tokens": tokens, "max_num_seqs": seqs, "max_scored_tokens": 256, "block_size": 64}
    plan = on_a_card(monkeypatch, Quantization.of("int4", "cuda"), kept, **settings)
    assert plan.max_model_len == 131072
    slots = 6 + 2  # six experts, and two parts of the shared MLP
    layer = slots * (1536 + 2560) * 2 + 4 * 2560 * 2  # between the matrices and behind them; the stream and its norms
    logits = 103424 * (2 + 5 * 4)
    at_once = {
        "weights": 12_250_674_944,
        "experts": tokens * layer,
        "the dense layer's gate and up, made wide here and in a recording": 2 * (2 * 12288 * 2560) * 2,
        "keys and values in order": 131072 * 2 * 4 * 128 * 2,
        "sampling": seqs * logits,
        "scored prompts' logits": 256 * 103424 * 2,
        "a recorded step": seqs * (layer + 103424 * (2 + 4)),
        "16 parts of long contexts": seqs * 16 * 20 * (128 + 1) * 4,
        "cache": plan.num_bytes,
    }
    used_by_cuda = 512 << 20
    assert sum(at_once.values()) + used_by_cuda <= 0.92 * (24 << 30)


def test_scored_prompts_count_where_few_requests_run():
    alone = memory.step_bytes(CARD, torch.bfloat16, 512, 1)
    scored = memory.step_bytes(CARD, torch.bfloat16, 512, 1, 256)
    assert scored - alone == 103424 * (257 * 2 + 3 * 64 * 4) - 103424 * 22
    many = memory.step_bytes(CARD, torch.bfloat16, 512, 256)
    more = memory.step_bytes(CARD, torch.bfloat16, 512, 256, 256) - many
    assert more == 103424 * 256 * 2, "their logits; sampling takes more copies than scoring"


def test_on_a_gpu_a_text_has_room_for_its_cache_and_for_what_is_gathered_of_it(monkeypatch):
    """16 GiB leave little beside the weights: every token counts twice, and no more than there are."""
    plan = on_a_card(monkeypatch, Quantization.of("int4", "cuda"), gib=16)
    each, gathered = 2 * 28 * 4 * 128 * 2, 2 * 4 * 128 * 2
    assert plan.num_bytes == plan.num_blocks * 16 * each
    longer = on_a_card(monkeypatch, Quantization.of("int4", "cuda"), gib=16, max_model_len=plan.max_model_len)
    assert longer.num_blocks == plan.num_blocks
    with pytest.raises(NotEnoughMemory, match=f"Set --max-model-len {plan.max_model_len} or --kv-cache-dtype int8"):
        on_a_card(monkeypatch, Quantization.of("int4", "cuda"), gib=16, max_model_len=plan.max_model_len + 16)
    assert gathered * plan.max_model_len > 40 << 20


def test_on_a_gpu_short_texts_have_room_for_what_is_gathered_of_several(monkeypatch):
    """Of 2,048 tokens there are eight at once; a card that has no room for that is told a length that it has."""
    int4, short = Quantization.of("int4", "cuda"), {"gib": 16, "max_model_len": 2048, "max_num_seqs": 256}
    alone = on_a_card(monkeypatch, int4, **short).num_bytes
    monkeypatch.setattr(memory, "SHORT", 1 << 18)
    gathered = 2 * 4 * 128 * 2 * ((1 << 18) - 16384)
    assert abs(alone - on_a_card(monkeypatch, int4, **short).num_bytes - gathered) < 1 << 20, "to whole blocks"
    with pytest.raises(NotEnoughMemory, match="Set --max-model-len ") as caught:
        on_a_card(monkeypatch, int4, gib=16, max_model_len=40000)
    told = int(str(caught.value).split("--max-model-len ")[1].split()[0])
    assert on_a_card(monkeypatch, int4, gib=16, max_model_len=told).num_blocks * 16 >= told


def test_on_a_gpu_that_has_no_more_the_flags_that_help_are_told(monkeypatch):
    int4, long = Quantization.of("int4", "cuda"), {"max_model_len": 131072}
    with pytest.raises(NotEnoughMemory, match=r"Set --max-model-len \d+ or --quantization int4\.$"):
        on_a_card(monkeypatch, None, gib=46, **long)
    with pytest.raises(NotEnoughMemory, match=r"Set --max-model-len \d+\.$"):
        on_a_card(monkeypatch, int4, torch.float8_e4m3fn, gib=15, **long)
    with pytest.raises(NotEnoughMemory, match=r"--max-num-batched-tokens 2048 or --kv-cache-dtype int8\.$"):
        on_a_card(monkeypatch, int4, gib=22, max_num_batched_tokens=8192, max_num_seqs=256, max_model_len=120000)


def test_a_step_without_room_on_a_gpu_is_told_what_is_kept_free(monkeypatch):
    with pytest.raises(NotEnoughMemory) as caught:
        on_a_card(monkeypatch, None, gib=44)
    assert (
        "0.0 MiB are free, 2.84 GiB more are kept free by --gpu-memory-utilization 0.92. "
        "Raise --gpu-memory-utilization, or set --quantization int4." in str(caught.value)
    )
    on_a_card(monkeypatch, None, gib=44, gpu_memory_utilization=0.98)
