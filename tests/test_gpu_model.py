"""The whole model on the Triton backend: a training step and decoding give what the CPU backend gives, and run on fake
CUDA tensors, which hold no values that anything could wait for."""

import dataclasses

import pytest
import torch
import triton_device  # before any kernel: it decides how they run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

import kernels
from kernels import tiles
from kernels.gpu.launch import Target, assume
from moe_lm.config import ModelConfig
from moe_lm.engine.batch import Piece
from moe_lm.engine.runner import Runner
from moe_lm.model import Transformer

DEVICE = triton_device.DEVICE
MICRO = ModelConfig(
    vocab_size=48, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
)  # fmt: skip


@pytest.fixture
def small_tiles(monkeypatch):
    # On a CPU torch refuses gradients of FlexAttention, though its plain form has them.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    small = tiles.GemmTile(32, 64, 32, 4, 3, 1)
    monkeypatch.setattr(tiles, "expert_gemm", lambda *_: small)
    monkeypatch.setattr(tiles, "weight_gradient", lambda *_: small)


class WithoutGuard(TorchFunctionMode):
    """Indexing as views and torch.tensor as zeros: both ask for a CUDA device, which a build without CUDA lacks."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.tensor:
            return torch.zeros(len(args[0]), dtype=torch.int64, device=kwargs["device"])
        if func is not torch.Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        x, keys = args
        keys, axis = keys if isinstance(keys, tuple) else (keys,), 0
        for key in keys:
            if key is None:
                x = x.unsqueeze(axis)
            elif isinstance(key, int):
                x, axis = x.select(axis, key), axis - 1
            elif isinstance(key, slice):
                start, stop, step = key.indices(x.shape[axis])
                assert step == 1
                x = x.narrow(axis, start, max(stop - start, 0))
            else:
                assert key.dim() == 1
                x = x.index_select(axis, key)
            axis += 1
        return x


def training_step(backend: str, device: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of packed rows with two documents and an unscored target."""
    generator = torch.Generator().manual_seed(3)
    model = Transformer(MICRO, dtype).reset_parameters(generator).to(device)
    tokens = torch.randint(0, MICRO.vocab_size, (2, 20), generator=generator).to(device)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -1
    documents = (torch.arange(20) >= 13).long().expand(2, 20).to(device)
    positions = torch.cat([torch.arange(13), torch.arange(7)]).expand(2, 20).to(device)
    with kernels.use_backend(backend):
        losses = model.losses(tokens, targets, positions, documents)
        loss = losses.nll / 38 + losses.router_loss(MICRO)
        loss.backward()
    return loss.item(), {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("gpu", [Target(80, 3), Target(90, 3)], ids=["sm_80", "sm_90"])
def test_a_training_step_is_the_cpu_backends(gpu, small_tiles):
    with assume(gpu):
        loss, got = training_step("gpu", DEVICE, torch.float32)
    true_loss, want = training_step("cpu", "cpu", torch.float32)
    assert loss == pytest.approx(true_loss, rel=1e-5)
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() < 1e-4 * gradient.abs().max().clamp(min=1e-3), name


def test_a_bfloat16_training_step_is_near_the_float32_one(small_tiles):
    loss, got = training_step("gpu", DEVICE, torch.bfloat16)
    true_loss, want = training_step("cpu", "cpu", torch.float32)
    assert loss == pytest.approx(true_loss, rel=1e-2)
    for name, gradient in want.items():
        assert got[name].dtype == torch.float32
        assert torch.cosine_similarity(got[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False, "router_bias_update_rate": 0.001}])
def test_decoding_is_the_cpu_backends(changes):
    prompt, rest = list(range(1, 12)), [7, 3, 9, 30, 2]
    logits = {}
    for backend, device in (("gpu", DEVICE), ("cpu", "cpu")):
        model = Transformer(dataclasses.replace(MICRO, **changes)).reset_parameters(torch.Generator().manual_seed(3))
        for i, bias in enumerate(model.router_biases):
            bias.copy_(torch.tensor([-1.0, 0.5, 1.0, -0.5]).roll(i))
        model = model.to(device)
        with kernels.use_backend(backend):
            runner = Runner(model, 4, 16, native=False)
            steps = [Piece(prompt, 0, [2, 0], 1), Piece(rest[:1], 11, [2, 0], 1), Piece(rest[1:], 12, [2, 0], 4)]
            parts = [runner.forward([piece]).logits for piece in steps]
        logits[backend] = torch.cat(parts).cpu()
    torch.testing.assert_close(logits["gpu"], logits["cpu"], rtol=1e-4, atol=1e-5)


def test_fake_cuda_tensors_go_through_the_forward_pass_and_decoding():
    """What a value is needed for would raise here. A build of torch without CUDA stops at recording gradients."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad(), WithoutGuard(), torch.device("cuda"):
        model = Transformer(MICRO, torch.bfloat16)
        assert kernels.select("rms_norm", (model.embed_tokens, model.norm.weight, 1e-5)) == "gpu"
        tokens = torch.zeros(2, 20, dtype=torch.int64)
        losses = model.losses(tokens, tokens, tokens)
        assert losses.nll.device.type == losses.expert_counts.device.type == "cuda"
        assert losses.expert_counts.shape == (2, 4)
        step = Runner(model, 4, 16).eager([Piece([1, 2, 3], 0, [1], 3), Piece([4], 7, [3], 1)])
        assert step.logits.shape == (4, MICRO.vocab_size)
        assert step.experts.shape == (MICRO.num_hidden_layers, 4, MICRO.num_experts_per_tok)
        assert step.logits.device.type == step.experts.device.type == "cuda"


def test_a_training_step_with_gradients_goes_through_fake_tensors(small_tiles):
    with FakeTensorMode(shape_env=ShapeEnv()), kernels.use_backend("gpu"):
        with torch.device(DEVICE):
            model = Transformer(MICRO, torch.bfloat16)
        tokens = torch.zeros(2, 20, dtype=torch.int64, device=DEVICE)
        losses = model.losses(tokens, tokens, tokens)
        (losses.nll + losses.aux).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.shape == parameter.shape, name
