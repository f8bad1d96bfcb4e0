"""What every operation is measured on, and beside what.

A contender is one way to get the result: a backend of ours, the plain torch that people write, torch's own fused
function; or, marked as no rival, dense work of the same FLOPs or bytes, which says what the device can do. Nothing
here picks shapes or times anything.

N tokens, K experts per token, S = N * K slots, D hidden width, F expert width, E experts, V vocabulary; B sequences,
H query heads, G key-value heads, C channels of a head, P tokens of a page.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

import kernels
from kernels import Routing, registry, use_backend
from kernels.bench.distributions import router_logits
from kernels.bench.shapes import Shape

CHECKED_SEQUENCES = 2
"""Sequences of a paged batch, the first ones, that the reference computes: it walks them token by token."""

Result = Tensor | tuple[Tensor, ...]


class Contender(NamedTuple):
    run: Callable[[], Result]
    rival: bool = True
    """Whether it computes what the operation does, and is checked for that."""


class Case(NamedTuple):
    """One operation on one shape."""

    contenders: dict[str, Contender]
    missing: dict[str, str]
    """Backends that cannot run it, and why."""
    exact: Callable[[], Result]
    """The reference's result, in float32 from the same inputs."""
    shown: Callable[[Result], Result]
    """The part of a contender's result that `exact` gives."""


def build(op: str, shape: Shape, device: torch.device, dtype: torch.dtype, backends: list[str]) -> Case:
    """The case of one operation on random inputs, with ours on each of `backends` that can run it.

    Raises ValueError where none of them can.
    """
    generator = torch.Generator(device).manual_seed(shape.seed)

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).mul_(scale).to(dtype)

    built = BUILDERS[op](shape, random)
    # The registry knows a routing as four tensors.
    args = tuple(part for arg in built.args for part in (arg if isinstance(arg, Routing) else (arg,)))
    reasons = {backend: registry.reason_against(backend, built.op, args) for backend in backends}
    missing = {backend: reason for backend, reason in reasons.items() if reason}
    ours = {
        backend: Contender(lambda backend=backend: on_backend(backend, built.call, built.args))
        for backend in backends
        if backend not in missing
    }
    if not ours:
        raise ValueError(f"{op}: " + "; ".join(f"the backend {name} {why}" for name, why in missing.items()) + ".")

    def exact() -> Result:
        wide = tuple(widened(arg) for arg in (built.sample or built.args))
        return on_backend("reference", built.call, wide)

    return Case(ours | built.others, missing, exact, built.shown)


def on_backend(backend: str, call: Callable[..., Result], args: tuple) -> Result:
    with use_backend(backend):
        return call(*args)


def widened(arg: Any) -> Any:
    if isinstance(arg, Tensor) and arg.is_floating_point():
        return arg.float()
    return arg


class Built(NamedTuple):
    """What a builder below makes of a shape."""

    op: str
    """The operation's name in the registry."""
    call: Callable[..., Result]
    """The public operation, on `args`."""
    args: tuple
    others: dict[str, Contender]
    sample: tuple | None = None
    """Arguments for the reference where it is to compute a part only."""
    shown: Callable[[Result], Result] = lambda result: result


def expert_inputs(shape: Shape, random: Callable[..., Tensor]) -> tuple[Tensor, Routing, Tensor, Tensor]:
    N, D, F, E = shape.tokens, shape.hidden, shape.intermediate, shape.experts
    x = random(N, D)
    with use_backend("reference"):
        logits = router_logits(shape.distribution, N, E, shape.seed).to(x.device)
        routing = Routing(*(part.contiguous() for part in kernels.route(logits, shape.top_k)))
    return x, routing, random(E, 2 * F, D, scale=D**-0.5), random(E, D, F, scale=F**-0.5)


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return functional.silu(gate) * up


