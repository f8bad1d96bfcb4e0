"""The fast operations as custom operators of torch, with fakes and gradients.

torch.compile, fake tensors and autograd see each as one opaque node. An implementation asks the registry again, so the
backend that `use_backend` forces holds inside as well. Gradients that an operation saves for are made in its own dtype.
"""

import torch
from torch import Tensor, library

from kernels import registry


def implementation(op: str, *args) -> object:
    """The module that runs `op` on these arguments."""
    return registry.module(registry.select(op, args), op)


@library.custom_op("moe_kernels::rms_norm_forward", mutates_args=())
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return implementation("rms_norm", x, weight, eps).rms_norm_forward(x, weight, eps)


@rms_norm_forward.register_fake
def _(x, weight, eps):
    return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@library.custom_op("moe_kernels::add_rms_norm_forward", mutates_args=())
def add_rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("rms_norm", x, weight, eps, residual).add_rms_norm_forward(x, weight, eps, residual)


@add_rms_norm_forward.register_fake
def _(x, weight, eps, residual):
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@library.custom_op("moe_kernels::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, r: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    module = implementation("rms_norm", x, weight, 0.0)
    return module.rms_norm_backward(grad.contiguous(), x, weight, r, grad_sum)


@rms_norm_backward.register_fake
def _(grad, x, weight, r, grad_sum):
    return torch.empty_like(x), torch.empty_like(weight)


def _rms_norm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _rms_norm_backward(ctx, grad, _):
    return *rms_norm_backward(grad, *ctx.saved_tensors, None), None


rms_norm_forward.register_autograd(_rms_norm_backward, setup_context=_rms_norm_setup)


def _add_rms_norm_setup(ctx, inputs, output):
    _, total, r = output
    ctx.save_for_backward(total, inputs[1], r)
    ctx.mark_non_differentiable(r)


def _add_rms_norm_backward(ctx, grad, grad_sum, _):
    grad_total, grad_weight = rms_norm_backward(grad, *ctx.saved_tensors, grad_sum)
    return grad_total, grad_weight, None, grad_total


add_rms_norm_forward.register_autograd(_add_rms_norm_backward, setup_context=_add_rms_norm_setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm_forward(x, weight, eps)[0]
    return add_rms_norm_forward(x, weight, eps, residual)[:2]


@library.custom_op("moe_kernels::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return implementation("rope", x, cos, sin).rope(x, cos, sin)


@rope.register_fake
def _(x, cos, sin):
    return torch.empty_like(x)


def _rope_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _rope_backward(ctx, grad):
    cos, sin = ctx.saved_tensors
    return rope(grad.contiguous(), cos, -sin), None, None


rope.register_autograd(_rope_backward, setup_context=_rope_setup)


@library.custom_op("moe_kernels::rope_append", mutates_args=("k_pages", "v_pages", "k_scales", "v_scales"))
def rope_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: Tensor, v_pages: Tensor,
    slots: Tensor, k_scales: Tensor | None, v_scales: Tensor | None,
) -> Tensor:  # fmt: skip
    args = (q, k, v, cos, sin, k_pages, v_pages, slots, k_scales, v_scales)
    return implementation("rope_append", *args).rope_append(*args)


@rope_append.register_fake
def _(q, k, v, cos, sin, k_pages, v_pages, slots, k_scales, v_scales):
    return q.new_empty(q.shape)


@library.custom_op("moe_kernels::gate", mutates_args=())
def gate(x: Tensor, weight: Tensor) -> Tensor:
    return implementation("gate", x, weight).gate(x, weight)


@gate.register_fake
def _(x, weight):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


@library.custom_op("moe_kernels::gate_backward", mutates_args=())
def gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return implementation("gate", x, weight).gate_backward(grad, x, weight)


@gate_backward.register_fake
def _(grad, x, weight):
    return torch.empty_like(x), torch.empty_like(weight)


def _gate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gate_backward(ctx, grad):
    return gate_backward(grad, *ctx.saved_tensors)


gate.register_autograd(_gate_backward, setup_context=_gate_setup)


@library.custom_op("moe_kernels::route", mutates_args=())
def route(logits: Tensor, top_k: int, bias: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation("route", logits, top_k, bias, normalize).route(logits, top_k, bias, normalize)


@route.register_fake
def _(logits, top_k, bias, normalize):
    N, E = logits.shape
    index = logits.new_empty(N, top_k, dtype=torch.int64)
    return logits.new_empty(N, top_k), index, index.new_empty(N * top_k), index.new_empty(E + 1)


@library.custom_op("moe_kernels::route_backward", mutates_args=())
def route_backward(grad_weights: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, normalize: bool) -> Tensor:
    """Gradient of the logits (N, E), on every device a few plain operations on (N, K) and (N, E).

    A softmax p with gradients g passes p * (g - sum of g * p) on: over the chosen experts, the others getting nothing;
    or over all of them, of which those not chosen have no g.
    """
    inner = grad_weights * weights
    total = inner.sum(1, keepdim=True)
    if normalize:
        return torch.zeros_like(logits).scatter_(1, experts, weights * (grad_weights - total))
    return torch.softmax(logits, 1).mul_(-total).scatter_add_(1, experts, inner)


@route_backward.register_fake
def _(grad_weights, logits, weights, experts, normalize):
    return torch.empty_like(logits)


def _route_setup(ctx, inputs, output):
    logits, _, _, ctx.normalize = inputs
    ctx.save_for_backward(logits, *output[:2])
    ctx.mark_non_differentiable(*output[1:])


def _route_backward(ctx, grad_weights, *_):
    return route_backward(grad_weights, *ctx.saved_tensors, ctx.normalize), None, None, None


route.register_autograd(_route_backward, setup_context=_route_setup)


@library.custom_op("moe_kernels::router_statistics", mutates_args=())
def router_statistics(logits: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return implementation("router_statistics", logits, rows).router_statistics(logits, rows)


@router_statistics.register_fake
def _(logits, rows):
    return logits.new_empty(rows, logits.shape[1]), *[logits.new_empty(()) for _ in range(3)]


@library.custom_op("moe_kernels::router_statistics_backward", mutates_args=())
def router_statistics_backward(logits: Tensor, grad_probability: Tensor, grad_z: Tensor) -> Tensor:
    module = implementation("router_statistics", logits, len(grad_probability))
    return module.router_statistics_backward(logits, grad_probability, grad_z)


@router_statistics_backward.register_fake
def _(logits, grad_probability, grad_z):
    return torch.empty_like(logits)


def _router_statistics_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.mark_non_differentiable(*output[2:])


def _router_statistics_backward(ctx, grad_probability, grad_z, *_):
    return router_statistics_backward(*ctx.saved_tensors, grad_probability, grad_z), None


router_statistics.register_autograd(_router_statistics_backward, setup_context=_router_statistics_setup)


@library.custom_op("moe_kernels::grouped_gemm", mutates_args=())
def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return implementation("grouped_gemm", x, weight, offsets).grouped_gemm(x, weight, offsets)


@grouped_gemm.register_fake
def _(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@library.custom_op("moe_kernels::grouped_gemm_backward", mutates_args=())
def grouped_gemm_backward(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return implementation("grouped_gemm", x, weight, offsets).grouped_gemm_backward(grad, x, weight, offsets)


@grouped_gemm_backward.register_fake
def _(grad, x, weight, offsets):
    return torch.empty_like(x), torch.empty_like(weight)


def _grouped_gemm_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grouped_gemm_backward(ctx, grad):
    return *grouped_gemm_backward(grad.contiguous(), *ctx.saved_tensors), None


grouped_gemm.register_autograd(_grouped_gemm_backward, setup_context=_grouped_gemm_setup)


@library.custom_op("moe_kernels::expert_mlp_forward", mutates_args=())
def expert_mlp_forward(
    x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor]:
    module = implementation("expert_mlp", x, weights, experts, order, offsets, gate_up, down)
    return module.expert_mlp_forward(x, weights, experts, order, offsets, gate_up, down)


@expert_mlp_forward.register_fake
def _(x, weights, experts, order, offsets, gate_up, down):
    backend = registry.select("expert_mlp", (x, weights, experts, order, offsets, gate_up, down))
    if backend == "gpu":
        return torch.empty_like(x), x.new_empty(order.shape[0], gate_up.shape[1])
    # On the CPU how many rows there are depends on the routing.
    return torch.empty_like(x), x.new_empty(library.get_ctx().new_dynamic_size(), gate_up.shape[1])


@library.custom_op("moe_kernels::expert_mlp_backward", mutates_args=())
def expert_mlp_backward(
    grad: Tensor, x: Tensor, weights: Tensor, experts: Tensor, order: Tensor, offsets: Tensor, gate_up: Tensor,
    down: Tensor, hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    module = implementation("expert_mlp", x, weights, experts, order, offsets, gate_up, down)
    return module.expert_mlp_backward(grad, x, weights, experts, order, offsets, gate_up, down, hidden)


@expert_mlp_backward.register_fake
def _(grad, x, weights, experts, order, offsets, gate_up, down, hidden):
    return tuple(torch.empty_like(t) for t in (x, weights, gate_up, down))


def _expert_mlp_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _expert_mlp_backward(ctx, grad, _):
    grads = expert_mlp_backward(grad.contiguous(), *ctx.saved_tensors)
    return grads[0], grads[1], None, None, None, grads[2], grads[3]


expert_mlp_forward.register_autograd(_expert_mlp_backward, setup_context=_expert_mlp_setup)


def expert_mlp(*args: Tensor) -> Tensor:
    return expert_mlp_forward(*args)[0]


@library.custom_op("moe_kernels::swiglu", mutates_args=())
def swiglu(hidden: Tensor) -> Tensor:
    return implementation("swiglu", hidden).swiglu(hidden)


@swiglu.register_fake
def _(hidden):
    return hidden.new_empty(*hidden.shape[:-1], hidden.shape[-1] // 2)


@library.custom_op("moe_kernels::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, hidden: Tensor) -> Tensor:
    return implementation("swiglu", hidden).swiglu_backward(grad, hidden)


@swiglu_backward.register_fake
def _(grad, hidden):
    return torch.empty_like(hidden)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad):
    return swiglu_backward(grad, *ctx.saved_tensors)


swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_setup)


@library.custom_op("moe_kernels::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    return implementation("attention", q, k, v, documents).attention_forward(q, k, v, documents)


@attention_forward.register_fake
def _(q, k, v, documents):
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@library.custom_op("moe_kernels::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    module = implementation("attention", q, k, v, documents)
    return module.attention_backward(grad, q, k, v, documents, out, lse)


@attention_backward.register_fake
def _(grad, q, k, v, documents, out, lse):
    return tuple(torch.empty_like(t) for t in (q, k, v))


def _attention_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx, grad, _):
    return *attention_backward(grad, *ctx.saved_tensors), None


attention_forward.register_autograd(_attention_backward, setup_context=_attention_setup)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    return attention_forward(q, k, v, documents)[0]


@library.custom_op("moe_kernels::cross_entropy_with_grads", mutates_args=())
def cross_entropy_with_grads(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return implementation("cross_entropy", x, weight, targets).cross_entropy_with_grads(x, weight, targets)


@cross_entropy_with_grads.register_fake
def _(x, weight, targets):
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight, dtype=torch.float32)


def _cross_entropy_setup(ctx, inputs, output):
    ctx.weight_dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _cross_entropy_backward(ctx, grad, *_):
    grad_x, grad_weight = ctx.saved_tensors
    return grad_x * grad.to(grad_x.dtype), (grad_weight * grad).to(ctx.weight_dtype), None


cross_entropy_with_grads.register_autograd(_cross_entropy_backward, setup_context=_cross_entropy_setup)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy_with_grads(x, weight, targets)[0]


@library.custom_op("moe_kernels::paged_attention", mutates_args=())
def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, query_offsets: Tensor, lengths: Tensor,
    k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    args = (q, k_pages, v_pages, page_table, query_offsets, lengths, k_scales, v_scales)
    return implementation("paged_attention", *args).paged_attention(*args)


@paged_attention.register_fake
def _(q, k_pages, v_pages, page_table, query_offsets, lengths, k_scales=None, v_scales=None):
    return torch.empty_like(q)
