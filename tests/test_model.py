"""The model against its formulas: what a token sees, what it weighs, what its router is charged, what it computes."""

import math
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import registry
from moe_lm.config import ModelConfig, RopeScaling
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.model.moe import MoE, Routed, load_balancing_loss, router_entropy, router_z_loss
from moe_lm.scaling.counts import forward_flops_per_token, parameters, train_flops_per_token
from moe_lm.toml import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

SHAPES = {
    "mixture": {},
    "mixture, shared expert": {"n_shared_experts": 1, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "dense": {"num_local_experts": 0},
    "dense, odd sizes, tied": {
        "num_local_experts": 0, "hidden_size": 60, "num_attention_heads": 3, "head_dim": 22, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def shape(**changes) -> ModelConfig:
    return ModelConfig(**{
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_local_experts": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    } | changes)  # fmt: skip


def make_model(config: ModelConfig, compute_dtype: torch.dtype | None = None) -> Transformer:
    return Transformer(config, compute_dtype).reset_parameters(torch.Generator().manual_seed(1))


def rows(config: ModelConfig, count: int = 2, length: int = 20) -> tuple[torch.Tensor, ...]:
    """Tokens, targets, positions and documents of rows that hold two documents each."""
    tokens, targets = torch.randint(0, config.vocab_size, (2, count, length))
    first = length // 3
    positions = torch.cat([torch.arange(first), torch.arange(length - first)]).expand(count, length)
    documents = (torch.arange(length) >= first).long().expand(count, length)
    return tokens, targets, positions, documents


def training_loss(model: Transformer, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    losses = model.losses(*batch)
    return losses.nll / batch[0].numel() + losses.router_loss(model.config)


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def backward(model: Transformer, batch: tuple[torch.Tensor, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    loss = training_loss(model, batch)
    loss.backward()
    return loss.item(), gradients(model)


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# What a token sees


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("changed", [1, 10, 19])
def test_a_token_changes_nothing_before_it(name, changed):
    model = make_model(shape(**SHAPES[name]))
    tokens = torch.randint(0, 61, (2, 20))
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % 61
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert_close(after[:, :changed], before[:, :changed])
    difference = (after - before).abs().amax(-1)
    assert (difference[:, changed:] > 1e-3).all(), "a change reaches every token after it"


@pytest.mark.parametrize("name", SHAPES)
def test_documents_of_a_row_are_as_good_as_rows_of_their_own(name):
    model = make_model(shape(**SHAPES[name]))
    tokens, targets, positions, documents = rows(model.config)
    cut = 20 // 3
    with torch.no_grad():
        packed = model(tokens, positions, whole_rows(documents))
        assert_close(packed, torch.cat([model(tokens[:, :cut]), model(tokens[:, cut:])], dim=1))
        nll = model.losses(tokens, targets, positions, documents).nll
        apart = [model.losses(tokens[:, part], targets[:, part], positions[:, part]).nll
                 for part in (slice(cut), slice(cut, None))]  # fmt: skip
    assert_close(nll, sum(apart))
    assert_close(nll, F.cross_entropy(packed.flatten(0, 1), targets.flatten(), reduction="sum"))


def test_targets_below_zero_are_not_scored():
    model = make_model(shape())
    tokens, targets, *_ = rows(model.config)
    targets[:, ::3] = -100
    scored = targets >= 0
    with torch.no_grad():
        want = F.cross_entropy(model(tokens)[scored], targets[scored], reduction="sum")
        assert_close(model.losses(tokens, targets, torch.arange(20).expand(2, 20)).nll, want)


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", factor=4.0)])
def test_positions_count_from_zero_and_only_their_differences_matter(scaling):
    model = make_model(shape(rope_scaling=scaling))
    tokens, positions = torch.randint(0, 61, (2, 20)), torch.arange(20).expand(2, 20)
    with torch.no_grad():
        logits = model(tokens)
        assert torch.equal(logits, model(tokens, positions))
        torch.testing.assert_close(logits, model(tokens, positions + 37), rtol=1e-3, atol=1e-3)
        stretched = model(tokens, positions * (4 if scaling else 2))
        assert (stretched - logits).abs().max() > 1e-2
        if scaling:
            model.config = shape()
            assert_close(model(tokens), stretched)


# What it weighs

LAYOUTS = {
    "default": ModelConfig(),
    "dense": ModelConfig(num_local_experts=0),
    "tied": ModelConfig(tie_word_embeddings=True),
    "grouped": ModelConfig(num_key_value_heads=4),
    "wide heads": ModelConfig(head_dim=50, num_key_value_heads=2),
    "shared experts": ModelConfig(n_shared_experts=2, num_experts_per_tok=6, num_local_experts=64),
    "narrow experts": ModelConfig(moe_intermediate_size=96, n_shared_experts=1),
    "Llama-2-7B": ModelConfig(32000, 4096, 11008, 32, 32, 32, num_local_experts=0),
    "Llama-3-8B": ModelConfig(128256, 4096, 14336, 32, 32, 8, num_local_experts=0),
    "Mistral-7B": ModelConfig(32000, 4096, 14336, 32, 32, 8, num_local_experts=0),
    "Mixtral-8x7B": ModelConfig(32000, 4096, 14336, 32, 32, 8, num_local_experts=8),
    "GPT-4, 1.8T": ModelConfig(100352, 14848, 20480, 120, 120, 1, head_dim=128),
} | {path.stem: load_config(path).model for path in sorted(CONFIGS.glob("*.toml"))}

PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-3-8B": 8_030_261_248,
    "Mistral-7B": 7_241_732_096,
    "Mixtral-8x7B": 46_702_792_704,
}
"""The number of weights in the released files."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_counted_parameters_are_those_of_the_built_model(name):
    config = LAYOUTS[name]
    with torch.device("meta"):
        model = Transformer(config)
    built = dict.fromkeys(("embedding", "attention", "router", "mlp", "norms", "output"), 0)
    for parameter_name, parameter in model.named_parameters():
        part = next(
            part
            for part, mark in {
                "embedding": "embed_tokens", "output": "lm_head", "norms": "norm", "attention": "self_attn",
                "router": "mlp.gate.", "mlp": "mlp",
            }.items()
            if mark in parameter_name
        )  # fmt: skip
        built[part] += parameter.numel()
    counts = parameters(config)
    assert built == {part: getattr(counts, part) for part in built}
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    if config.is_moe:
        each = sum(weight[0].numel() for weight in model.layers[0].mlp.experts.parameters())
        idle = config.num_hidden_layers * (config.num_local_experts - config.num_experts_per_tok) * each
    assert counts.active == counts.total - idle
    if name in PUBLISHED:
        assert counts.total == PUBLISHED[name]


def test_the_full_size_layout_has_the_reported_totals():
    counts = parameters(LAYOUTS["GPT-4, 1.8T"])
    assert counts.mlp / 16 == pytest.approx(109.5e9, rel=1e-3)
    assert counts.attention == pytest.approx(55.19e9, rel=1e-3)
    assert counts.embedding + counts.output == pytest.approx(2.98e9, rel=1e-3)
    assert counts.total == pytest.approx(1.810e12, rel=1e-3)
    assert counts.active == pytest.approx(277.1e9, rel=1e-3)


def test_the_dense_baseline_has_the_active_parameters_of_nano():
    sparse, dense = (parameters(LAYOUTS[name]) for name in ("nano", "nano-dense"))
    assert LAYOUTS["nano"].is_moe
    assert not LAYOUTS["nano-dense"].is_moe
    assert dense.total == dense.active == sparse.active - sparse.router


def test_the_forward_pass_runs_on_the_meta_device_at_full_width():
    config = ModelConfig(100352, 14848, 20480, 2, 120, 1, head_dim=128)
    with torch.device("meta"):
        model, tokens = Transformer(config), torch.zeros(2, 64, dtype=torch.int64)
        assert model(tokens).shape == (2, 64, 100352)


# What its router is charged


def routed(N: int = 50, E: int = 8, K: int = 2) -> Routed:
    logits = 2 * torch.randn(N, E)
    return Routed(logits, kernels.route(logits, K))


@pytest.mark.parametrize(("N", "E", "K"), [(1, 4, 1), (50, 8, 2), (33, 16, 4)])
def test_router_losses_are_their_formulas(N, E, K):
    case = routed(N, E, K)
    balance = z = entropy = 0.0
    chosen = case.routing.experts.tolist()
    tokens = [[math.exp(value) for value in row] for row in case.logits.double().tolist()]
    for e in range(E):
        share = sum(row.count(e) for row in chosen) / (N * K)
        balance += E * share * sum(row[e] / sum(row) for row in tokens) / N
    for row in tokens:
        z += math.log(sum(row)) ** 2 / N
        entropy -= sum(p / sum(row) * math.log(p / sum(row)) for p in row) / N
    assert load_balancing_loss(case).item() == pytest.approx(balance, rel=1e-5)
    assert router_z_loss(case).item() == pytest.approx(z, rel=1e-5)
    assert router_entropy(case).item() == pytest.approx(entropy, rel=1e-5)


def test_load_balancing_loss_is_one_at_balance_and_the_number_of_experts_at_collapse():
    even = torch.full((8, 8), 0.0).fill_diagonal_(1e-6)
    assert load_balancing_loss(Routed(even, kernels.route(even, 1))).item() == pytest.approx(1, rel=1e-4)
    one = torch.zeros(8, 8)
    one[:, 3] = 50.0
    assert load_balancing_loss(Routed(one, kernels.route(one, 1))).item() == pytest.approx(8, rel=1e-4)


def test_router_losses_are_means_over_layers_weighted_by_the_config():
    config = shape(num_hidden_layers=3, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    model, batch = make_model(config), rows(config)
    losses = model.losses(*batch)
    _, layers = model.hidden_states(batch[0], batch[2], whole_rows(batch[3]))
    assert len(layers) == 3
    assert_close(losses.aux, sum(map(load_balancing_loss, layers)) / 3)
    assert_close(losses.z, sum(map(router_z_loss, layers)) / 3)
    assert_close(losses.router_loss(config), 0.5 * losses.aux + 0.25 * losses.z)
    assert losses.expert_counts.sum(1).tolist() == [2 * batch[0].numel()] * 3
    assert losses.router_entropy.shape == (3,)
    dense = make_model(shape(num_local_experts=0)).losses(*batch)
    assert dense.router_loss(config) == 0
    assert dense.expert_counts.numel() == dense.router_entropy.numel() == 0


def make_moe(**changes) -> MoE:
    moe = MoE(shape(**changes))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe


def test_jitter_reaches_the_router_alone_and_only_in_training():
    moe = make_moe(hidden_size=8, num_attention_heads=2, num_local_experts=8, router_jitter_noise=0.2)
    torch.nn.init.eye_(moe.gate.weight)  # so that the logits are what the router is given
    x = torch.randn(500, 8)
    quiet = moe.eval()(x)[1].logits
    assert torch.equal(quiet, x)
    noise = moe.train()(x)[1].logits / x
    assert 0.8 <= noise.min() < 0.81
    assert 1.19 < noise.max() <= 1.2
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    assert not torch.equal(noise, moe(x)[1].logits / x)
    torch.nn.init.zeros_(moe.gate.weight)  # now the noise has no effect on the router, and must have none elsewhere
    assert torch.equal(moe(x)[0], moe.eval()(x)[0])


@pytest.mark.parametrize("count", [1, 3])
def test_shared_experts_add_their_own_mlp_of_every_token(count):
    moe = make_moe(n_shared_experts=count, moe_intermediate_size=20)
    x = torch.randn(3, 7, 32)
    whole = moe(x)[0]
    shared, moe.shared_experts = moe.shared_experts, None
    gate, up = (x @ shared.gate_up_proj.weight.T).split(20 * count, dim=-1)
    assert_close(whole, moe(x)[0] + (gate * torch.sigmoid(gate) * up) @ shared.down_proj.weight.T)


# What it computes in, and with


@pytest.mark.parametrize("name", ["mixture", "dense"])
def test_bfloat16_compute_leaves_float32_gradients_near_the_true_ones(name):
    config = shape(**SHAPES[name], initializer_range=0.1)
    model, rounded = make_model(config), make_model(config, torch.bfloat16)
    batch = rows(config, count=8)
    (loss, true), (near, got) = backward(model, batch), backward(rounded, batch)
    assert near == pytest.approx(loss, rel=1e-2)
    for name, gradient in got.items():
        assert gradient.dtype == torch.float32
        error = (gradient - true[name]).norm() / true[name].norm()
        assert error < 0.1, f"{name}: {error:.3f}"
    assert rounded(batch[0]).dtype == torch.float32


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_backend_trains_the_same_model(name):
    model = make_model(shape(**SHAPES[name]))
    batch = rows(model.config)
    loss, fast = backward(model, batch)
    with kernels.use_backend("reference"):
        true_loss, true = backward(model, batch)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    for parameter, gradient in fast.items():
        error = (gradient - true[parameter]).abs().max() / true[parameter].abs().max()
        assert error < 1e-4, f"{parameter}: {error:.1e}"


def test_the_backend_is_chosen_from_the_arguments():
    x, weight = torch.randn(4, 32), torch.ones(32)
    assert kernels.select("rms_norm", (x, weight, 1e-5)) == "cpu"
    said = kernels.explain("rms_norm", (x, weight, 1e-5))
    assert said.pop("gpu") != "chosen"
    assert said == {"cpu": "chosen", "reference": "available"}
    with kernels.use_backend("reference"):
        said = kernels.explain("rms_norm", (x, weight, 1e-5))
    assert (said["cpu"], said["reference"]) == ("available", "chosen")
    said = kernels.explain("rms_norm", (x.to("meta"), weight.to("meta"), 1e-5))
    assert (said["cpu"], said["reference"]) == ("does not run on meta", "chosen")


def test_a_backend_that_cannot_run_is_refused_and_not_replaced():
    with (
        pytest.raises(ValueError, match="'tpu' is unknown; choose one of cpu, gpu, reference"),
        kernels.use_backend("tpu"),
    ):
        pass
    weight = torch.ones(32)
    with kernels.use_backend("cpu"):
        assert kernels.rms_norm(torch.randn(4, 32), weight, 1e-5).shape == (4, 32)
        with pytest.raises(ValueError, match=r"rms_norm: the backend 'cpu' .*has float32 and bfloat16 only"):
            kernels.rms_norm(torch.randn(4, 32).double(), weight, 1e-5)
        with pytest.raises(ValueError, match="does not run on meta"):
            kernels.rms_norm(torch.randn(4, 32, device="meta"), weight.to("meta"), 1e-5)
    with warnings.catch_warnings(action="ignore"):
        assert kernels.select("rms_norm", (torch.randn(4, 32).double(), weight, 1e-5)) == "reference"


def test_a_fall_to_the_reference_is_said_once():
    registry._warn_once.cache_clear()
    x, weight = torch.randn(4, 32).half(), torch.ones(32)
    with pytest.warns(RuntimeWarning, match="rms_norm runs on its plain reference: cpu has float32 and bfloat16 only"):
        kernels.rms_norm(x, weight, 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.rms_norm(x, weight, 1e-5)
        with kernels.use_backend("reference"):  # what is asked for is no fall
            kernels.rms_norm(x.double(), weight, 1e-5)


# What a compiler and a counter see

TRAINING_OPS = {
    "rms_norm_forward", "add_rms_norm_forward", "rms_norm_backward", "rope", "route", "route_backward",
    "expert_mlp_forward", "expert_mlp_backward", "attention_forward", "attention_backward", "cross_entropy_with_grads",
}  # fmt: skip


class SeenOps(TorchDispatchMode):
    """The names of our custom operations that were called inside."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "moe_kernels":
            self.names.add(op._opname)
        return op(*args, **(kwargs or {}))


def test_fake_tensors_go_through_a_training_step():
    with FakeTensorMode(shape_env=ShapeEnv()):
        model = Transformer(shape()).reset_parameters()
        with SeenOps() as seen:
            training_loss(model, rows(model.config)).backward()
    assert seen.names == TRAINING_OPS
    for name, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape, name


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_training_step_is_the_same_step(fullgraph):
    model = make_model(shape(num_hidden_layers=1))
    batch = rows(model.config)
    loss, want = backward(model, batch)
    torch.compiler.reset()
    model.zero_grad()
    compiled = torch.compile(training_loss, backend="eager", fullgraph=fullgraph)(model, batch)
    compiled.backward()
    assert compiled.item() == loss
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, want[name]), name


def counted_flops(config: ModelConfig, count: int, length: int) -> int:
    """Matrix products of a training step on the reference, which is plain torch and so can be seen into."""
    model = make_model(config)
    tokens = torch.randint(0, config.vocab_size, (count, length))
    with kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        training_loss(model, (tokens, tokens, torch.arange(length).expand(count, length))).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 0},
        {"num_local_experts": 0, "num_key_value_heads": 4, "head_dim": 10, "tie_word_embeddings": True},
        # The reference sends every token to all experts, so here all of them are active.
        {"num_experts_per_tok": 4, "n_shared_experts": 1},
    ],
)
def test_flops_of_training_are_those_that_torch_counts(changes):
    config, count, length = shape(**changes), 3, 16
    counted = counted_flops(config, count, length) / (count * length)
    # The reference multiplies whole squares of scores, the formula counts what is causal.
    assert counted == 3 * forward_flops_per_token(config, context=length)
    causal = 3 * 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * (length - 1) / 2
    assert train_flops_per_token(config, length) == counted - causal