def experts_in_a_loop(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """What a plain mixture of experts does: every expert's tokens, one expert after another."""
    out, bounds = torch.zeros_like(x), routing.offsets.tolist()
    weights = routing.weights.to(x.dtype).flatten()
    for e in range(len(gate_up)):
        slots = routing.order[bounds[e] : bounds[e + 1]]
        if len(slots):
            tokens = slots // routing.weights.shape[1]
            y = swiglu(x[tokens] @ gate_up[e].t()) @ down[e].t()
            out = out.index_add(0, tokens, y * weights[slots, None])
    return out


def experts_by_grouped_mm(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """torch's grouped product with gather, SwiGLU and weighted sum around it."""
    K, ends = routing.weights.shape[1], routing.offsets[1:].int()
    rows = x.index_select(0, routing.order // K)
    hidden = functional.grouped_mm(rows, gate_up.mT, offs=ends)
    y = functional.grouped_mm(swiglu(hidden), down.mT, offs=ends)
    y = y * routing.weights.to(x.dtype).flatten()[routing.order, None]
    return torch.empty_like(y).index_copy(0, routing.order, y).view(-1, K, x.shape[1]).sum(1)


def dense_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return swiglu(x @ gate_up.t()) @ down.t()


def expert_mlp(shape: Shape, random: Callable[..., Tensor]) -> Built:
    args = expert_inputs(shape, random)
    rows, _, gate_up, down = random(shape.slots, shape.hidden), *args[1:]
    others = {
        "loop": Contender(lambda: experts_in_a_loop(*args)),
        "grouped_mm": Contender(lambda: experts_by_grouped_mm(*args)),
        "dense": Contender(lambda: dense_mlp(rows, gate_up[0], down[0]), rival=False),
    }
    return Built("expert_mlp", kernels.expert_mlp, args, others)


def with_gradients(
    call: Callable[..., Tensor], out_gradient: Tensor, args: tuple[Tensor, Routing, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Output and gradients of x, router weights, gate_up and down."""
    x, routing, gate_up, down = args
    leaves = [t.detach().requires_grad_() for t in (x, routing.weights, gate_up, down)]
    with torch.enable_grad():
        out = call(leaves[0], routing._replace(weights=leaves[1]), *leaves[2:])
        return out.detach(), *torch.autograd.grad(out, leaves, out_gradient.to(out.dtype))


def expert_mlp_training(shape: Shape, random: Callable[..., Tensor]) -> Built:
    args = expert_inputs(shape, random)
    gradient = random(shape.tokens, shape.hidden)
    rows, rows_gradient = (random(shape.slots, shape.hidden) for _ in range(2))

    def training(call: Callable[..., Tensor]) -> Callable[..., Result]:
        return lambda *args: with_gradients(call, gradient, args)

    def dense() -> Result:
        leaves = [t.detach().requires_grad_() for t in (rows, args[2][0], args[3][0])]
        with torch.enable_grad():
            return torch.autograd.grad(dense_mlp(*leaves), leaves, rows_gradient)

    others = {
        "loop": Contender(lambda: training(experts_in_a_loop)(*args)),
        "grouped_mm": Contender(lambda: training(experts_by_grouped_mm)(*args)),
        "dense": Contender(dense, rival=False),
    }
    return Built("expert_mlp", training(kernels.expert_mlp), args, others)


def grouped_gemm(shape: Shape, random: Callable[..., Tensor]) -> Built:
    S, D, F, E = shape.slots, shape.hidden, shape.intermediate, shape.experts
    x, weight = random(S, D), random(E, F, D, scale=D**-0.5)
    logits = router_logits(shape.distribution, shape.tokens, E, shape.seed)
    with use_backend("reference"):
        offsets = kernels.route(logits, shape.top_k).offsets.to(x.device)

    def loop() -> Tensor:
        bounds = offsets.tolist()
        return torch.cat([x[bounds[e] : bounds[e + 1]] @ weight[e].t() for e in range(E)])

    others = {
        "loop": Contender(loop),
        "grouped_mm": Contender(lambda: functional.grouped_mm(x, weight.mT, offs=offsets[1:].int())),
        "dense": Contender(lambda: x @ weight[0].t(), rival=False),
    }
    return Built("grouped_gemm", kernels.grouped_gemm, (x, weight, offsets), others)


def paged_attention(shape: Shape, random: Callable[..., Tensor], int8: bool = False) -> Built:
    B, T, Q, P = shape.batch, shape.context, shape.queries, shape.page
    H, G, C = shape.heads, shape.kv_heads, shape.head_dim
    each = math.ceil(T / P)
    q, k, v = random(B * Q, H, C), random(B * each, P, G, C), random(B * each, P, G, C)
    pages = (*quantised(k), *quantised(v)) if int8 else (k, None, v, None)
    order = torch.randperm(B * each, generator=torch.Generator().manual_seed(shape.seed)).to(q.device)
    table = order.view(B, each)
    offsets = torch.arange(B + 1, device=q.device) * Q
    lengths = torch.full((B,), T, device=q.device)
    # SDPA reads a contiguous cache of the queries' dtype, laid out for it beforehand.
    k, v = (p if scales is None else (p * scales[..., None]).to(q.dtype) for p, scales in (pages[:2], pages[2:]))
    keys, values = (t[table].flatten(1, 2)[:, :T].transpose(1, 2).contiguous() for t in (k, v))
    seen = torch.ones(Q, T, dtype=torch.bool, device=q.device).tril(T - Q)

    def sdpa() -> Tensor:
        rows = q.view(B, Q, H, C).transpose(1, 2)
        mask = None if Q == 1 else seen
        out = functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, enable_gqa=H != G)
        return out.transpose(1, 2).reshape(B * Q, H, C)

    cache, scales, few = pages[::2], pages[1::2], min(B, CHECKED_SEQUENCES)
    return Built(
        "paged_attention", kernels.paged_attention, (q, *cache, table, offsets, lengths, *scales),
        {"sdpa": Contender(sdpa)},
        sample=(q[: few * Q], *cache, table[:few], offsets[: few + 1], lengths[:few], *scales),
        shown=lambda out: out[: few * Q],
    )  # fmt: skip


def quantised(pages: Tensor) -> tuple[Tensor, Tensor]:
    """Pages in int8 and the scales (pages, P, G) of their tokens' heads, as rope_append writes them."""
    scales = pages.float().abs().amax(3) / 127
    return torch.floor(pages.float() / scales[..., None] + 0.5).to(torch.int8), scales


def attention(shape: Shape, random: Callable[..., Tensor]) -> Built:
    T = shape.sequence
    B, H, G, C = math.ceil(shape.tokens / T), shape.heads, shape.kv_heads, shape.head_dim
    q, k, v = random(B, T, H, C), random(B, T, G, C), random(B, T, G, C)

    def sdpa() -> Tensor:
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=H != G).transpose(1, 2)

    return Built("attention", kernels.attention, (q, k, v, None), {"sdpa": Contender(sdpa)})


def rms_norm(shape: Shape, random: Callable[..., Tensor]) -> Built:
    x, weight = random(shape.tokens, shape.hidden), random(shape.hidden).float()
    narrow = weight.to(x.dtype)
    others = {
        "torch": Contender(lambda: functional.rms_norm(x, (shape.hidden,), narrow, 1e-5)),
        "copy": Contender(x.clone, rival=False),
    }
    return Built("rms_norm", kernels.rms_norm, (x, weight, 1e-5, None), others)


def rope(shape: Shape, random: Callable[..., Tensor]) -> Built:
    x = random(shape.tokens, shape.heads, shape.head_dim)
    angle = random(shape.tokens, shape.head_dim // 2).float()
    return Built("rope", kernels.rope, (x, angle.cos(), angle.sin()), {"copy": Contender(x.clone, rival=False)})


def rope_append(shape: Shape, random: Callable[..., Tensor]) -> Built:
    n, H, G, C, P = shape.batch * shape.queries, shape.heads, shape.kv_heads, shape.head_dim, shape.page
    q, k, v, angle = random(n, H, C), random(n, G, C), random(n, G, C), random(n, C // 2).float()
    pages = random(2, math.ceil(n / P) + 1, P, G, C)
    slots = torch.randperm(n, generator=torch.Generator().manual_seed(shape.seed)).to(q.device)

    def append(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor | None) -> Result:
        out = kernels.rope_append(q, k, v, cos, sin, *rest)
        return out, rest[0].flatten(0, 1)[rest[2]], rest[1].flatten(0, 1)[rest[2]]

    args = (q, k, v, angle.cos(), angle.sin(), *pages, slots, None, None)
    copy = Contender(lambda: (q.clone(), k.clone(), v.clone()), rival=False)
    return Built("rope_append", append, args, {"copy": copy})


def route(shape: Shape, random: Callable[..., Tensor]) -> Built:
    device = random(1).device
    logits = router_logits(shape.distribution, shape.tokens, shape.experts, shape.seed).to(device)

    def plain() -> Result:
        values, experts = logits.topk(shape.top_k, dim=1)
        order = experts.flatten().sort(stable=True).indices
        offsets = torch.bincount(experts.flatten(), minlength=shape.experts).cumsum(0)
        return functional.softmax(values, dim=1), experts, order, functional.pad(offsets, (1, 0))

    return Built("route", kernels.route, (logits, shape.top_k), {"torch": Contender(plain)})


def gate(shape: Shape, random: Callable[..., Tensor]) -> Built:
    N, D, E = shape.tokens, shape.hidden, shape.experts
    x, weight = random(N, D), random(E, D, scale=D**-0.5).float()
    return Built("gate", kernels.gate, (x, weight), {"torch": Contender(lambda: x.float() @ weight.t())})


def router_statistics(shape: Shape, random: Callable[..., Tensor]) -> Built:
    device = random(1).device
    logits = router_logits(shape.distribution, shape.tokens, shape.experts, shape.seed).to(device)

    def plain() -> Result:
        probabilities = logits.softmax(1)
        entropy = torch.special.entr(probabilities).sum(1).mean()
        z = logits.logsumexp(1).square().mean()
        return probabilities.mean(0, keepdim=True), z, entropy, probabilities.amax(1).mean()

    return Built("router_statistics", kernels.router_statistics, (logits,), {"torch": Contender(plain)})


def activation(shape: Shape, random: Callable[..., Tensor]) -> Built:
    hidden = random(shape.tokens, 2 * shape.intermediate)
    others = {"torch": Contender(lambda: swiglu(hidden)), "copy": Contender(hidden.clone, rival=False)}
    return Built("swiglu", kernels.swiglu, (hidden,), others)


def cross_entropy(shape: Shape, random: Callable[..., Tensor]) -> Built:
    N, D, V = shape.tokens, shape.hidden, shape.vocab
    x, weight = random(N, D), random(V, D, scale=D**-0.5)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(shape.seed)).to(x.device)

    def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy((x @ weight.t()).float(), targets, reduction="sum")

    def with_gradients(call: Callable[..., Tensor]) -> Callable[..., Result]:
        def run(*args: Tensor) -> Result:
            leaves = [t.detach().requires_grad_() for t in args[:2]]
            with torch.enable_grad():
                loss = call(*leaves, args[2])
                return loss.detach(), *torch.autograd.grad(loss, leaves)

        return run

    args = (x, weight, targets)
    others = {"torch": Contender(lambda: with_gradients(plain)(*args))}
    return Built("cross_entropy", with_gradients(kernels.cross_entropy), args, others)


BUILDERS: dict[str, Callable[[Shape, Callable[..., Tensor]], Built]] = {
    "expert_mlp": expert_mlp,
    "expert_mlp_training": expert_mlp_training,
    "grouped_gemm": grouped_gemm,
    "paged_attention": paged_attention,
    "paged_attention_int8": lambda shape, random: paged_attention(shape, random, int8=True),
    "attention": attention,
    "rms_norm": rms_norm,
    "rope": rope,
    "rope_append": rope_append,
    "swiglu": activation,
    "gate": gate,
    "route": route,
    "router_statistics": router_statistics,
    "cross_entropy": cross_entropy,
}
"""What can be measured, by name. With `_training` the gradients are made too; `cross_entropy` always makes them."""
