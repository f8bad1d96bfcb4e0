"""The optimizer against plain formulas, and what reaches it from micro-batches."""

import dataclasses
import math

import pytest
import torch
from tiny_run import MODEL, tiny_config, weights_of
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_lm.config import TrainConfig
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.train import Trainer
from moe_lm.train.muon import MuonAdamW, orthogonalize
from moe_lm.train.optim import gradient_norm, make_optimizer
from moe_lm.train.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("one_process")


def test_norms_do_not_decay():
    model = Transformer(MODEL)
    groups = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    names = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    assert names == {name: 0.0 if "norm" in name else 0.3 for name in names}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_the_token_table_may_learn_at_a_rate_of_its_own(data, tmp_path):
    trainer = Trainer(tiny_config(data.config, embedding_learning_rate_ratio=4.0), tmp_path, data)
    rate = trainer.train_step()["learning_rate"]
    assert rate == learning_rate(trainer.config.train, 1)
    rates = {id(parameter): group["lr"] for group in trainer.optimizer.param_groups for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in trainer.model.named_parameters()}
    assert found == {name: rate * (4 if name == "embed_tokens" else 1) for name in found}


def test_a_step_is_adamw_by_hand():
    config = TrainConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, adam_eps=1e-3)
    model = Transformer(MODEL).reset_parameters()
    optimizer = make_optimizer(model, config)
    by_hand = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for step, rate in ((1, 1e-2), (2, 3e-2), (3, 2e-2)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            gradient, (weight, first, second) = parameter.grad.double(), by_hand[name]
            first = 0.8 * first + 0.2 * gradient
            second = 0.9 * second + 0.1 * gradient**2
            weight = weight * (1 - rate * (0.0 if "norm" in name else 0.3))
            weight = weight - rate * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-3)
            by_hand[name] = [weight, first, second]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), by_hand[name][0], rtol=1e-5, atol=1e-6, msg=name)


def first_step(data, run_dir, **changes):
    """The gradients of a run's first step, the weights after it, and its metrics."""
    # A large epsilon makes the update continuous in the gradient: at 1e-8 the sign of a gradient of 0 decides.
    trainer = Trainer(tiny_config(data.config, adam_eps=1e-3, warmup=0.0, **changes), run_dir, data)
    gradients = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})
    )
    metrics = trainer.train_step()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    return gradients, weights_of(trainer.model), metrics


@pytest.mark.parametrize(
    "model",
    [{"num_local_experts": 0}, {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}],
    ids=["dense", "experts"],
)
@pytest.mark.parametrize("micro_batch_tokens", [64, 96])
def test_micro_batches_add_up(data, tmp_path, model, micro_batch_tokens):
    once = first_step(data, tmp_path, **model)
    several = first_step(data, tmp_path, micro_batch_tokens=micro_batch_tokens, **model)
    for whole, parts in zip(once[:2], several[:2], strict=True):
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=0, atol=1e-6, msg=name)
    for name in ("loss", "bits_per_byte", "grad_norm", "tokens"):
        assert several[2][name] == pytest.approx(once[2][name], rel=1e-5), name


def test_router_losses_of_micro_batches_count_by_their_rows(data, tmp_path):
    trainer = Trainer(tiny_config(data.config, micro_batch_tokens=96), tmp_path, data)
    parts = []
    inner = trainer.model.losses
    trainer.model.losses = lambda *batch: parts.append((len(batch[0]), inner(*batch))) or parts[-1][1]
    metrics = trainer.train_step()
    assert [rows for rows, _ in parts] == [3, 3, 2]
    for name in ("aux", "z"):
        expected = sum(rows * getattr(losses, name).item() for rows, losses in parts) / 8
        assert metrics[f"{name}_loss"] == pytest.approx(expected)


def test_the_norm_of_many_gradients_is_theirs():
    """One chain of float32 over 16M numbers would be 6e-4 short."""
    gradients = [torch.randn(4, 1 << 11, 1 << 11), torch.randn(64), torch.zeros(0, 3)]
    true = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
    assert gradient_norm(gradients).item() == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize("limit", [0.01, 100.0, 0.0])
