"""What is asked of the engine, and what comes back. Plain data: nothing here imports torch.

V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

from moe_lm.config import ConfigError

SPECULATIONS = ("none", "ngram", "draft", "staged")
"""Ways to guess tokens ahead: nothing; the continuation of an earlier occurrence of the last tokens (prompt lookup); a
draft model; a draft model that is itself helped by prompt lookup."""

MOST_LOGPROBS = 64
MOST_STOPS = 64
MOST_SAMPLES = 128
"""Bounds on what one request may ask for."""


class TokenMask(Protocol):
    """Which tokens may come next in one sequence, as a grammar has it."""

    def allowed(self) -> Any:
        """Tokens that may come next, a bool tensor (V,); none where the text is complete."""

    def advance(self, token: int) -> None:
        """A token came. It need not be an allowed one; what follows a token that is not allowed is undefined."""

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued. With every filter at its default the model's own distribution is sampled.

    The logits of a token pass, in this order: mask, logit_bias, the three penalties, temperature, top_k, top_p, min_p.
    Raises ConfigError on a value that is out of range.
    """

    max_tokens: int = 128
    """Most new tokens; 0 computes the prompt alone, as for prompt_logprobs, and gives one output without tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token (the lowest id among equals)."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that are in prompt or output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that are in the output."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for every time that it is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    stop: tuple[str, ...] = ()
    """Texts that end the output, which ends before them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output beside the model's own end tokens; such a token is the output's last, its text is not
    in it."""
    ignore_eos: bool = False
    """Whether the model's own end tokens are tokens like any other."""
    seed: int = 0
    """Chooses the sample: the same request with the same seed gives the same tokens, whoever shares its batch."""
    reproducible: bool = False
    """Whether what the seed draws must not depend on what is guessed ahead, as in a deterministic engine; fewer guesses
    then stand."""
    n: int = 1
    """Samples of the same prompt; sample i draws with its own numbers, sample 0 with those of n = 1."""
    logprobs: int | None = None
    """Log-probabilities of every new token and of this many likeliest ones beside it, of the model's own distribution
    before any filter; None for none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, of which the first has none."""
    experts: bool = False
    """Whether to report which experts every new token came from."""
    mask: Callable[[], TokenMask] | None = None
    """Makes what decides which tokens may come, such as a grammar, for each sample; see moe_lm.engine.grammar."""
    speculation: str | None = None
    """One of SPECULATIONS; None for the engine's default."""
    draft_tokens: int | None = None
    """Most tokens guessed ahead at a time; None for the engine's default."""

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(self.logit_bias)))
        for name, low, high in (
            ("max_tokens", 0, None), ("temperature", 0, None), ("top_k", 0, None), ("top_p", 0, 1), ("min_p", 0, 1),
            ("repetition_penalty", 0, None), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
            ("seed", 0, 2**63 - 1), ("n", 1, MOST_SAMPLES), ("logprobs", 0, MOST_LOGPROBS),
            ("prompt_logprobs", 0, MOST_LOGPROBS), ("draft_tokens", 1, 16),
        ):  # fmt: skip
            require_range(name, getattr(self, name), low, high)
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise ConfigError(f"{name} = 0 would leave nothing to choose from; it must be above 0.")
        if self.max_tokens == 0 and self.n > 1:
            raise ConfigError(f"n = {self.n} samples of max_tokens = 0 are all empty; set n = 1 or raise max_tokens.")
        for token, bias in self.logit_bias.items():
            require_range(f"logit_bias[{token}]", bias, -100, 100)
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise ConfigError(f"stop holds {len(self.stop)} texts; give at most {MOST_STOPS}, none of them empty.")
        if self.speculation not in (None, *SPECULATIONS):
            raise ConfigError(f"speculation = {self.speculation!r} is unknown; choose from {', '.join(SPECULATIONS)}.")

    @property
    def penalised(self) -> bool:
        """Whether a token's logit depends on the tokens before it beside the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def require_range(name: str, value: float | None, low: float, high: float | None) -> None:
    """Raise ConfigError unless `value` is None or finite and between `low` and `high`, None for no bound."""
    if value is None or (value >= low and (high is None or value <= high) and value < float("inf")):
        return
    limit = f"at least {low}" if high is None else f"between {low} and {high}"
    raise ConfigError(f"{name} = {value} must be {limit}.")


@dataclass
class Logprob:
    """One token beside its likeliest alternatives."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """Likeliest tokens and their log-probabilities, likeliest first."""


@dataclass
class Output:
    """What one step gave to one sample of a request."""

    request_id: str
    index: int
    """Which of the request's n samples."""
    tokens: list[int] = field(default_factory=list)
    """New tokens."""
    text: str = ""
    """New text: whole characters that no stop string can take back any more."""
    logprobs: list[Logprob] = field(default_factory=list)
    """One for each new token, if asked for."""
    prompt_logprobs: list[Logprob | None] | None = None
    """With the first output of a sample 0 that asked for them: one for each token of the prompt, None for the first."""
    sources: list[str] = field(default_factory=list)
    """Who guessed each new token: `target`, `draft` or `ngram`."""
    experts: list[list[list[int]]] = field(default_factory=list)
    """If asked for, the experts of every routing layer in the pass that gave each new token, which is over the token
    before it: (tokens, layers, K), without layers for a dense model."""
    cached: int | None = None
    """With the first output of sample 0: tokens of the prompt that were found in the prefix cache when it started; a
    later start after a preemption does not count."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`; None while more will come."""
    stop_reason: int | str | None = None
    """The token or the text that ended the output."""
    error: str | None = None
    """What went wrong, as a sentence."""

    def extend(self, later: "Output") -> None:
        """Add what a later step gave to the same sample."""
        self.tokens += later.tokens
        self.text += later.text
        self.logprobs += later.logprobs
        self.sources += later.sources
        self.experts += later.experts
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        if later.cached is not None:
            self.cached = later.cached
        self.finish_reason, self.stop_reason, self.error = later.finish_reason, later.stop_reason, later.error


@dataclass
class Result:
    """A request with all that its samples gave."""

    request_id: str
    prompt: list[int]
    samples: list[Output]
    """By index."""

    @property
    def tokens(self) -> list[int]:
        """New tokens of the first sample."""
        return self.samples[0].tokens

    @property
    def text(self) -> str:
        """New text of the first sample."""
        return self.samples[0].text
