"""Every fast operation of the CPU against its plain twin: forward, each gradient, ugly shapes, poisoned margins."""

import math

import pytest
import torch
from compare import assert_near, check, check_route
from hypothesis import given, settings
from hypothesis import strategies as st
from poison import poisoned

import kernels
from kernels import Routing, use_backend
from kernels.cpu.grouped_gemm import bucket

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (5, 123), (2, 3, 64), (300, 60)])
def test_rms_norm(shape, dtype):
    weight = torch.rand(shape[-1]) + 0.5
    check(kernels.rms_norm, {"x": torch.randn(shape), "weight": weight}, dtype, fixed=(1e-5,), wide=("weight",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (5, 46), (2, 3, 64), (300, 96)])
def test_swiglu(shape, dtype):
    check(kernels.swiglu, {"hidden": torch.randn(shape) * 2}, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "C"), [(1, 1, 2), (63, 9, 32), (7, 3, 60)])
def test_rope(N, H, C, dtype):
    angle = torch.rand(N, C // 2) * 100
    check(kernels.rope, {"x": torch.randn(N, H, C)}, dtype, fixed=(angle.cos(), angle.sin()))


def test_rope_keeps_lengths_and_relative_angles():
    C = 32
    frequency = 10000 ** (-torch.arange(0, C, 2) / C)
    q, k = torch.randn(1, 1, C), torch.randn(1, 1, C)

    def score(i, j):
        def turn(x, t):
            return kernels.rope(x, (t * frequency)[None].cos(), (t * frequency)[None].sin())

        return (turn(q, i) * turn(k, j)).sum().item()

    assert score(10, 3) == pytest.approx(score(107, 100), rel=1e-4)


@pytest.mark.parametrize(("N", "E", "K"), [(1, 1, 1), (1, 16, 2), (63, 16, 2), (200, 8, 4), (17, 64, 1)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(N, E, K, normalize, biased):
    for logits in (torch.randn(N, E), (torch.randn(N, E) * 2).round(), one_expert(N, E)):
        check_route(logits, K, torch.randn(E) / 4 if biased else None, normalize)


def one_expert(N: int, E: int) -> torch.Tensor:
    logits = torch.randn(N, E)
    logits[:, E // 2] += 100
    return logits


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_of_the_weights_is_that_of_finite_differences(normalize, biased):
    logits = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    logits.data[0] = 0.5 - torch.arange(6)  # and a clear order, which a difference must not change
    bias = torch.randn(6, dtype=torch.float64) if biased else None
    with use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x: kernels.route(x, 3, bias, normalize).weights, logits)


def test_a_bias_chooses_and_does_not_weigh():
    logits = torch.tensor([[2.0, 1.0, 0.0, -200.0, -200.0]])
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            plain = kernels.route(logits, 2, torch.zeros(5), False)
            pushed = kernels.route(logits, 2, torch.tensor([-2.0, 0.0, 2.0, 0.0, 0.0]), False)
            # Chosen though their probability is 0 in float32: still weights, not 0 / 0.
            far = kernels.route(logits, 2, torch.tensor([0.0, 0.0, 0.0, 3.0, 3.0]))
        assert plain.experts.tolist() == [[0, 1]]
        assert pushed.experts.tolist() == [[2, 1]]
        p = logits.softmax(1)[0].tolist()
        assert plain.weights[0].tolist() == pytest.approx(p[:2])
        assert pushed.weights[0].tolist() == pytest.approx([p[2], p[1]])
        assert far.experts.tolist() == [[3, 4]]
        assert far.weights.tolist() == [[0.5, 0.5]]


def test_a_bias_of_another_dtype_is_left_to_the_reference():
    said = kernels.explain("route", (torch.randn(3, 4), 2, torch.zeros(4).bfloat16(), True))
    assert (said["cpu"], said["reference"]) == ("adds float32 biases only, not torch.bfloat16", "chosen")


def test_more_choices_than_experts_are_refused():
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k = {top_k} must be 1 to 4, the number of experts"):
            kernels.route(torch.randn(3, 4), top_k)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_routing_bookkeeping(data):
    N, E = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 16))
    K = data.draw(st.integers(1, min(E, 4)))
    # Few distinct values, so that ties are common.
    logits = torch.tensor([[data.draw(st.integers(0, 2)) for _ in range(E)] for _ in range(N)]).float().view(N, E)
    routing = kernels.route(logits, K)
    assert routing.offsets[0] == 0
    assert routing.offsets[-1] == N * K
    assert sorted(routing.order.tolist()) == list(range(N * K))
    for e in range(E):
        slots = routing.order[routing.offsets[e] : routing.offsets[e + 1]].tolist()
        assert slots == sorted(slots)
        assert all(routing.experts.view(-1)[slot] == e for slot in slots)
    for n in range(N):
        assert routing.experts[n].tolist() == sorted(range(E), key=lambda e: (-logits[n, e].item(), e))[:K]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "E"), [(1, 1, 1), (13, 40, 5), (200, 64, 16), (3000, 33, 20)])
