"""The fields that every request for text shares, spelled as OpenAI spells them, and where it has none, as vLLM does.

Knows types and ranges. Knows nothing of prompts, vocabularies or defaults.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ernie_serve.api.schema.accepted import Accepted, Boolean, Integer, Number, Text
from ernie_serve.api.schema.structure import RESPONSE_FORMAT, STRUCTURED_OUTPUTS
from ernie_serve.api.schema.validation import kind_of
from ernie_serve.errors import InvalidRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_ALLOWED_IDS = 4096
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256
INT31 = 2**31 - 1

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_WORDS = {"type": "array", "items": {"type": "string", "minLength": 1}}


def documented(schema: dict[str, Any]) -> WithJsonSchema:
    """What a field that is read by hand looks like in the API's own description; `null` is the same as nothing."""
    return WithJsonSchema({"anyOf": [schema, {"type": "null"}]})


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: Boolean | None = None
    include_obfuscation: Boolean | None = None
    continuous_usage_stats: Boolean | None = None


class TextRequest(Accepted):
    """A request for text. `None` is everywhere the same as leaving the field out.

    Where a field may hold lists or objects of any length it is `Any` here and read by a function below, which
    stops at the first mistake.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: Text
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[Integer, Field(ge=1)] | None = None
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    min_tokens: Annotated[Integer, Field(ge=0)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, le=INT31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[Integer, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[Any, documented({"anyOf": [{"type": "string"}, {**_WORDS, "maxItems": MAX_STOPS}]})] = None
    stop_token_ids: Annotated[Any, documented({**_IDS, "maxItems": MAX_STOP_IDS})] = None
    logit_bias: Annotated[Any, documented({"type": "object", "additionalProperties": {"type": "number"}})] = None
    allowed_token_ids: Annotated[Any, documented({**_IDS, "minItems": 1, "maxItems": MAX_ALLOWED_IDS})] = None
    bad_words: Annotated[Any, documented({**_WORDS, "maxItems": MAX_BAD_WORDS})] = None
    ignore_eos: Boolean | None = None
    include_stop_str_in_output: Boolean | None = None
    skip_special_tokens: Boolean | None = None
    priority: Annotated[Integer, Field(ge=-INT31, le=INT31)] | None = None
    truncate_prompt_tokens: Annotated[Integer, Field(ge=-1, le=INT31)] | None = None
    prompt_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    return_token_ids: Boolean | None = None
    response_format: Annotated[Any, documented(RESPONSE_FORMAT)] = None
    structured_outputs: Annotated[Any, documented(STRUCTURED_OUTPUTS)] = None
    cache_salt: Annotated[Text, Field(max_length=256)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token; `None` for no logprobs at all."""
        raise NotImplementedError

    @property
    def wanted_tokens(self) -> tuple[str, int | None]:
        """The longest answer the client allows, and the field that says so."""
        return "max_tokens", self.max_tokens

    @property
    def scored_prompt(self) -> int | None:
        """Alternatives wanted beside each token of the prompt; `None` for no logprobs of it."""
        return self.prompt_logprobs

    @property
    def num_made(self) -> int:
        """Answers made to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk. Raises `InvalidRequest` for options that are not offered."""
        options = self.stream_options
        if options is None:
            return False
        if not self.stream:
            raise InvalidRequest("`stream_options` is only for streams. Set `stream` too.", param="stream_options")
        if options.include_obfuscation:
            told = "`stream_options.include_obfuscation` is not supported by this server. Leave it out."
            raise InvalidRequest(told, param="stream_options.include_obfuscation")
        if options.continuous_usage_stats and not options.include_usage:
            told = "`stream_options.continuous_usage_stats` needs `include_usage`. Set both."
            raise InvalidRequest(told, param="stream_options.continuous_usage_stats")
        return bool(options.include_usage)

    @property
    def wants_usage_in_chunks(self) -> bool:
        """Whether each chunk of a stream tells the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


def read_stops(stop: Any) -> tuple[str, ...]:
    """`stop`: a string, or several: OpenAI takes four, and programs that test written code send more."""
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list):
        raise InvalidRequest(f"`stop` must be a string or a list of strings, not {kind_of(stop)}.", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"`stop` must hold at most {MAX_STOPS} strings, not {len(stops)}.", param="stop")
    for each in stops:
        if not isinstance(each, str):
            raise InvalidRequest(f"`stop` must hold strings, not {kind_of(each)}.", param="stop")
        if not 0 < len(each) <= MAX_STOP_CHARS:
            told = f"Each string in `stop` must have 1 to {MAX_STOP_CHARS} characters, not {len(each)}."
            raise InvalidRequest(told, param="stop")
    return tuple(stops)


def read_stop_token_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """`stop_token_ids`: ids within the vocabulary."""
    if ids is None:
        return ()
    if not isinstance(ids, list) or len(ids) > MAX_STOP_IDS:
        told = f"`stop_token_ids` must be a list of at most {MAX_STOP_IDS} token ids."
        raise InvalidRequest(told, param="stop_token_ids")
    require_token_ids(ids, vocab_size, "stop_token_ids")
    return tuple(ids)


def read_allowed_token_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """`allowed_token_ids`: the only ids that may be chosen; none given means all."""
    if ids is None:
        return ()
    if not isinstance(ids, list) or not 0 < len(ids) <= MAX_ALLOWED_IDS:
        told = f"`allowed_token_ids` must be a list of 1 to {MAX_ALLOWED_IDS} token ids."
        raise InvalidRequest(told, param="allowed_token_ids")
    require_token_ids(ids, vocab_size, "allowed_token_ids")
    return tuple(dict.fromkeys(ids))


def read_bad_words(words: Any) -> tuple[str, ...]:
    """`bad_words`: texts that the answer must not contain."""
    if words is None:
        return ()
    if not isinstance(words, list) or len(words) > MAX_BAD_WORDS:
        told = f"`bad_words` must be a list of at most {MAX_BAD_WORDS} strings."
        raise InvalidRequest(told, param="bad_words")
    for each in words:
        if not isinstance(each, str) or not 0 < len(each) <= MAX_BAD_WORD_CHARS:
            told = f"Each of `bad_words` must be a string of 1 to {MAX_BAD_WORD_CHARS} characters."
            raise InvalidRequest(told, param="bad_words")
    return tuple(words)


def read_logit_bias(bias: Any, vocab_size: int) -> dict[int, float]:
    """`logit_bias`: from token ids, which JSON spells as strings, to numbers between -100 and 100."""
    if not bias and (bias is None or isinstance(bias, dict)):
        return {}
    if not isinstance(bias, dict):
        told = f"`logit_bias` must be an object from token ids to numbers, not {kind_of(bias)}."
        raise InvalidRequest(told, param="logit_bias")
    if len(bias) > MAX_LOGIT_BIAS:
        told = f"`logit_bias` must have at most {MAX_LOGIT_BIAS} entries, not {len(bias)}."
        raise InvalidRequest(told, param="logit_bias")
    read: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            told = f"The keys of `logit_bias` must be token ids from 0 to {vocab_size - 1}, not {key[:40]!r}."
            raise InvalidRequest(told, param="logit_bias")
        if type(value) not in (int, float) or not -100 <= value <= 100:
            told = f"The values of `logit_bias` must be numbers from -100 to 100; the one for token {key} is not."
            raise InvalidRequest(told, param="logit_bias")
        read[int(key)] = float(value)
    return read


def require_token_ids(ids: list[Any], vocab_size: int, param: str) -> None:
    """Raise `InvalidRequest` unless all are integers within the vocabulary."""
    if not all(type(token_id) is int for token_id in ids):
        raise InvalidRequest(f"`{param}` must hold integers alone where it holds token ids.", param=param)
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        told = f"`{param}` holds the token id {wrong}; this model's ids run from 0 to {vocab_size - 1}."
        raise InvalidRequest(told, param=param)
