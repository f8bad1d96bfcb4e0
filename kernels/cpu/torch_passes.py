"""The passes of native_passes, which documents them, in terms of torch's: where there is no C++ compiler."""

import torch
from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> float:
    unscored = (targets < 0).nonzero().squeeze(1)
    index = targets.clamp(min=0)[:, None]
    log_p = torch.log_softmax(logits.float(), dim=1)
    # An unscored row is overwritten, not multiplied by 0, which would let its NaN through.
    loss = -log_p.gather(1, index).index_fill_(0, unscored, 0.0).sum(dtype=torch.float64).item()
    if gradient:
        p = log_p.exp_()
        p.scatter_add_(1, index, p.new_full((), -1.0).expand_as(index))
        logits.copy_(p.index_fill_(0, unscored, 0.0))
    return loss


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def swiglu_backward(
    grad_act: Tensor, hidden: Tensor, weights: Tensor | None = None, slots: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    gate, up = hidden.chunk(2, dim=-1)
    silu = functional.silu(gate)
    act = silu * up
    grad_weights = None
    if weights is not None:
        spare = slots < 0
        chosen = slots.clamp(min=0)
        grad_weights = torch.empty_like(weights)
        inner = (grad_act * act).sum(-1, dtype=torch.float32)
        grad_weights.view(-1).index_copy_(0, slots[~spare], inner[~spare])
        factor = weights.view(-1).index_select(0, chosen).to(act.dtype)[:, None]
        act, grad_act_of = act * factor, grad_act * factor
        act[spare], grad_act_of[spare] = 0, 0
    else:
        grad_act_of = grad_act.clone()
    grad_hidden = torch.empty_like(hidden)
    grad_gate, grad_up = grad_hidden.chunk(2, dim=-1)
    torch.mul(grad_act_of, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_act_of.mul_(up), gate, grad_input=grad_gate)
    if weights is not None:
        grad_hidden[spare] = 0
    grad_act.copy_(act)
    return grad_hidden, grad_weights


def route(logits: Tensor, top_k: int, bias: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probability = None if bias is None and normalize else torch.softmax(logits, dim=1)
    scores = logits if bias is None else probability + bias
    experts = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :top_k].contiguous()
    weights = torch.softmax(logits.gather(1, experts), dim=1) if normalize else probability.gather(1, experts)
    order = torch.sort(experts.view(-1), stable=True).indices
    offsets = torch.zeros(logits.shape[1] + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(experts.view(-1), minlength=logits.shape[1]), 0, out=offsets[1:])
    return weights, experts, order, offsets


def gate(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.t()


def gate_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return (grad @ weight).to(x.dtype), grad.t() @ x.float()


def router_statistics(logits: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, E = logits.shape
    log_p = torch.log_softmax(logits, dim=1)
    p = log_p.exp()
    z = (logits[:, 0] - log_p[:, 0]).square().mean()
    return p.view(rows, N // rows, E).mean(1), z, -(p * log_p).sum(1).mean(), p.amax(1).mean()


def router_statistics_backward(logits: Tensor, grad_probability: Tensor, grad_z: Tensor) -> Tensor:
    N, E = logits.shape
    rows = len(grad_probability)
    p = torch.softmax(logits, dim=1)
    of_p = (grad_probability * (rows / N))[:, None] - torch.einsum(
        "rne,re->rn", p.view(rows, -1, E), grad_probability * (rows / N)
    ).unsqueeze(2)
    of_z = logits.logsumexp(1, keepdim=True).mul_(2 * grad_z / N)
    return p * (of_p.reshape(N, E) + of_z)


def place(
    order: Tensor, offsets: Tensor, starts: list[int], shape: torch.Size, size: int, total: int
) -> tuple[Tensor, Tensor, Tensor]:
    counts = offsets.diff()
    ranks = torch.arange(len(order)) - offsets[:-1].repeat_interleave(counts)
    first = torch.arange(len(starts)).mul_(size).repeat_interleave(counts)
    further = torch.tensor(starts).repeat_interleave(counts)
    rows_in_order = torch.where(ranks < size, first, further).add_(ranks)
    slots = torch.full((total,), -1).index_copy_(0, rows_in_order, order)
    tokens = torch.div(slots, shape[1], rounding_mode="floor")  # -1 stays -1
    row_of_slot = torch.empty_like(order).index_copy_(0, order, rows_in_order).view(shape)
    return tokens, slots, row_of_slot


def gather(x: Tensor, sources: Tensor) -> Tensor:
    rows = x.index_select(0, sources.clamp(min=0))
    return rows.index_fill_(0, (sources < 0).nonzero().squeeze(1), 0)


def combine(y: Tensor, weights: Tensor | None, row_of_slot: Tensor) -> Tensor:
    first, *others = row_of_slot.unbind(1)
    out = y.index_select(0, first)
    if weights is not None:
        weights = weights.to(y.dtype)
        out.mul_(weights[:, :1])
    for k, rows in enumerate(others, start=1):
        chosen = y.index_select(0, rows)
        if weights is None:
            out.add_(chosen)
        else:
            out.addcmul_(chosen, weights[:, k : k + 1])
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=torch.float32)
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (total * r.to(x.dtype)).mul_(weight.to(x.dtype)), total, r


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, grad_sum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """With y = x r w: dw = sum over rows of g x r, and dx = r g w - x r^3 / D sum over channels of g x w. Both sums are
    matrix-vector products with the one product g x."""
    D = x.shape[-1]
    w, rows = weight.to(x.dtype), inverse.view(-1)
    product = (grad * x).view(-1, D)
    grad_weight = torch.mv(product.t(), rows.to(x.dtype))
    shift = torch.mv(product, w).float().mul_(rows.pow(3)).div_(-D)
    grad_x = (grad * w).mul_(inverse.to(x.dtype)).addcmul_(x, shift.to(x.dtype).view(inverse.shape))
    if grad_sum is not None:
        grad_x.add_(grad_sum)
    return grad_x, grad_weight.to(weight.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    # Sines rounded to x's dtype, as Hugging Face does: torch has no vector code for products of mixed dtypes.
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def softmax(scores: Tensor, lse: Tensor, scale: float, first: int, documents: Tensor | None) -> None:
    weighted, at = visible(scores, lse, scale, first, documents)
    sums = weighted.logsumexp(-1)
    lse[:, at] = sums
    scores.copy_((weighted - sums[..., None]).exp_().view(scores.shape))


def softmax_backward(
    scores: Tensor, grad_p: Tensor, lse: Tensor, delta: Tensor, scale: float, first: int, documents: Tensor | None
) -> None:
    weighted, at = visible(scores, lse, scale, first, documents)
    p = (weighted - lse[:, at, :, None]).exp_()
    scores.copy_(p.view(scores.shape))
    grad = grad_p.view(p.shape).float().sub_(delta[:, at, :, None]).mul_(p).mul_(scale)
    grad_p.copy_(grad.masked_fill_(p == 0, 0.0).view(scores.shape))


def visible(
    scores: Tensor, lse: Tensor, scale: float, first: int, documents: Tensor | None
) -> tuple[Tensor, slice]:  # fmt: skip
    """scale * scores, float32 (B, I, R, J), -inf where a key is not seen, and the places of the queries."""
    B, queries, J = scores.shape
    R = lse.shape[2]
    at = slice(first, first + queries // R)
    keys = torch.arange(J)
    hidden = keys > torch.arange(at.start, at.stop)[:, None]
    if documents is not None:
        hidden = hidden | (documents[:, at, None] != documents[:, None, :J])
        hidden = hidden[:, :, None]
    else:
        hidden = hidden[None, :, None]
    return (scores.float() * scale).view(B, -1, R, J).masked_fill_(hidden, float("-inf")), at


def row_products(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, dtype=torch.float32)