def test_gradients_are_scaled_down_to_the_limit(data, tmp_path, limit):
    divisors = []
    trainer = Trainer(tiny_config(data.config, max_grad_norm=limit), tmp_path, data)
    trainer.optimizer.register_step_pre_hook(lambda _, args, options: divisors.extend(args[1:]))
    gradients, _, metrics = first_step(data, tmp_path, max_grad_norm=limit)
    assert trainer.train_step()["grad_norm"] == metrics["grad_norm"]
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    assert metrics["grad_norm"] == pytest.approx(norm)
    assert 0.1 < norm < 100
    if limit:
        assert divisors[0].item() == pytest.approx(max(1.0, norm / limit))
    else:
        assert divisors == [None]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_divided_step_is_one_of_divided_gradients(optimizer):
    torch.manual_seed(1)
    config = TrainConfig(optimizer=optimizer, adam_eps=1e-3, expert_muon_every=2)
    models = [Transformer(MODEL).reset_parameters(torch.Generator().manual_seed(2)) for _ in range(2)]
    ours, plain = [make_optimizer(model, config) for model in models]
    for divisor in (3.0, 0.25):
        for one, other in zip(*[model.parameters() for model in models], strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad / divisor
        ours.step(torch.tensor(divisor))
        plain.step()
        ours.zero_grad()
        plain.zero_grad()
    for one, other in zip(*[model.parameters() for model in models], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        for name, value in ours.state[one].items():
            torch.testing.assert_close(value, plain.state[other][name], rtol=1e-5, atol=1e-7, msg=name)


# Muon


def singular_values_by_hand(values: torch.Tensor) -> torch.Tensor:
    """The quintic, five times, on the singular values of a matrix of Frobenius norm 1."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", [(1, 5, 8), (2, 8, 5), (3, 7, 7), (1, 1, 6), (4, 6, 1), (9, 300, 260)])
def test_orthogonalize_keeps_the_singular_vectors_and_levels_the_values(shape):
    matrices = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    values = singular_values_by_hand(s / s.square().sum(-1, keepdim=True).sqrt())
    torch.testing.assert_close(orthogonalize(matrices), u * values[:, None] @ vt, rtol=1e-6, atol=1e-6)
    large = s / s.square().sum(-1, keepdim=True).sqrt() > 0.05
    assert ((values > 0.6) & (values < 1.3))[large].all()


def test_orthogonalize_of_nothing_is_nothing():
    assert torch.equal(orthogonalize(torch.zeros(3, 4, 6)), torch.zeros(3, 4, 6))


def test_orthogonalize_in_bfloat16_is_close():
    matrices = torch.randn(4, 24, 16)
    torch.testing.assert_close(orthogonalize(matrices.bfloat16()).float(), orthogonalize(matrices), rtol=0, atol=0.06)


def muon_names(config):
    model = Transformer(config)
    groups = make_optimizer(model, TrainConfig(optimizer="muon")).param_groups
    chosen = {id(parameter) for group in groups if group["muon"] for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {name.removeprefix("layers.0.") for name, p in model.named_parameters() if id(p) in chosen}


def test_muon_takes_the_matrices_of_the_blocks_but_the_router():
    attention = {"self_attn.qkv_proj.weight", "self_attn.o_proj.weight"}
    one = dataclasses.replace(MODEL, num_hidden_layers=1, n_shared_experts=1)
    shared = {"mlp.shared_experts.gate_up_proj.weight", "mlp.shared_experts.down_proj.weight"}
    assert muon_names(one) == attention | shared | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    dense = dataclasses.replace(MODEL, num_hidden_layers=1, num_local_experts=0)
    assert muon_names(dense) == attention | {"mlp.gate_up_proj.weight", "mlp.down_proj.weight"}


def separate_matrices(name, tensor):
    """Every matrix that the weight `name` holds, as views of `tensor`."""
    if name.endswith("qkv_proj.weight"):
        heads, kv_heads, width = MODEL.num_attention_heads, MODEL.num_key_value_heads, MODEL.head_dim
        return [tensor[: heads * width], tensor[heads * width : -kv_heads * width], tensor[-kv_heads * width :]]
    matrices = list(tensor) if tensor.dim() == 3 else [tensor]
    if "gate_up" not in name:
        return matrices
    half = tensor.shape[-2] // 2
    return [part for matrix in matrices for part in (matrix[:half], matrix[half:])]


def test_three_steps_are_torchs_muon_on_every_matrix_alone():
    config = TrainConfig(optimizer="muon", weight_decay=10.0, muon_momentum=0.8, expert_ns_steps=2)
    model = Transformer(MODEL).reset_parameters()
    optimizer = make_optimizer(model, config, torch.bfloat16)
    chosen = {id(parameter) for group in optimizer.param_groups if group["muon"] for parameter in group["params"]}
    weights = {name: p for name, p in model.named_parameters() if id(p) in chosen}
    alone = {
        name: [torch.nn.Parameter(matrix.detach().clone()) for matrix in separate_matrices(name, p)]
        for name, p in weights.items()
    }
    # torch's takes single matrices only, and does its products in bfloat16.
    theirs = [
        torch.optim.Muon(copies, lr=1.0, weight_decay=10.0, momentum=0.8, ns_steps=2 if ".experts." in name else 5)
        for name, copies in alone.items()
    ]
    for rate in (0.02, 0.05, 0.01):
        for group in (*optimizer.param_groups, *(group for one in theirs for group in one.param_groups)):
            group["lr"] = rate
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for name, parameter in weights.items():
            for copy, gradient in zip(alone[name], separate_matrices(name, parameter.grad), strict=True):
                copy.grad = gradient.clone()
        for one in (optimizer, *theirs):
            one.step()
    for name, parameter in weights.items():
        for matrix, copy in zip(separate_matrices(name, parameter), alone[name], strict=True):
            torch.testing.assert_close(matrix, copy, rtol=0, atol=2e-3, msg=name)


def test_experts_take_every_second_step_twice_as_far():
    """Of the momentum of all steps; the other matrices take each."""
    config = TrainConfig(optimizer="muon", weight_decay=0.5, muon_momentum=0.8, expert_muon_every=2)
    model = Transformer(MODEL).reset_parameters()
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    expert, other = model.layers[0].mlp.experts.down_proj, model.layers[0].self_attn.o_proj.weight
    momentum = torch.zeros_like(expert)
    for step in range(1, 5):
        before = {p: p.detach().clone() for p in (expert, other)}
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradient = expert.grad.clone()
        momentum = momentum.lerp(gradient, 0.2)
        optimizer.step()
        assert not torch.equal(other, before[other])
        expected = before[expert]
        if step % 2 == 0:
            scale = max(1.0, expert.shape[1] / expert.shape[2]) ** 0.5
            update = orthogonalize(gradient.lerp(momentum, 0.8))
            expected = (1 - 0.04 * 0.5) * expected - 0.04 * scale * update
        torch.testing.assert_close(expert, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_is_updated_as_if_it_were_alone(dtype):
    """And one that met no token stays where it is but for its decay: zero is not blown up to an orthogonal matrix."""
    config = TrainConfig(optimizer="muon", weight_decay=0.5, muon_momentum=0.8)
    model = Transformer(MODEL).reset_parameters()
    optimizer = make_optimizer(model, config, dtype)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    experts = model.layers[1].mlp.experts
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = {}
    for name, parameter in experts.named_parameters():
        parameter.grad[2] = 0
        gradients[name] = parameter.grad.clone()
    optimizer.step()
    for name, parameter in experts.named_parameters():
        parts = 2 if name == "gate_up_proj" else 1
        for expert, gradient in enumerate(gradients[name]):
            # The first step's Nesterov momentum is the gradient times 1 - momentum^2; its size does not matter.
            update = torch.cat([orthogonalize(part[None].to(dtype))[0].float() for part in gradient.chunk(parts)])
            rows, columns = len(gradient) // parts, gradient.shape[1]
            expected = (1 - 0.02 * 0.5) * before[name][expert] - 0.02 * max(1.0, rows / columns) ** 0.5 * update
            near = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-3}
            torch.testing.assert_close(parameter[expert], expected, **near, msg=f"{name} {expert}")
            if expert == 2:
                assert torch.equal(parameter[expert], (1 - 0.02 * 0.5) * before[name][expert]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"num_local_experts": 0}, {"n_shared_experts": 1, "first_k_dense_replace": 1},
        {"tie_word_embeddings": True},
    ],
    ids=["mixture", "dense", "shared and dense", "tied"],
)  # fmt: skip
def test_every_weight_is_in_one_group(optimizer, changes):
    model = Transformer(dataclasses.replace(MODEL, **changes)).reset_parameters()
    groups = make_optimizer(model, TrainConfig(optimizer=optimizer)).param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    for group in groups:
        assert len(group.get("rows", group["params"])) == len(group["params"])
        muon = [
            name for name, p in model.named_parameters() if group["muon"] and any(p is one for one in group["params"])
        ]
        assert not [
            name for name in muon if "norm" in name or "embed" in name or "lm_head" in name or "gate.weight" in name
        ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_experts_may_learn_at_a_rate_of_their_own(optimizer):
    model = Transformer(dataclasses.replace(MODEL, n_shared_experts=1))
    rates = {}
    for ratio in (1.0, 0.5):
        config = TrainConfig(optimizer=optimizer, expert_learning_rate_ratio=ratio)
        groups = make_optimizer(model, config).param_groups
        of = {id(p): group["lr_ratio"] for group in groups for p in group["params"]}
        rates[ratio] = {name: of[id(p)] for name, p in model.named_parameters()}
    assert rates[0.5] == {
        name: rate * (0.5 if ".mlp.experts." in name else 1) for name, rate in rates[1.0].items()
    }  # fmt: skip
    assert {name for name, rate in rates[0.5].items() if rate != rates[1.0][name]} == {
        f"layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")
    }


def test_muon_reads_no_value_back():
    """On a GPU it would wait for one; fake tensors refuse to give any."""
    with FakeTensorMode(), torch.no_grad():
        weight = torch.nn.Parameter(torch.empty(4, 48, 16))
        group = {"params": [weight], "rows": [[24, 24]], "muon": True, "momentum": 0.9, "ns_steps": 5, "every": 1}
        group["weight_decay"] = 0.1
        optimizer = MuonAdamW([group], torch.bfloat16, lr=0.01)
        weight.grad = torch.empty_like(weight)
        optimizer.muon_step(optimizer.param_groups[0])
        assert weight.grad is None


def test_muon_leaves_the_rest_to_adamw():
    torch.manual_seed(1)
    models = [Transformer(MODEL).reset_parameters(torch.Generator().manual_seed(2)) for _ in range(2)]
    gradients = [torch.randn_like(parameter) for parameter in models[0].parameters()]
    for model, name in zip(models, ("adamw", "muon"), strict=True):
        optimizer = make_optimizer(model, TrainConfig(optimizer=name))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    taken = {
        f"layers.{layer}.{name}"
        for layer in range(2)
        for name in muon_names(dataclasses.replace(MODEL, num_hidden_layers=1))
    }
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two) == (name not in taken), name


# The start


def test_a_run_starts_with_blocks_that_do_nothing(data, tmp_path):
    model = Trainer(tiny_config(data.config), tmp_path, data).model
    tokens = torch.randint(0, 300, (2, 9))
    x, _ = model.hidden_states(tokens, torch.arange(9).expand(2, 9), whole_rows())
    assert torch.equal(x, model.norm(torch.nn.functional.embedding(tokens, model.embed_tokens)))
    other = Trainer(tiny_config(data.config, zero_init_residual=False), tmp_path, data).model
    x, _ = other.hidden_states(tokens, torch.arange(9).expand(2, 9), whole_rows())
    assert not torch.allclose(x, other.norm(torch.nn.functional.embedding(tokens, other.embed_tokens)), atol=1e-4)