def test_gate(N, D, E, dtype):
    check(kernels.gate, {"x": torch.randn(N, D), "weight": torch.randn(E, D)}, dtype, wide=("weight",))


def test_the_router_sums_in_float32():
    """1 + 1 / 1024 of bfloat16 tokens, which bfloat16 would round to 1; and a weight of that size."""
    x = torch.tensor([[1.0, 2.0**-10, 1.0]]).bfloat16()
    weight = torch.tensor([[1.0, 1.0, 2.0**-12]])
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            assert kernels.gate(x, weight).item() == 1 + 2**-10 + 2**-12


@pytest.mark.parametrize(("N", "E", "rows"), [(1, 1, 1), (1, 16, 1), (60, 5, 3), (64, 40, 4), (700, 16, 1)])
def test_router_statistics(N, E, rows):
    def op(logits):
        found = kernels.router_statistics(logits, rows)
        assert not any(each.requires_grad for each in (found.entropy, found.confidence))
        values.append(torch.stack([found.entropy, found.confidence]).detach())
        return found.probability, found.z

    values = []
    check(op, {"logits": torch.randn(N, E) * 3}, torch.float32, floor=1e-4)
    got, true, _ = values
    torch.testing.assert_close(got, true)


def test_a_logit_of_no_number_shows_in_every_statistic():
    logits = torch.randn(6, 4)
    logits[3, 2] = math.nan
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            found = kernels.router_statistics(logits, 3)
        assert found.probability.isnan().all(1).tolist() == [False, True, False]
        assert all(each.isnan() for each in found[1:])


def make_routing(kind: str, N: int, E: int, K: int) -> Routing:
    logits = torch.randn(N, E)
    if kind == "one expert":
        logits[:, 0] += 100
    elif kind == "empty experts":
        logits[:, : E // 2] -= 100
    return kernels.route(logits, K)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "one expert", "empty experts"])
