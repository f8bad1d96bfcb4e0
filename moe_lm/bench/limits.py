"""The most tokens per second that a machine's read bandwidth and matrix rate allow a model.

A step of decoding must read the weights that its tokens use: attention, routers, shared experts and the output
projection once, and every routed expert that one of the tokens chose. Keys and values are left out, as are the norms
and the rows of the token table, which are small beside that. D hidden width, F expert width, E experts, K experts per
token, V vocabulary.
"""

from moe_lm.bench.workload import Workload
from moe_lm.config import ModelConfig
from moe_lm.scaling.counts import forward_flops_per_token, parameters
from moe_lm.scaling.routing import expected_distinct


def step_bytes(config: ModelConfig, itemsize: int, experts: float) -> float:
    """Bytes of the weights that one step reads, its tokens having chosen `experts` distinct experts in a routing layer.

    `itemsize` is that of a weight. All of the dense MLPs are read.
    """
    counts = parameters(config)
    routed = len(config.routing_layers) * experts * 3 * config.hidden_size * config.expert_size
    mlp = routed + counts.shared_experts + counts.dense_mlp
    return (counts.attention + counts.router + config.vocab_size * config.hidden_size + mlp) * itemsize


def expected_experts(config: ModelConfig, tokens: int) -> float:
    """Distinct experts of a layer that `tokens` tokens choose, if every choice is as likely; 0 for a dense model."""
    if not config.is_moe:
        return 0.0
    return expected_distinct(config.num_local_experts, config.num_experts_per_tok, tokens)


def decode_limit(config: ModelConfig, itemsize: int, batch: int, experts: float, bandwidth: float) -> float:
    """New tokens per second of a batch, one each from a step that takes no longer than reading its weights.

    `bandwidth` in bytes per second. Speculation, which gets several tokens from a step, may pass this limit.
    """
    return batch * bandwidth / step_bytes(config, itemsize, experts)


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """Multiplications and additions of reading a prompt. Only its last token needs the output projection, 2 V D."""
    projection = 2 * config.vocab_size * config.hidden_size
    return tokens * (forward_flops_per_token(config, (tokens + 1) / 2) - projection) + projection


def prefill_limit(config: ModelConfig, tokens: int, gemm: float) -> float:
    """Tokens of a prompt per second at the matrix rate `gemm`, in FLOP/s."""
    return tokens * gemm / prefill_flops(config, tokens)


def trace_limit(config: ModelConfig, itemsize: int, work: Workload, bandwidth: float, gemm: float) -> float:
    """New tokens per second of requests that arrive at once: prompts at the matrix rate, then all decode together.

    Step by step fewer are left; experts are those expected of uniform choices.
    """
    prompts = sum(prefill_flops(config, len(prompt)) for prompt in work.prompts) / gemm
    # The first new token of a request comes with its prompt.
    left = [sum(n > done for n in work.outputs) for done in range(1, max(work.outputs))]
    steps = sum(step_bytes(config, itemsize, expected_experts(config, batch)) for batch in left) / bandwidth
    return work.tokens / (prompts + steps)
