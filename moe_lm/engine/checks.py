"""What can never be served is refused before it starts, with the numbers."""

from moe_lm.config import ConfigError
from moe_lm.engine.request import SamplingParams
from moe_lm.model import Transformer

MODEL_KINDS = ("draft", "staged")
"""Ways of speculation that need a draft model."""


def check_pair(model: Transformer, draft: Transformer | None) -> None:
    """Raises ConfigError where a draft model cannot guess for a model."""
    if draft is None:
        return
    ours, its = model.config.vocab_size, draft.config.vocab_size
    if ours != its:
        raise ConfigError(
            f"the draft's vocab_size = {its} is not the model's {ours}: a draft must be trained with its target's "
            "tokenizer."
        )
    if model.embed_tokens.device != draft.embed_tokens.device:
        raise ConfigError(
            f"the draft is on {draft.embed_tokens.device}, the model on {model.embed_tokens.device}; move one."
        )


def check_speculation(kind: str, draft: Transformer | None) -> str:
    """`kind`, one of SPECULATIONS. Raises ConfigError where it needs a draft model and there is none."""
    SamplingParams(speculation=kind)
    if kind in MODEL_KINDS and draft is None:
        raise ConfigError(f"speculation = {kind!r} needs a draft model; give one, or choose ngram or none.")
    return kind


def check_request(
    tokens: list[int], params: SamplingParams, vocab_size: int, has_tokenizer: bool, draft: Transformer | None
) -> None:
    """Raises ConfigError for token ids that the model does not have, and for what this engine has not the means for."""
    named = {"the prompt": tokens, "logit_bias": params.logit_bias, "stop_token_ids": params.stop_token_ids}
    for name, ids in named.items():
        bad = next((token for token in ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ConfigError(f"{name} holds token id {bad}, outside 0 to {vocab_size - 1}.")
    if params.stop and not has_tokenizer:
        raise ConfigError("stop texts need a tokenizer, which the engine was not given; use stop_token_ids.")
    if params.speculation is not None:
        check_speculation(params.speculation, draft)
