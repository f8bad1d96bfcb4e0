"""Every choice of how tokens are routed, and their combinations, against a loop over tokens in float64.

N tokens of B rows, D hidden width, E experts, K experts per token.
"""

import copy
import itertools
import math

import pytest
import torch
from engines import VOCABULARY, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import autograd
from moe_lm.config import ConfigError, ModelConfig
from moe_lm.engine import Engine, SamplingParams
from moe_lm.engine.runner import Runner
from moe_lm.model import Transformer
from moe_lm.model.moe import MoE, load_balancing_loss, uniform_routing, within_capacity

pytestmark = pytest.mark.usefixtures("one_thread")

CHOOSING = {
    "logits": {},
    "bias": {"router_bias_update_rate": 0.01},
    "uniform": {"uniform_routing": True},
}
LAYERS = {
    "plain": {},
    "first dense, fine-grained, shared": {
        "first_k_dense_replace": 1, "num_hidden_layers": 3, "moe_intermediate_size": 12, "num_local_experts": 10,
        "num_experts_per_tok": 4, "n_shared_experts": 2,
    },
}  # fmt: skip
FLAGS = ("norm_topk_prob", "seq_aux", "expert_capacity_factor")


def config_of(choosing: str, layers: str, *flags: object) -> ModelConfig:
    return ModelConfig(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_local_experts": 5, "max_position_embeddings": 64, "initializer_range": 0.3, "router_aux_loss_coef": 0.7,
        "router_z_loss_coef": 0.2,
    } | CHOOSING[choosing] | LAYERS[layers] | dict(zip(FLAGS, flags, strict=False)))  # fmt: skip


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config).reset_parameters(torch.Generator().manual_seed(1))
    for bias in model.router_biases:
        bias.copy_(torch.randn(bias.shape) / 4)
    return model


def packed_rows(count: int = 2, length: int = 11) -> tuple[Tensor, ...]:
    """Tokens, targets, positions and documents of rows with two documents each, some targets unscored."""
    tokens, targets = torch.randint(0, 61, (2, count, length))
    targets[0, 4] = targets[:, -1] = -100
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)]).expand(count, length)
    return tokens, targets, positions, (torch.arange(length) >= 5).long().expand(count, length)


class LoopMoE(nn.Module):
    """One token after another, one expert after another, in float64. `rows` is B; what it did lies in `said`."""

    def __init__(self, moe: MoE, config: ModelConfig, rows: int):
        super().__init__()
        self.gate, self.experts, self.shared_experts = moe.gate, moe.experts, moe.shared_experts
        self.config, self.rows, self.bias = config, rows, moe.e_score_correction_bias

    def forward(self, x: Tensor) -> Tensor:
        config, E, K = self.config, self.config.num_local_experts, self.config.num_experts_per_tok
        tokens = x.flatten(0, -2).double()
        N = len(tokens)
        room = [math.ceil(config.expert_capacity_factor * N * K / E) or N] * E
        if not self.training:
            room = [N] * E
        out, logits, chosen, dropped = [], [], [], 0
        for n, token in enumerate(tokens):
            score = self.gate.weight.double() @ token
            p = [score[e].exp() / score.exp().sum() for e in range(E)]
            rank = [p[e].item() + self.bias[e].item() for e in range(E)] if self.bias is not None else score.tolist()
            mine = sorted(range(E), key=lambda e: -rank[e])[:K]
            if config.uniform_routing:
                mine = [(n * K + j) % E for j in range(K)]
            total = sum(p[e] for e in mine) if config.norm_topk_prob else 1
            y = torch.zeros_like(token)
            for e in mine:
                if room[e] == 0:
                    dropped += 1
                    continue
                room[e] -= 1
                y = y + p[e] / total * mlp(token, self.experts.gate_up_proj[e], self.experts.down_proj[e])
            if config.n_shared_experts:
                shared = self.shared_experts
                y = y + mlp(token, shared.gate_up_proj.weight, shared.down_proj.weight)
            out.append(y)
            logits.append(p)
            chosen.append(mine)
        self.said = {"chosen": chosen, "dropped": dropped / (N * K), "aux": self.aux(logits, chosen)}
        scores = tokens @ self.gate.weight.double().T
        self.said["z"] = sum(score.exp().sum().log() ** 2 for score in scores) / N
        return torch.stack(out).view(x.shape).to(x.dtype)

    def aux(self, p: list[list[Tensor]], chosen: list[list[int]]) -> Tensor:
        rows = self.rows if self.config.seq_aux else 1
        E, K, T, total = len(p[0]), len(chosen[0]), len(p) // rows, 0
        for part in range(rows):
            mine = range(part * T, part * T + T)
            for e in range(E):
                slots = sum(e in chosen[n] for n in mine)
                total = total + E * slots / (T * K) * sum(p[n][e] for n in mine) / T / rows
        return total


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = (gate_up.double() @ x).chunk(2)
    return down.double() @ (gate * torch.sigmoid(gate) * up)


