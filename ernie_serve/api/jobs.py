"""From prompts in token ids to a job for the engine.

Knows how prompts multiply into choices. Knows nothing of templates or tokenizers.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from msgspec import structs

from ernie_serve.api.choice_text import TextOptions
from ernie_serve.api.sampling import Sampling
from ernie_serve.api.schema.fields import TextRequest, read_stops
from ernie_serve.api.services import Services
from ernie_serve.api.shaping import Shape
from ernie_serve.api.telling import Choice, Job
from ernie_serve.errors import InvalidRequest
from ernie_serve.messages import EngineRequest


def make_job(
    services: Services,
    fields: TextRequest,
    prompts: Sequence[list[int]],
    *,
    chat: bool,
    prompt_param: str,
    default_max: int | None,
    shape: Shape,
    openings: Sequence[str] = (),
    id_prefix: str = "",
) -> Job:
    """`n` choices for each prompt, in order. Raises `InvalidRequest` for what does not fit or is out of range."""
    job_id = f"{id_prefix or ('chatcmpl-' if chat else 'cmpl-')}{_new_id()}"
    num_choices = require_choices(services, fields, len(prompts))
    priority = require_priority(services, fields)
    prompt_only = fields.wanted_tokens[1] == 0 and fields.scored_prompt is not None
    sampling = Sampling(
        fields,
        services,
        chat=chat,
        prompt_param=prompt_param,
        default_max=default_max,
        constraints=shape.constraints,
    )
    skips = fields.skip_special_tokens is not False
    choices = [
        Choice(
            index=prompt_index * num_choices + number,
            prompt_index=prompt_index,
            is_first=number == 0,
            request=EngineRequest(
                request_id=f"{job_id}-{prompt_index * num_choices + number}",
                prompt_token_ids=ids,
                sampling=sampling.for_choice(number, len(ids)),
                priority=priority,
                cache_salt=fields.cache_salt or "",
            ),
            opening=openings[prompt_index] if openings else "",
            prompt_only=prompt_only,
        )
        for prompt_index, ids in enumerate(prompts)
        for number in range(num_choices)
    ]
    text = TextOptions(
        stops=read_stops(fields.stop),
        include_stop=bool(fields.include_stop_str_in_output),
        skip_special_tokens=skips and shape.read is None,
        min_tokens=fields.min_tokens or 0,
        logprobs=fields.num_logprobs is not None,
        score_stop=not chat and fields.num_logprobs is not None and fields.scored_prompt is not None,
        hidden_ids=shape.hidden_ids if skips else frozenset(),
    )
    return Job(
        id=job_id,
        choices=choices,
        text=text,
        stream=bool(fields.stream),
        include_usage=fields.wants_usage,
        usage_in_chunks=fields.wants_usage_in_chunks,
        keep=(fields.n or 1) if fields.num_made > (fields.n or 1) else None,
        with_token_ids=bool(fields.return_token_ids),
        length_given=fields.wanted_tokens[1] is not None,
        length_param=fields.wanted_tokens[0],
        read=shape.read,
        start=shape.start,
        grammar_param=shape.grammar_param,
    )


def kept_apart(job: Job, account: str) -> Job:
    """The job with prefix caches of its account's own; what the client salted them with only narrows that further."""
    choices = [
        replace(each, request=structs.replace(each.request, cache_salt=f"{account}/{each.request.cache_salt}"))
        for each in job.choices
    ]
    return replace(job, choices=choices)


def require_choices(services: Services, fields: TextRequest, num_prompts: int) -> int:
    """How many choices each prompt gets. Raises `InvalidRequest` for too many."""
    limits, num_choices = services.limits, fields.num_made
    param = "n" if num_choices == (fields.n or 1) else "best_of"
    if num_choices > limits.max_n:
        raise InvalidRequest(f"`{param}` must be at most {limits.max_n}, not {num_choices}.", param=param)
    if num_prompts * num_choices > limits.max_choices:
        told = f"{num_prompts} prompts with `{param}` {num_choices} make {num_prompts * num_choices} choices"
        raise InvalidRequest(f"{told}; one request may have {limits.max_choices}. Send several.", param=param)
    return num_choices


def require_priority(services: Services, fields: TextRequest) -> int:
    """The place of a request among others. Raises `InvalidRequest` for any but 0 where all are served as they come."""
    priority = fields.priority or 0
    if priority and not services.takes_priority:
        told = f"`priority` is {priority}, but this server takes only 0: it serves requests in the order they come in."
        more = "Leave it out, or have the server started with --scheduling-policy priority."
        raise InvalidRequest(f"{told} {more}", param="priority")
    return priority


def _new_id() -> str:
    """32 hexadecimal digits: milliseconds since 1970, then 80 random bits, like a UUID of version 7 (RFC 9562, 5.7).

    Who keeps jobs by their id, as the billing store does, writes those of one time in one place.
    """
    return f"{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
