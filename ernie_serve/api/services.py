"""What the routes are handed, once, when the server starts.

Knows which rooms below answer a request and what bounds it. Builds none of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ernie_serve.api.measures import Measures
from ernie_serve.api.replays import Replays
from ernie_serve.api.response_store import KeptResponses, ResponseStore
from ernie_serve.billing.free import OFF, FreeMeter
from ernie_serve.billing.meter import Meter
from ernie_serve.engine.client import EngineClient
from ernie_serve.errors import EngineUnavailable, ModelNotFound, UnknownUrl
from ernie_serve.messages import Grammar
from ernie_serve.text.formats import OutputFormat
from ernie_serve.text.generation import GenerationDefaults
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, or one connection, may ask of the server. Sizes in bytes."""

    max_body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 60.0
    max_n: int = 128
    max_prompts: int = 256
    max_choices: int = 256
    ping_seconds: float = 15.0
    stall_seconds: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The rooms below, and the facts that every answer repeats.

    `template` is `None` for a checkpoint that cannot chat; `format` is how chat answers are framed, without it they are
    plain text. `check_grammar` raises `InvalidRequest` for a grammar that cannot be compiled, `Overloaded` where there
    is no time to see, and may block. The first of `model_names` is the one that answers report; all of them are
    accepted. `max_model_len` bounds prompt and answer together, in tokens; `max_output_tokens` the answer alone, where
    it is not `None`. `takes_priority` is whether a request may say that it goes before others. `meter` says who may
    call and what it costs; pages of `allowed_origins` may call from browsers, and where it has an `own_name` none
    by another name. `responses` keeps what `/v1/responses` may be asked for again, `replays` what an idempotency key
    may be. `measures` counts what was answered.
    """

    engine: EngineClient
    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: GenerationDefaults
    format: OutputFormat | None = None
    check_grammar: Callable[[Grammar], None] = lambda grammar: None
    model_names: tuple[str, ...]
    max_model_len: int
    max_output_tokens: int | None = None
    takes_priority: bool = True
    meter: Meter = field(default_factory=FreeMeter)
    allowed_origins: tuple[str, ...] = ()
    own_name: str | None = None
    responses: KeptResponses = field(default_factory=ResponseStore)
    replays: Replays = field(default_factory=Replays)
    measures: Measures = field(default_factory=Measures)
    created: int = field(default_factory=lambda: int(time.time()))
    limits: Limits = Limits()

    @property
    def model_name(self) -> str:
        """The name that answers report."""
        return self.model_names[0]

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together: the smaller of what was configured and what the cache holds."""
        info = self.engine.info
        return self.max_model_len if info is None else min(self.max_model_len, info.max_model_len)

    @property
    def max_answer_tokens(self) -> int:
        """Tokens of the longest answer."""
        return min(self.max_output_tokens or self.context_length, self.context_length)

    def require_model(self, name: str) -> None:
        """Raise `ModelNotFound` for a name that is not served here."""
        if name not in self.model_names:
            served = ", ".join(f"`{each}`" for each in self.model_names)
            raise ModelNotFound(f"The model `{name[:128]}` is not served here. Ask for {served}.", param="model")

    async def require_metered(self) -> None:
        """Raise `UnknownUrl` where there is no billing store to ask or to change."""
        if not self.meter.charges:
            raise UnknownUrl(OFF)

    def require_ready(self) -> None:
        """Raise `EngineUnavailable` unless the engine takes requests."""
        if self.engine.state != "ready":
            raise unavailable(self.engine)


def unavailable(engine: EngineClient, otherwise: EngineUnavailable | None = None) -> EngineUnavailable:
    """What a client is told of an engine that takes no requests. Why it ended is for the operator alone."""
    match engine.state:
        case "loading":
            share, what = engine.progress
            told = f"The model is still loading ({share:.0%}: {what}). Try again shortly; /health/ready tells when."
            return EngineUnavailable(told, retry_after_seconds=5)
        case "closed":
            return EngineUnavailable("The server is shutting down.", retry_after_seconds=10)
        case "ready" if otherwise is not None:
            return otherwise
    return EngineUnavailable("The engine has ended; the server's log says why.", retry_after_seconds=30)