def by_loop(model: Transformer, batch: tuple[Tensor, ...]) -> tuple[Transformer, list[LoopMoE]]:
    """A copy whose mixtures are loops, and these."""
    twin = copy.deepcopy(model)
    loops = []
    for block in twin.layers:
        if isinstance(block.mlp, MoE):
            block.mlp = LoopMoE(block.mlp, model.config, len(batch[0])).train(model.training)
            loops.append(block.mlp)
    return twin, loops


@pytest.mark.parametrize("flags", list(itertools.product([True, False], [False, True], [0.0, 0.8])), ids=str)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("choosing", CHOOSING)
def test_a_training_step_is_that_of_a_loop(choosing, layers, flags):
    config, batch = config_of(choosing, layers, *flags), packed_rows()
    model = model_of(config)
    twin, loops = by_loop(model, batch)
    losses, want = model.losses(*batch), twin.losses(*batch)  # its router losses are those of a dense model
    objective = losses.nll / 20 + losses.router_loss(config)
    objective.backward()
    aux, z = (sum(loop.said[name] for loop in loops) / len(loops) for name in ("aux", "z"))
    (want.nll / 20 + config.router_aux_loss_coef * aux + config.router_z_loss_coef * z).backward()
    assert losses.nll.item() == pytest.approx(want.nll.item(), rel=1e-6)
    assert losses.aux.item() == pytest.approx(aux.item(), rel=1e-5)
    assert losses.z.item() == pytest.approx(z.item(), rel=1e-5)
    assert losses.dropped.tolist() == pytest.approx([loop.said["dropped"] for loop in loops])
    assert (losses.dropped > 0).any() == bool(config.expert_capacity_factor)
    scored = (batch[1].flatten() >= 0).tolist()
    for counts, loop in zip(losses.expert_counts.tolist(), loops, strict=True):
        mine = [mine for mine, counted in zip(loop.said["chosen"], scored, strict=True) if counted]
        assert counts == [sum(e in chosen for chosen in mine) for e in range(config.num_local_experts)]
    gradients = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        true = gradients[name].grad
        error = (parameter.grad - true).abs().max() / true.abs().max().clamp(min=1e-3)
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("choosing", CHOOSING)
def test_evaluation_is_dropless(choosing):
    batch = packed_rows()
    model = model_of(config_of(choosing, "plain", False, False, 0.1)).eval()
    twin, _ = by_loop(model, batch)
    torch.testing.assert_close(model(batch[0]), twin(batch[0]), rtol=1e-4, atol=1e-4)
    losses = model.losses(*batch)
    assert losses.dropped.tolist() == [0, 0]
    assert model.train().losses(*batch).dropped.min() > 0.5


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"router_bias_update_rate": -0.001}, ["must be 0"]),
        ({"router_bias_update_rate": 1.0}, ["below 1", "0.001 is usual"]),
        ({"router_bias_update_rate": 0.001, "uniform_routing": True}, ["uniform_routing = True", "leave one"]),
        ({"expert_capacity_factor": -1.0}, ["must be 0"]),
        ({"expert_capacity_factor": math.inf}, ["finite"]),
        ({"expert_capacity_factor": math.nan}, ["finite"]),
        *(
            ({name: value, "num_local_experts": 0}, ["num_local_experts = 0 has none", "leave it out"])
            for name, value in (
                ("norm_topk_prob", False), ("seq_aux", True), ("router_bias_update_rate", 0.001),
                ("expert_capacity_factor", 1.25), ("uniform_routing", True),
            )
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings, parts):
    name, value = next(iter(settings.items()))
    with pytest.raises(ConfigError) as error:
        ModelConfig(**settings)
    assert all(part in str(error.value) for part in [f"{name} = {value}", *parts])


# Losses


@pytest.mark.parametrize("rows", [1, 3])
def test_router_losses_have_the_gradients_of_finite_differences(rows):
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    with kernels.use_backend("reference"):
        routing = kernels.route(logits.detach(), 2)
        found = lambda x: kernels.router_statistics(x, rows)  # noqa: E731
        assert torch.autograd.gradcheck(lambda x: load_balancing_loss(found(x).probability, routing.experts), logits)
        assert torch.autograd.gradcheck(lambda x: found(x).z, logits)