@pytest.mark.parametrize(("N", "D", "F", "E", "K"), [(1, 16, 8, 4, 2), (63, 60, 36, 16, 2), (200, 32, 64, 8, 3)])
def test_expert_mlp(N, D, F, E, K, kind, dtype):
    routing = make_routing(kind, N, E, K)

    def op(x, weights, gate_up, down):
        return kernels.expert_mlp(x, routing._replace(weights=weights), gate_up, down)

    inputs = {
        "x": torch.randn(N, D),
        "weights": routing.weights,
        "gate_up": torch.randn(E, 2 * F, D) / math.sqrt(D),
        "down": torch.randn(E, D, F) / math.sqrt(F),
    }
    check(op, inputs, dtype, wide=("weights",))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_expert_mlp_on_any_routing(data):
    E = data.draw(st.integers(1, 9))
    N, K = data.draw(st.integers(1, 70)), data.draw(st.integers(1, min(E, 4)))
    experts = [data.draw(st.permutations(range(E)))[:K] for _ in range(N)]
    logits = torch.full((N, E), -100.0).scatter_(1, torch.tensor(experts), torch.randn(N, K))
    routing = kernels.route(logits, K)
    x, gate_up, down = torch.randn(N, 12), torch.randn(E, 20, 12), torch.randn(E, 12, 10)
    out = kernels.expert_mlp(x, routing, gate_up, down)
    with use_backend("reference"):
        torch.testing.assert_close(out, kernels.expert_mlp(x, routing, gate_up, down), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("N", [40, 400])
def test_expert_mlp_sends_nothing_between_tokens(N):
    """A NaN token spoils its own row only: neither padding nor neighbours read it."""
    routing = make_routing("random", N, 4, 2)
    x, gate_up, down = torch.randn(N, 16), torch.randn(4, 24, 16), torch.randn(4, 16, 12)
    clean = kernels.expert_mlp(x, routing, gate_up, down)
    x[0] = float("nan")
    spoiled = kernels.expert_mlp(x, routing, gate_up, down)
    assert spoiled[0].isnan().all()
    assert torch.equal(spoiled[1:], clean[1:])


def test_buckets_hold_the_rows_and_little_more():
    for rows in range(9000):
        assert rows <= bucket(rows) <= max(rows * 9 / 8 + 1, rows + 7)
        assert bucket(bucket(rows)) == bucket(rows)
    assert len({bucket(rows) for rows in range(8193)}) <= 65


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[5, 0, 123], [0, 0, 1], [64, 65, 63]])
def test_grouped_gemm(sizes, dtype):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    inputs = {"x": torch.randn(sum(sizes), 60), "weight": torch.randn(len(sizes), 36, 60) / 8}
    check(kernels.grouped_gemm, inputs, dtype, fixed=(offsets,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("B", "T", "H", "G", "C"), [(1, 1, 1, 1, 2), (2, 63, 4, 1, 60), (3, 130, 6, 2, 16), (40, 65, 8, 8, 32)]
)
def test_attention(B, T, H, G, C, documents, dtype):
    numbers = torch.randint(0, 2, (B, T)).cumsum(1) // 9 if documents else None
    inputs = {"q": torch.randn(B, T, H, C), "k": torch.randn(B, T, G, C), "v": torch.randn(B, T, G, C)}
    # With one key the softmax is constant: the gradient of q is 0, and its error is that of two terms of about 1.
    check(kernels.attention, inputs, dtype, fixed=(numbers,), floor=1.0 if T == 1 else 0.1)


def test_attention_does_not_cross_documents():
    q, k, v = torch.randn(1, 10, 4, 8), torch.randn(1, 10, 1, 8), torch.randn(1, 10, 1, 8)
    documents = torch.tensor([[0] * 4 + [1] * 6])
    out = kernels.attention(q, k, v, documents)
    k[:, :4], v[:, :4] = float("inf"), float("nan")
    alone = kernels.attention(q[:, 4:], k[:, 4:], v[:, 4:])
    torch.testing.assert_close(out[:, 4:], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("P", [4, 16])
@pytest.mark.parametrize(("H", "G", "C"), [(1, 1, 8), (8, 1, 32), (6, 2, 60), (4, 4, 16)])
def test_paged_attention(H, G, C, P, dtype):
    news, lengths = [1, 5, 8, 11, P], [1, 5, 3 * P + 1, 40, P]
    pages_each = [-(-length // P) for length in lengths]
    order = torch.randperm(sum(pages_each) + 3)
    table = torch.zeros(len(news), max(pages_each), dtype=torch.int64)
    k, v = (torch.full((len(order), P, G, C), float("nan"), dtype=dtype) for _ in range(2))
    used = 0
    for s, (length, count) in enumerate(zip(lengths, pages_each, strict=True)):
        table[s, :count] = order[used : used + count]
        used += count
        for t in range(length):
            k[table[s, t // P], t % P] = torch.randn(G, C).to(dtype)
            v[table[s, t // P], t % P] = torch.randn(G, C).to(dtype)
    q = poisoned(torch.randn(sum(news), H, C).to(dtype))
    rest = (table, torch.tensor([0, *news]).cumsum(0), torch.tensor(lengths))
    out = kernels.paged_attention(q, k, v, *rest)
    with use_backend("reference"):
        true = kernels.paged_attention(q.float(), k.float(), v.float(), *rest)
    assert_near(out, true, dtype, "out")
    alone = kernels.paged_attention(q[-1:], k, v, table[-1:], torch.tensor([0, 1]), rest[2][-1:])
    assert torch.equal(alone, out[-1:]), "a query's bits depend on the queries beside it"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "V"), [(1, 8, 2), (63, 60, 123), (1500, 16, 300)])
@pytest.mark.parametrize("ignored", [False, True])
def test_cross_entropy(N, D, V, ignored, dtype):
    targets = torch.randint(0, V, (N,))
    if ignored:
        targets[::3] = -100
    inputs = {"x": torch.randn(N, D), "weight": torch.randn(V, D) / math.sqrt(D)}
    check(kernels.cross_entropy, inputs, dtype, fixed=(targets,), wide=("weight",))


def test_cross_entropy_ignores_what_it_does_not_score():
    x, weight = torch.randn(4, 8), torch.randn(10, 8)
    x[1] = float("nan")
    x.requires_grad_()
    loss = kernels.cross_entropy(x, weight.requires_grad_(), torch.tensor([1, -100, 2, 3]))
    loss.backward()
    assert loss.isfinite()
    assert x.grad[[0, 2, 3]].isfinite().all()
    assert weight.grad.isfinite().all()


def test_twice_gives_the_same_bits():
    routing = make_routing("random", 200, 8, 2)
    x, gate_up, down = (torch.randn(shape).bfloat16() for shape in [(200, 32), (8, 64, 32), (8, 32, 32)])

    def run():
        leaves = [t.clone().requires_grad_() for t in (x, gate_up, down)]
        kernels.expert_mlp(leaves[0], routing, *leaves[1:]).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
