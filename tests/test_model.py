"""The model against its formulas: what a token sees, what its router is charged, what it computes."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import registry
from moe_lm.config import ModelConfig, RopeScaling
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.model.layers import rotary_angles
from moe_lm.model.moe import MoE, Routed, load_balancing_loss

SHAPES = {
    "mixture": {},
    "mixture, shared expert": {"n_shared_experts": 1, "num_experts_per_tok": 3, "num_key_value_heads": 2},
    "dense": {"num_local_experts": 0},
    "dense, odd sizes, tied": {
        "num_local_experts": 0, "hidden_size": 60, "num_attention_heads": 3, "head_dim": 22, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "first layer dense": {"first_k_dense_replace": 1, "moe_intermediate_size": 16, "n_shared_experts": 1},
    "every second layer dense": {"expert_layer_period": 2, "expert_layer_offset": 1, "num_hidden_layers": 4},
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


# What it computes at full size


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
    found = kernels.router_statistics(case.logits)
    assert load_balancing_loss(found.probability, case.routing.experts).item() == pytest.approx(balance, rel=1e-5)
    assert found.z.item() == pytest.approx(z, rel=1e-5)
    assert found.entropy.item() == pytest.approx(entropy, rel=1e-5)
    assert found.confidence.item() == pytest.approx(case.logits.softmax(1).amax(1).mean().item(), rel=1e-5)


def balance_loss(logits: torch.Tensor, rows: int = 1) -> float:
    probability = kernels.router_statistics(logits, rows).probability
    return load_balancing_loss(probability, kernels.route(logits, 1).experts).item()


def test_load_balancing_loss_is_one_at_balance_and_the_number_of_experts_at_collapse():
    even = torch.full((8, 8), 0.0).fill_diagonal_(1e-6)
    assert balance_loss(even) == pytest.approx(1, rel=1e-4)
    one = torch.zeros(8, 8)
    one[:, 3] = 50.0
    assert balance_loss(one) == pytest.approx(8, rel=1e-4)


def test_a_loss_per_sequence_sees_what_a_batch_evens_out():
    """Two rows that each go to an expert of their own: even as a batch, as uneven as can be by themselves."""
    logits = torch.zeros(8, 2)
    logits[:4, 0] = logits[4:, 1] = 50
    assert balance_loss(logits) == pytest.approx(1)
    assert balance_loss(logits, 2) == pytest.approx(2)


def test_router_losses_are_means_over_layers_weighted_by_the_config():
    config = shape(num_hidden_layers=3, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    model, batch = make_model(config), rows(config)
    losses = model.losses(*batch)
    _, layers = model.hidden_states(batch[0], batch[2], whole_rows(batch[3]))
    assert len(layers) == 3
    found = [kernels.router_statistics(layer.logits) for layer in layers]
    balances = [load_balancing_loss(f.probability, r.routing.experts) for f, r in zip(found, layers, strict=True)]
    assert_close(losses.aux, sum(balances) / 3)
    assert_close(losses.z, sum(each.z for each in found) / 3)
    assert_close(losses.router_loss(config), 0.5 * losses.aux + 0.25 * losses.z)
    assert losses.expert_counts.sum(1).tolist() == [2 * batch[0].numel()] * 3
    assert losses.router_entropy.shape == (3,)
    dense = make_model(shape(num_local_experts=0)).losses(*batch)
    assert dense.router_loss(config) == 0
    assert dense.expert_counts.numel() == dense.router_entropy.numel() == 0


@pytest.mark.parametrize(
    ("changes", "routing"),
    [
        ({"first_k_dense_replace": 1, "num_hidden_layers": 3, "n_shared_experts": 1}, [1, 2]),
        ({"expert_layer_period": 2, "num_hidden_layers": 4}, [0, 2]),
        ({"expert_layer_period": 2, "expert_layer_offset": 1, "num_hidden_layers": 3}, [1]),
    ],
)
def test_layers_that_do_not_route_have_a_dense_mlp(changes, routing):
    config = shape(moe_intermediate_size=12, **changes)
    model, (tokens, *_) = make_model(config), rows(config, count=1)
    assert [layer for layer, block in enumerate(model.layers) if isinstance(block.mlp, MoE)] == routing
    with torch.no_grad():
        x, angles = model.embed_tokens[tokens[0]], rotary_angles(config, torch.arange(20))
        for layer, block in enumerate(model.layers):
            x = x + block.self_attn(block.input_layernorm(x)[None], angles, whole_rows())[0]
            normed = block.post_attention_layernorm(x)
            y = []
            for token in normed:
                if layer not in routing:
                    assert block.mlp.down_proj.weight.shape == (32, 24)
                    y.append(swiglu(token, block.mlp.gate_up_proj.weight, block.mlp.down_proj.weight))
                    continue
                p, chosen = (block.mlp.gate.weight @ token).softmax(0).topk(2)
                weights = zip(p / p.sum(), chosen.tolist(), strict=True)
                experts = block.mlp.experts
                y.append(sum(w * swiglu(token, experts.gate_up_proj[e], experts.down_proj[e]) for w, e in weights))
                if config.n_shared_experts:
                    shared = block.mlp.shared_experts
                    y[-1] = y[-1] + swiglu(token, shared.gate_up_proj.weight, shared.down_proj.weight)
            x = x + torch.stack(y)
        assert_close(model(tokens)[0], model.norm(x) @ model.lm_head.weight.T)
    losses = model.losses(*rows(config))
    assert losses.expert_counts.shape == (len(routing), 4)
    assert losses.router_entropy.shape == (len(routing),)


def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (F.silu(gate) * up)


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
    "gate", "gate_backward", "router_statistics", "router_statistics_backward",
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