# What is materialised


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives, inside our own operations too."""

    most, where = 0, None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        run = op
        if op.namespace == "moe_kernels":
            run = getattr(autograd, op._opname)._init_fn
            with self:
                result = run(*args, **(kwargs or {}))
        else:
            result = run(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.numel() > self.most:
                self.most, self.where = each.numel(), str(op)
        return result


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("choosing", CHOOSING)
@pytest.mark.parametrize("normalize", [True, False])
def test_nothing_is_as_large_as_tokens_times_choices_times_experts(normalize, choosing, backend):
    # 96 x 8 x 64 = 49,152; all that must be there is smaller: the experts' weights and their slots' rows, of 16 numbers
    # each, take 8,192 and 12,288, or twice as much where loads are uneven, and logits of the vocabulary 96 x 61.
    config = ModelConfig(
        vocab_size=61, hidden_size=16, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_local_experts=64, num_experts_per_tok=8, seq_aux=True,
        expert_capacity_factor=1.0, norm_topk_prob=normalize, **CHOOSING[choosing],
    )  # fmt: skip
    model = model_of(config)
    with Largest() as largest, kernels.use_backend(backend):
        losses = model.losses(*packed_rows(4, 24))
        (losses.nll + losses.router_loss(config)).backward()
        if model.router_biases:
            model.update_router_biases(losses.expert_counts)
    assert 96 * 61 <= largest.most < 96 * 8 * 64, largest.where


def test_the_largest_tensor_is_found():
    with Largest() as largest, kernels.use_backend("cpu"):
        logits = torch.randn(10, 6, requires_grad=True)
        kernels.route(logits, 3).weights.sum().backward()
        assert largest.most == 60
        (torch.ones(10, 3)[..., None] * torch.ones(6)).sum()
    assert largest.most == 180


# Capacity and uniform routing


@pytest.mark.parametrize("factor", [0.01, 0.5, 1.0, 1.25, 9.0])
@pytest.mark.parametrize(("N", "E", "K"), [(1, 4, 2), (50, 7, 3), (64, 8, 8), (33, 5, 1)])
def test_the_first_slots_of_an_expert_are_kept(N, E, K, factor):
    routing = kernels.route((torch.randn(N, E) * 2).round(), K)
    taken = [0] * E
    kept = within_capacity(routing, factor).tolist()
    for n, row in enumerate(routing.experts.tolist()):
        for k, e in enumerate(row):
            assert kept[n][k] == (taken[e] < math.ceil(factor * N * K / E))
            taken[e] += 1


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("N", "E", "K"), [(0, 4, 2), (1, 4, 2), (50, 7, 3), (6, 3, 3), (33, 5, 1)])
def test_uniform_routing_is_a_routing(N, E, K, normalize):
    logits = torch.randn(N, E)
    routing = uniform_routing(logits, K, normalize)
    # The same choices by way of the kernel: a bonus on each.
    bonus = torch.full((N, E), -1e4)
    for n, j in itertools.product(range(N), range(K)):
        bonus[n, (n * K + j) % E] = 1e3 * (K - j)
    want = kernels.route(bonus, K)
    for got, true in zip(routing[1:], want[1:], strict=True):
        assert got.dtype == true.dtype
        assert torch.equal(got, true)
    p = logits.double().softmax(1).gather(1, want.experts)
    torch.testing.assert_close(routing.weights.double(), p / p.sum(1, keepdim=True) if normalize else p)
    counts = routing.offsets.diff().tolist()
    assert max(counts) - min(counts) <= 1


# Serving


@pytest.mark.parametrize("native", [True, False], ids=["native", "eager"])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize(
    "choice",
    [{"norm_topk_prob": False}, CHOOSING["bias"], CHOOSING["bias"] | {"norm_topk_prob": False},
     {"expert_capacity_factor": 0.2, "seq_aux": True}],
    ids=str,
)  # fmt: skip
def test_the_engine_writes_what_repeated_forward_passes_write(choice, layers, native):
    model = make_model(3, **LAYERS[layers] | choice)
    for bias in model.router_biases:
        bias.copy_(torch.randn(bias.shape) / 4)
    prompts = [torch.randint(0, VOCABULARY, (n,)).tolist() for n in (19, 5)]
    engine = Engine(model, native=native, max_sequences=4, max_step_tokens=16)
    results = engine.generate(prompts, SamplingParams(max_tokens=10, temperature=0))
    for tokens, result in zip(prompts, results, strict=True):
        for token in result.samples[0].tokens:
            with torch.no_grad():
                assert token == model(torch.tensor([tokens]))[0, -1].argmax().item()
            tokens = [*tokens, token]


def test_biases_and_weights_change_what_is_served():
    """Else the test above would pass where the engine knew nothing of either."""
    model = make_model(3, **CHOOSING["bias"])
    logits = model(torch.arange(9)[None])
    model.router_biases[0][2] = 1
    assert not torch.allclose(logits, model(torch.arange(9)[None]), atol=0.01)
    other = make_model(3, norm_topk_prob=False)
    assert not torch.allclose(logits, other(torch.arange(9)[None]), atol=0.01)


def test_what_depends_on_the_batch_is_not_served():
    with pytest.raises(ConfigError, match=r"model.uniform_routing = True .* leave it out to serve"):
        Runner(make_model(3, uniform_routing=True), 4, 16)
    for change in ({"expert_capacity_factor": 1.0}, {"router_jitter_noise": 0.1}):
        model = make_model(3, **change)
        with pytest.raises(ConfigError, match=rf"{next(iter(change))} = .* call its eval"):
            Runner(model.train(), 4, 16)
        Runner(model.eval(), 4, 16)
