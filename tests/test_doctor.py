"""The doctor's figures follow from the config and the probe, and its advice from the figures."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from ernie_serve import doctor
from ernie_serve.bundled import ERNIE_TINY
from ernie_serve.config import USUAL_NUM_SEQS, Settings
from ernie_serve.errors import NotEnoughMemory, SettingsError, StartupError
from ernie_serve.model.config import ModelConfig
from ernie_serve.model.quantize import parameter_shapes
from ernie_serve.model.random_checkpoint import GEOMETRIES
from ernie_serve.model.recipes import Quantization
from ernie_serve.worker import fitting, memory
from ernie_serve.worker.card import Card
from ernie_serve.worker.cores import usable_cores

GIB = 1 << 30
CARD = ModelConfig.from_dict(GEOMETRIES["21b"])


def told(free: float, *, total: float = 1000, disk: float = 1e12, compiler: bool = True) -> str:
    forms = fitting.forms_of(CARD)
    sizes = {"free": int(free * GIB), "total": int(total * GIB), "disk": int(disk)}
    return "\n".join(doctor.advice(forms, CARD, **sizes, speed=20e9, compiler=compiler))


def test_the_21b_in_4_bits_fits_a_machine_of_16_gb_and_reads_2_gb_a_token() -> None:
    forms = {form.name: form for form in fitting.forms_of(CARD)}
    assert list(forms) == ["bfloat16", "int8", "mixed", "int4"]
    assert 43e9 < forms["bfloat16"].weight_bytes < 44e9
    assert 11.5e9 < forms["int4"].weight_bytes < 11.9e9
    assert forms["int4"].needed_bytes < 12.5 * GIB
    assert 1.75e9 < forms["int4"].token_bytes < 2.0e9
    assert forms["int4"].token_bytes < forms["mixed"].token_bytes < forms["int8"].token_bytes


def test_a_model_without_experts_reads_all_its_weights_but_an_untied_embedding() -> None:
    dense = ModelConfig.from_dict(GEOMETRIES["0.3b"])
    (plain, *_) = fitting.forms_of(dense)
    assert plain.token_bytes == plain.weight_bytes
    untied = ModelConfig.from_dict(GEOMETRIES["0.3b"] | {"tie_word_embeddings": False})
    (plain, *_) = fitting.forms_of(untied)
    assert plain.token_bytes == plain.weight_bytes - 103424 * 1024 * 2


def test_widths_that_cannot_be_packed_leave_the_plain_form() -> None:
    assert [form.name for form in fitting.forms_of(ModelConfig.from_dict(GEOMETRIES["tiny"]))] == ["bfloat16"]


def test_a_quantized_folder_has_one_form() -> None:
    values = {"quant_method": "ernie_serve", "format_version": 1, "recipe": "int8", "group_size": 32}
    values["bits"] = dict.fromkeys(("attention", "dense", "shared", "experts", "head"), 8)
    config = ModelConfig.from_dict(GEOMETRIES["21b"] | {"quantization_config": values})
    assert [form.name for form in fitting.forms_of(config)] == ["int8"]

    said = doctor.advice(
        fitting.forms_of(config), config, free=99 * GIB, total=99 * GIB, disk=1, speed=2e10, compiler=True
    )
    assert said == ["It can be served as it is."]


def test_a_small_model_is_bound_by_its_layers_and_a_large_one_by_memory() -> None:
    def expected(geometry: str) -> str:
        config = ModelConfig.from_dict(GEOMETRIES[geometry])
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(doctor.table(fitting.forms_of(config), 99 * GIB, 20e9, config.num_hidden_layers))
        return console.export_text()

    assert "2.1 - 2.8" in expected("21b")
    assert "7.8 - 10.5" in expected("21b")
    layers = ModelConfig.from_dict(GEOMETRIES["tiny"]).num_hidden_layers
    assert f"about {1 / (layers * 0.0003):.0f}" in expected("tiny")


def test_a_model_that_its_layers_bound_is_not_to_be_quantized() -> None:
    bundled = ModelConfig.from_folder(ERNIE_TINY)
    forms = fitting.forms_of(bundled)
    assert forms[-1].name == "int4"
    said = doctor.advice(forms, bundled, free=GIB, total=GIB, disk=GIB, speed=20e9, compiler=True)
    assert said == ["It can be served as it is."]


def test_what_to_change_depends_on_what_lacks() -> None:
    assert "It can be served, fastest with --quantization int4." in told(free=99)
    assert "--quantization int4" in told(free=14)
    assert "end other programs until" in told(free=8, total=16)
    assert "this machine has 8.0" in told(free=7, total=8)
    assert "HF_HOME" in told(free=14, disk=50e9)
    assert "HF_HOME" not in told(free=14, disk=60e9)
    assert "apt install g++ ninja-build" in told(free=14, compiler=False)


def test_the_published_geometries_are_known_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object) -> Path:
        raise StartupError("The hub cannot be reached.")

    monkeypatch.setattr(doctor.hub, "resolve", unreachable)
    assert doctor.config_of(doctor.DEFAULT, None) == CARD
    assert doctor.config_of("baidu/ERNIE-4.5-0.3B-PT", None).hidden_size == 1024
    with pytest.raises(StartupError, match="cannot be reached"):
        doctor.config_of("someone/else", None)


def test_memory_is_read_and_its_speed_is_a_number() -> None:
    assert doctor.memory_speed(0.01, 1 << 20) > 0


def test_the_verb_prints_a_table_for_a_folder(tiny_checkpoint: Path) -> None:
    program = "from ernie_serve import doctor, cli; doctor.PROBE_SECONDS = 0.05; cli.main()"
    environ = os.environ | {"COLUMNS": "160", "NO_COLOR": "1"}
    command = [sys.executable, "-c", program, "doctor", str(tiny_checkpoint), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout
    assert f"{torch.__version__}, 1 threads" in done.stdout
    assert "GB/s" in done.stdout
    assert done.stdout.splitlines()[1].startswith("Cores")


def test_a_quota_bounds_the_cores(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    folder = tmp_path / "sys/fs/cgroup/box"
    folder.mkdir(parents=True)
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    (folder / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    (folder / "cpu.max").write_text("100000 100000\n")
    assert usable_cores(tmp_path) == 1
    (folder / "cpu.max").write_text("20000 100000\n")
    assert usable_cores(tmp_path) == 1


def test_shapes_of_the_card_are_those_of_its_parameters() -> None:
    assert sum(shape.numel() for shape in parameter_shapes(CARD).values()) == pytest.approx(21.8e9, rel=0.01)


GPU = torch.device("cuda:0")


def card(total: float, free: float, capability: tuple[int, int] = (8, 9), speed: float = 1008e9) -> Card:
    return Card("A card", int(total * GIB), int(free * GIB), capability, speed, is_measured=True)


def test_on_a_gpu_of_24_gb_the_21b_fits_in_int4_and_not_as_it_is() -> None:
    forms = {form.name: form for form in fitting.forms_of(CARD, GPU)}
    assert list(forms) == ["bfloat16", "int8", "fp8", "mixed", "int4"]
    assert 43e9 < forms["bfloat16"].weight_bytes < 44e9
    assert 12e9 < forms["int4"].weight_bytes < 12.5e9
    assert forms["int4"].needed_bytes < forms["mixed"].needed_bytes < 15 * GIB < 21 * GIB < forms["int8"].needed_bytes
    assert forms["int8"].weight_bytes == forms["fp8"].weight_bytes
    said = doctor.gpu_advice(list(forms.values()), CARD, card(24, 23.5))
    assert said.startswith("As it is it needs 4")
    assert said.endswith("set --quantization mixed."), "8 % are kept free, which int8 would need"
    assert "set --quantization int8" in doctor.gpu_advice(list(forms.values()), CARD, card(25, 24.9))
    assert "int4 needs" in doctor.gpu_advice(list(forms.values()), CARD, card(12, 11))
    assert "faster" in doctor.gpu_advice(list(forms.values()), CARD, card(141, 139))


@pytest.mark.parametrize("form", fitting.forms_of(CARD, GPU), ids=lambda form: form.name)
def test_what_the_doctor_says_of_a_gpu_is_what_the_server_then_finds(
    form: fitting.Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of free memory from what is too little to what is enough, with the settings' defaults."""
    usual = Settings()
    for free in range(form.needed_bytes // GIB - 1, form.needed_bytes // GIB + 6):
        found = card(free * 1.02, free)
        monkeypatch.setattr(memory, "device_bytes", lambda device, found=found: found.total_bytes)
        monkeypatch.setattr(memory, "free_bytes", lambda device, found=found: found.free_bytes - form.weight_bytes)
        try:
            longest = memory.plan_cache(
                CARD,
                torch.bfloat16,
                GPU,
                widened_bytes=0 if form.name == "bfloat16" else 2 * 12288 * 2560 * 2,
                block_size=64,
                max_num_seqs=USUAL_NUM_SEQS["cuda"],
                max_scored_tokens=memory.SCORED_TOKENS,
                max_num_batched_tokens=usual.max_num_batched_tokens,
                gpu_memory_utilization=usual.gpu_memory_utilization,
            ).max_model_len
        except NotEnoughMemory:
            longest = 0
        assert (longest >= fitting.CONTEXT) == (form.needed_bytes <= found.usable_bytes(usual.gpu_memory_utilization))


def test_a_gpus_speed_follows_from_what_a_step_reads() -> None:
    forms = {form.name: form for form in fitting.forms_of(CARD, GPU)}
    assert forms["bfloat16"].token_bytes == pytest.approx(6.4e9, rel=0.1)
    assert forms["int4"].token_bytes < forms["fp8"].token_bytes < forms["bfloat16"].token_bytes
    everything = forms["bfloat16"].weight_bytes + 64 * fitting.CONTEXT * 2 * 28 * 4 * 128 * 2
    assert forms["bfloat16"].many_bytes == pytest.approx(everything, rel=0.01)
    assert forms["bfloat16"].many_bytes < everything


def test_a_gpu_is_described_with_where_its_speed_comes_from() -> None:
    shown = "\n".join(doctor.card_lines(card(24, 23.5)))
    assert "A card, compute capability 8.9" in shown
    assert "24.0 GiB, 23.5 free; read at 1,008 GB/s, measured" in shown
    assert "no fp8, which needs 8.9" in "\n".join(doctor.card_lines(card(24, 23.5, (8, 6))))
    assert "the kernels need 8.0" in "\n".join(doctor.card_lines(card(16, 15, (7, 5))))
    assert "another one, or --device cpu" in doctor.gpu_advice(fitting.forms_of(CARD, GPU), CARD, card(16, 15, (7, 5)))
    assert "unknown speed" in "\n".join(doctor.card_lines(card(24, 23.5, speed=0)))
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(doctor.gpu_table(fitting.forms_of(CARD, GPU), card(24, 20)))
    rows = {line.split()[0]: line for line in console.export_text().splitlines() if line}
    assert "no" in rows["bfloat16"].split()
    assert "yes" in rows["int4"].split()
    console.print(doctor.gpu_table(fitting.forms_of(CARD, GPU), card(24, 20, speed=0)))
    assert console.export_text().count(" ? ") == 10, "no speed, no prediction"


def test_a_model_without_experts_has_no_form_of_4_bits_on_a_gpu() -> None:
    dense = ModelConfig.from_dict(GEOMETRIES["0.3b"])
    assert [form.name for form in fitting.forms_of(dense, GPU)] == ["bfloat16", "int8", "fp8"]
    said = doctor.gpu_advice(fitting.forms_of(dense, GPU), dense, card(24, 23))
    assert said == "It can be served as it is; with --quantization fp8 it is faster and its cache larger."


def test_a_folder_in_fp8_is_refused_by_a_gpu_that_does_not_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = {"quantization_config": Quantization.of("fp8", "cuda").as_config()}
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRIES["21b"] | stored))
    monkeypatch.setattr(doctor, "device_of", lambda wanted: GPU)
    monkeypatch.setattr(doctor, "take", lambda device: None)

    def examined(capability: tuple[int, int]) -> str:
        monkeypatch.setattr(doctor, "card_of", lambda device, seconds: card(24, 23.5, capability))
        doctor.examine(str(tmp_path), revision=None, threads=None, device="cuda")
        return capsys.readouterr().out

    with pytest.raises(SettingsError, match=r"fp8 needs .* 8\.9; this one has 8\.6.*--quantization int8"):
        examined((8, 6))
    assert "another one, or --device cpu" in examined((7, 5))
    assert "End what else uses the GPU" in examined((8, 9))


def test_figures_that_others_disturbed_are_said_to_be_so() -> None:
    assert doctor.disturbed_by(0.3, 2) == ""
    assert "a load of 3.4 on 2 cores" in doctor.disturbed_by(3.4, 2)
