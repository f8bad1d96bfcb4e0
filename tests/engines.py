"""Models and requests that the engine's tests share."""

import torch

from moe_lm.config import ModelConfig
from moe_lm.engine import Engine, Output, Result, SamplingParams
from moe_lm.engine.sampler import Row
from moe_lm.engine.speculative import Draft, verify
from moe_lm.model import Transformer

VOCABULARY = 97
BLOCK = 2 * 2 * 16 * 16 * 4
"""Bytes of a cache block of the models here: keys and values, 2 layers, 16 tokens, 1 head of 16, float32."""

SHAPES = {
    "moe, one kv head": {},
    "moe, shared expert, top-3": {"n_shared_experts": 1, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "dense, odd sizes": {"num_local_experts": 0, "hidden_size": 60, "num_attention_heads": 3, "head_dim": 22},
    "first layer dense": {"first_k_dense_replace": 1, "moe_intermediate_size": 32, "n_shared_experts": 1},
    "every second layer dense": {"expert_layer_period": 2, "expert_layer_offset": 0},
}


def make_model(seed: int, dtype: torch.dtype = torch.float32, **changes) -> Transformer:
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_local_experts": 8, "max_position_embeddings": 512, "initializer_range": 0.2,
    } | changes  # fmt: skip
    model = Transformer(ModelConfig(**shape)).reset_parameters(torch.Generator().manual_seed(seed)).eval()
    return model.to(dtype)


def near_copy(model: Transformer, noise: float = 0.1) -> Transformer:
    """A draft that guesses most tokens right."""
    copy = Transformer(model.config)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        copy.lm_head.weight += noise * torch.randn(
            copy.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    return copy.eval().to(model.embed_tokens.dtype)


def solo(model: Transformer, prompt: list[int], params: SamplingParams, **settings) -> list[Output]:
    """What a request gets alone, in one chunk, with no speculation and nothing in the cache."""
    engine = Engine(
        model, max_sequences=max(1, params.n), max_step_tokens=4096, prefix_cache=False, speculation="none", **settings
    )
    return engine.generate([prompt], params)[0].samples


def same(result: Result, expected: list[Output]) -> bool:
    """Whether tokens, log-probabilities, experts and ends are equal, the numbers bit for bit."""

    def facts(output: Output):
        end = output.finish_reason, output.stop_reason
        return output.tokens, output.logprobs, output.prompt_logprobs, output.experts, end

    return [facts(output) for output in result.samples] == [facts(output) for output in expected]


def drain(engine: Engine) -> dict[str, list[Output]]:
    """What is left to come, by request: its samples, as far as they gave anything, in order."""
    found: dict[tuple[str, int], Output] = {}
    while engine.has_work:
        for output in engine.step():
            key = output.request_id, output.index
            found.setdefault(key, Output(*key)).extend(output)
    return {name: [found[key] for key in sorted(found) if key[0] == name] for name, _ in found}


def no_leak(engine: Engine) -> None:
    pool = engine.scheduler.pool
    pool.check()
    assert pool.available == pool.num_blocks
    assert not engine.samples
    assert not engine.has_work


def sample(logits: torch.Tensor, rows: list[Row]) -> list[int]:
    """One token for each row of logits (n, V), without any guess."""
    return [token for _, token in verify(logits, [Draft() for _ in rows], rows)]
