from typing import Any

import pytest

from ernie_serve.api.sampling import Sampling
from ernie_serve.api.schema.completion import CompletionRequest
from ernie_serve.errors import ContextLengthExceeded, InvalidRequest
from ernie_serve.messages import EngineInfo, SamplingParams
from ernie_serve.text.generation import GenerationDefaults

EOS, TURN_END = 256, 257


@pytest.fixture
def sample(make_services: Any) -> Any:
    """The parameters of one choice of a prompt of 10 tokens, in a context of 100 with answers of at most 50."""

    def make(
        choice: int = 0,
        length: int = 10,
        *,
        chat: bool = False,
        default_max: int | None = None,
        services: dict[str, Any] | None = None,
        **fields: Any,
    ) -> SamplingParams:
        request = CompletionRequest(model="m", prompt="p", **fields)
        rooms = make_services(**{"max_model_len": 100, "max_output_tokens": 50, **(services or {})})
        sampling = Sampling(request, rooms, chat=chat, prompt_param="prompt", default_max=default_max)
        return sampling.for_choice(choice, length)

    return make


STATED = GenerationDefaults(
    stop_token_ids=(EOS,),
    chat_stop_token_ids=(EOS, TURN_END),
    temperature=0.3,
    top_p=0.8,
    top_k=40,
    repetition_penalty=1.1,
)


def test_checkpoint_states_the_defaults(sample: Any) -> None:
    params = sample(services={"defaults": STATED})
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.3, 0.8, 40, 1.1)


def test_client_overrules_them_with_zero_too(sample: Any) -> None:
    params = sample(services={"defaults": STATED}, temperature=0, top_p=1, top_k=0, repetition_penalty=1)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0, 1, 0, 1)


@pytest.mark.parametrize(("asked", "given"), [(1e-300, 0), (1e-46, 0), (9e-6, 0), (1e-5, 1e-5), (1e-3, 1e-3)])
def test_a_temperature_too_low_to_divide_by_is_greedy(sample: Any, asked: float, given: float) -> None:
    assert sample(temperature=asked).temperature == given


def test_where_nobody_says_anything_it_is_openais_default(sample: Any) -> None:
    params = sample(services={"defaults": GenerationDefaults()})
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (1, 1, 0, 1)
    assert params.stop_token_ids == ()


def test_top_k_minus_one_is_off(sample: Any) -> None:
    assert sample(services={"defaults": STATED}, top_k=-1).top_k == 0


def test_top_p_zero_leaves_the_likeliest_token(sample: Any) -> None:
    params = sample(top_p=0, top_k=40)
    assert (params.top_p, params.top_k) == (1.0, 1)


def test_everything_else_is_passed_on(sample: Any) -> None:
    params = sample(
        min_p=0.1, presence_penalty=-2, frequency_penalty=2, logit_bias={"7": -100, "8": 1.5}, logprobs=3, min_tokens=2
    )
    assert (params.min_p, params.presence_penalty, params.frequency_penalty) == (0.1, -2, 2)
    assert (params.logit_bias, params.logprobs, params.min_tokens) == ({7: -100.0, 8: 1.5}, 3, 2)


def test_chat_stops_at_the_end_of_a_turn(sample: Any) -> None:
    assert sample(services={"defaults": STATED}).stop_token_ids == (EOS,)
    assert sample(services={"defaults": STATED}, chat=True).stop_token_ids == (EOS, TURN_END)


def test_stop_ids_of_the_client_are_added_and_ignore_eos_leaves_them_alone(sample: Any) -> None:
    assert sample(stop_token_ids=[7, EOS, 7]).stop_token_ids == (7, EOS)
    assert sample(stop_token_ids=[7], ignore_eos=True).stop_token_ids == (7,)


def test_seed_of_the_client_differs_by_choice(sample: Any) -> None:
    assert [sample(choice, seed=5).seed for choice in range(3)] == [5, 6, 7]
    assert sample(seed=-1).seed == 2**63 - 1
    assert sample(1, seed=2**63 - 1).seed == 0


def test_without_a_seed_every_choice_draws_one(sample: Any) -> None:
    seeds = {sample().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("length", "default_max", "expected"), [(10, None, 50), (60, None, 40), (99, None, 1), (10, 16, 16), (90, 16, 10)]
)
def test_length_left_open_is_what_fits(sample: Any, length: int, default_max: int | None, expected: int) -> None:
    assert sample(length=length, default_max=default_max).max_tokens == expected


def test_length_asked_for_is_had_up_to_the_limits(sample: Any) -> None:
    assert sample(length=50, max_tokens=50).max_tokens == 50
    assert sample(max_tokens=0).max_tokens == 0
    with pytest.raises(
        ContextLengthExceeded,
        match=r"maximum context length is 100 tokens.*has 51 tokens.*asks for 50 more.*at most 49",
    ):
        sample(length=51, max_tokens=50)
    with pytest.raises(InvalidRequest, match=r"`max_tokens` is 51, but .* at most 50 tokens"):
        sample(max_tokens=51)


def test_prompt_must_leave_room_for_a_token(sample: Any) -> None:
    assert sample(length=99).max_tokens == 1
    with pytest.raises(ContextLengthExceeded, match=r"length is 100 tokens.* 100 tokens") as raised:
        sample(length=100)
    assert raised.value.param == "prompt"
    assert sample(length=100, max_tokens=0).max_tokens == 0
    assert sample(length=100, max_tokens=0, echo=True, logprobs=1).max_tokens == 1, "which is made and not told"
    with pytest.raises(ContextLengthExceeded):
        sample(length=101, max_tokens=0)


def test_least_length_cannot_pass_the_greatest(sample: Any) -> None:
    assert sample(min_tokens=20, max_tokens=20).min_tokens == 20
    with pytest.raises(InvalidRequest, match=r"`min_tokens` is 21.*at most 20"):
        sample(min_tokens=21, max_tokens=20)


def test_cache_that_is_smaller_than_the_context_bounds_it(sample: Any, engine: Any) -> None:
    engine.info = EngineInfo(
        device="cpu",
        dtype="float32",
        weight_bytes=0,
        kv_bytes=0,
        num_blocks=0,
        block_size=16,
        max_model_len=30,
        max_num_seqs=1,
        max_num_batched_tokens=1,
        load_seconds=0,
    )
    assert sample(length=10).max_tokens == 20
    with pytest.raises(ContextLengthExceeded, match="30 tokens"):
        sample(length=30)


def test_without_an_output_limit_the_context_is_the_limit(sample: Any) -> None:
    assert sample(services={"max_output_tokens": None}).max_tokens == 90
