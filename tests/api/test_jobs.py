from itertools import pairwise
from typing import Any

import pytest

from ernie_serve.api.jobs import make_job
from ernie_serve.api.schema.completion import CompletionRequest
from ernie_serve.api.services import Limits
from ernie_serve.api.shaping import Shape
from ernie_serve.errors import InvalidRequest


def job_of(services: Any, *prompts: list[int], openings: tuple[str, ...] = (), **fields: Any) -> Any:
    request = CompletionRequest(model="m", prompt="p", **fields)
    return make_job(
        services, request, prompts, chat=False, prompt_param="prompt", default_max=16, shape=Shape(), openings=openings
    )


def test_every_prompt_has_its_choices_in_order(services: Any) -> None:
    job = job_of(services, [1], [2], n=2, seed=5, openings=("a", "b"))
    told = [(c.index, c.prompt_index, c.is_first, c.request.prompt_token_ids, c.opening) for c in job.choices]
    assert told == [
        (0, 0, True, [1], "a"),
        (1, 0, False, [1], "a"),
        (2, 1, True, [2], "b"),
        (3, 1, False, [2], "b"),
    ]
    assert [choice.request.sampling.seed for choice in job.choices] == [5, 6, 5, 6]


def test_request_ids_are_unique_and_begin_with_the_answers(services: Any) -> None:
    jobs = [job_of(services, [1], [2], n=2) for _ in range(3)]
    ids = [choice.request.request_id for job in jobs for choice in job.choices]
    assert len(set(ids)) == 12
    assert all(choice.request.request_id.startswith(job.id) for job in jobs for choice in job.choices)


def test_ids_of_later_jobs_sort_later(services: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for milliseconds in (1_799_999_999_999, 1_800_000_000_000, 1_800_000_000_001):
        monkeypatch.setattr("ernie_serve.api.jobs.time.time_ns", lambda now=milliseconds: now * 1_000_000)
        made.append([job_of(services, [1]).id for _ in range(50)])
    assert all(max(earlier) < min(later) for earlier, later in pairwise(made))
    assert len(set().union(*made)) == 150


def test_number_of_choices_is_bounded_by_configuration(make_services: Any) -> None:
    services = make_services(limits=Limits(max_n=2, max_choices=3))
    assert len(job_of(services, [1], n=2).choices) == 2
    with pytest.raises(InvalidRequest, match="`n` must be at most 2, not 3"):
        job_of(services, [1], n=3)
    with pytest.raises(InvalidRequest, match="4 choices; one request may have 3"):
        job_of(services, [1], [2], n=2)


def test_every_prompt_must_fit(services: Any) -> None:
    with pytest.raises(InvalidRequest, match="300 tokens"):
        job_of(services, [1], [1] * 300)
