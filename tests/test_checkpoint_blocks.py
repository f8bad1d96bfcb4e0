"""Activation checkpointing: the same losses and gradients bit for bit, from less memory."""

from dataclasses import replace

import pytest
import torch
from tiny_run import MODEL, tiny_config

from moe_lm.config import ConfigError
from moe_lm.model import Transformer
from moe_lm.train import Trainer, memory

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {
    "mixture with jitter": {"router_jitter_noise": 0.2},
    "shared experts, one dense layer": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "dense": {"num_local_experts": 0},
}
B, T = 3, 31


def losses_and_gradients(model):
    """Of a batch with several documents in a row and targets that do not count, all random numbers the same."""
    torch.manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (B, T))
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(B, T) < 0.2, -100)
    documents = (torch.arange(T) > 11).long().expand(B, T)
    model.zero_grad()
    losses = model.losses(tokens, targets, torch.arange(T).expand(B, T), documents)
    (losses.nll / 70 + losses.router_loss(model.config)).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    return {name: value.detach() for name, value in vars(losses).items()}, gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_losses_and_gradients_are_the_same_bit_for_bit(kind, dtype):
    model = Transformer(replace(MODEL, **MODELS[kind]), dtype).reset_parameters().train()
    expected = losses_and_gradients(model)
    after = torch.rand(3)
    model.checkpoint_blocks = True
    found = losses_and_gradients(model)
    # The jitter is drawn again in the backward, and the generator is then where it would have been.
    assert torch.equal(torch.rand(3), after)
    for there, here in zip(expected, found, strict=True):
        assert there.keys() == here.keys()
        for name in there:
            assert torch.equal(there[name], here[name]), name


def bytes_kept(model):
    """Of what autograd saves in the forward beside weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address comes twice
        return tensor

    tokens = torch.randint(model.config.vocab_size, (B, T))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model.losses(tokens, tokens, torch.arange(T).expand(B, T))
    assert losses.nll.requires_grad
    return sum(size for size, _ in kept.values())


def test_what_is_kept_of_a_block_is_its_input():
    kept = {}
    for checkpointed in (False, True):
        for layers in (2, 6):
            config = replace(MODEL, num_hidden_layers=layers)
            kept[checkpointed, layers] = bytes_kept(Transformer(config, None, checkpointed).reset_parameters().train())
    a_block, its_input = ((kept[which, 6] - kept[which, 2]) / 4 for which in (False, True))
    # The router's losses are made behind the blocks: of their logits, two more arrays of that size and a few sums.
    least, logits = 4 * B * T * MODEL.hidden_size, 4 * B * T * MODEL.num_local_experts
    assert least <= its_input <= least + 3 * logits
    assert its_input < a_block / 4


def test_evaluation_keeps_nothing_and_computes_nothing_again(monkeypatch):
    model = Transformer(MODEL, None, True).reset_parameters()
    monkeypatch.setattr("moe_lm.model.transformer.checkpoint", None)
    with torch.no_grad():
        assert model(torch.zeros(1, 4, dtype=torch.int64)).isfinite().all()
    with pytest.raises(TypeError):
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_a_run_is_the_same_run(data, tmp_path):
    changes = {"router_jitter_noise": 0.1, "micro_batch_tokens": 96, "steps": 3}
    ends = []
    for checkpointed in (False, True):
        config = tiny_config(data.config, activation_checkpointing=checkpointed, **changes)
        trainer = Trainer(config, tmp_path / str(checkpointed), data)
        assert trainer.model.checkpoint_blocks == checkpointed
        ends.append([trainer.train_step()["loss"] for _ in range(3)] + list(trainer.model.parameters()))
    assert ends[0][:3] == ends[1][:3]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][3:], ends[1][3:], strict=True))


def test_the_refusal_knows_it(data, monkeypatch):
    plain = tiny_config(data.config, num_hidden_layers=8, dtype="bfloat16")
    spared = replace(plain, train=replace(plain.train, activation_checkpointing=True))
    state, kept, least = memory.state_bytes(plain), memory.activation_bytes(plain), memory.activation_bytes(spared)
    assert least < kept / 3
    monkeypatch.setattr(memory, "memory_of", lambda device: state + least)
    memory.check_memory(spared)
    with pytest.raises(ConfigError, match=r"_tokens = 256, .* or set train.activation_checkpointing = true\."):
        memory.check_memory(plain)
    monkeypatch.setattr(memory, "memory_of", lambda device: state + least - 1)
    with pytest.raises(ConfigError, match=r"data.sequence_length\.$"):
        memory.check_memory(spared)
    wide = replace(plain, train=replace(plain.train, dtype="float32"))
    assert kept < memory.activation_bytes(wide) < 2 * kept
