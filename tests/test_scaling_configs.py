"""The configs that are planned: each loads and lies on its cluster, and its counts are those of a model that is built,
here or in the transformers library, on the meta device.

D hidden width, W width of the vision encoder, H query heads, G key-value heads, C channels of a head.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, GPT2Config, JambaConfig

import kernels
from moe_lm.checkpoint import to_hf_config
from moe_lm.config import ConfigError, LatentAttention, Mamba, ModelConfig, VisionEncoder
from moe_lm.model import Transformer
from moe_lm.scaling.counts import (
    cache_numbers,
    forward_flops_per_token,
    mamba_vectors,
    parameters,
)
from moe_lm.scaling.hardware import machine
from moe_lm.scaling.layout import settle, stages
from moe_lm.toml import load_config

PATHS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.toml"))
RUNS = {path.stem: load_config(path) for path in PATHS}
MODELS = {name: run.model for name, run in RUNS.items()}
PLANNED = [name for name, model in MODELS.items() if model.only_planned]

PUBLISHED = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "deepseek-moe-16b": 16_375_728_128,
    "jamba-52b": 51_570_323_328, "deepseek-v3": 671_026_419_200,
}  # fmt: skip
"""Weights in the released files."""


def on_meta(make):
    with torch.device("meta"):
        return make()


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# The files


def test_every_system_has_its_config():
    assert set(MODELS) >= {
        "gpt4-1.8t", "gpt4-1.8t-32k", "gpt4-1.8t-serve", "gpt4-1.8t-vision", "llama-2-7b", "llama-2-13b",
        "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3-405b", "mistral-7b", "mixtral-8x7b", "deepseek-moe-16b",
        "deepseek-v3", "jamba-52b", "gpt3-175b", "dense-500b", "dense-1t", "nano", "nano-dense", "tiny", "small",
    }  # fmt: skip
    assert set(PLANNED) == {"gpt4-1.8t-vision", "deepseek-v3", "jamba-52b", "gpt3-175b", "dense-1t"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_config_says_what_it_is(path):
    lines = path.read_text("utf-8").splitlines()
    comment = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    planned = "[plan]" in lines
    command = f"python -m moe_lm.scaling {path.stem}" if planned else "python train.py"
    assert re.search(rf"^#   {re.escape(command)}( |$)", comment, re.MULTILINE), comment
    assert ("Counted and planned only" in comment) == (path.stem in PLANNED)
    if planned:
        assert "https://" in comment or "not confirmed by OpenAI" in comment, "the source of the figures"


@pytest.mark.parametrize("name", [path.stem for path in PATHS if "[plan]" in path.read_text("utf-8")])
def test_a_plan_lies_on_its_cluster(name):
    run = RUNS[name]
    layout = settle(run)
    assert layout.gpus == run.plan.gpus
    assert layout.micro_batches >= 1
    held = [layer for stage in stages(run.model, run.plan.pp) for layer in stage.layers]
    assert held == list(range(run.model.num_hidden_layers))
    serving = run.serving
    assert serving.prompt_tokens + serving.output_tokens <= run.model.max_position_embeddings
    assert run.model.num_attention_heads % serving.tp == 0
    assert serving.pp <= run.model.num_hidden_layers
    assert serving.ep == 1 or run.model.num_local_experts % serving.ep == 0
    for plan in (run.plan, serving):
        assert machine(plan.gpu)


def test_the_configs_of_one_model_differ_in_nothing_else():
    base = MODELS["gpt4-1.8t"]
    assert MODELS["gpt4-1.8t-serve"] == base
    assert dataclasses.replace(MODELS["gpt4-1.8t-vision"], vision=None) == base
    long = MODELS["gpt4-1.8t-32k"]
    assert dataclasses.replace(long, max_position_embeddings=8192, rope_scaling=None) == base
    stretched = base.max_position_embeddings * long.rope_scaling.factor
    assert stretched == long.max_position_embeddings == RUNS["gpt4-1.8t-32k"].data.sequence_length == 32768
    assert (RUNS["gpt4-1.8t-serve"].serving.tp, RUNS["gpt4-1.8t-serve"].serving.pp) == (8, 16)


# Parameters


@pytest.mark.parametrize("name", PLANNED)
def test_what_is_only_planned_is_not_built(name):
    fields = " and ".join(f"model.{field}" for field in MODELS[name].only_planned)
    with pytest.raises(ConfigError, match=f"^{fields} is counted and planned by moe_lm.scaling and not built"):
        on_meta(lambda: Transformer(MODELS[name]))


def theirs(config: ModelConfig):
    """The config of transformers that is the same model, for what our model does not build."""
    common = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "num_experts_per_tok": config.num_experts_per_tok, "tie_word_embeddings": config.tie_word_embeddings,
    }  # fmt: skip
    if config.block == "gpt2":
        return GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_position_embeddings, n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers, n_head=config.num_attention_heads, n_inner=config.intermediate_size,
            tie_word_embeddings=config.tie_word_embeddings,
        )  # fmt: skip
    if config.mamba is not None:
        mamba = config.mamba
        return JambaConfig(
            **common, num_experts=config.num_local_experts, expert_layer_period=config.expert_layer_period,
            expert_layer_offset=config.expert_layer_offset, attn_layer_period=mamba.attn_layer_period,
            attn_layer_offset=mamba.attn_layer_offset, mamba_d_state=mamba.d_state, mamba_d_conv=mamba.d_conv,
            mamba_expand=mamba.expand, mamba_dt_rank=mamba.dt_rank, use_mamba_kernels=False,
        )  # fmt: skip
    return DeepseekV3Config(
        **common, **dataclasses.asdict(config.mla), n_routed_experts=config.num_local_experts, n_group=1, topk_group=1,
        moe_intermediate_size=config.expert_size, n_shared_experts=config.n_shared_experts,
        first_k_dense_replace=config.first_k_dense_replace,
    )  # fmt: skip


def in_transformers(config: ModelConfig) -> nn.Module:
    if config.only_planned:
        settings = theirs(config)
    else:
        settings = to_hf_config(config, dtype=torch.float32)
        settings = AutoConfig.for_model(**settings)
    return AutoModelForCausalLM.from_config(settings, attn_implementation="eager")


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("deepseek-moe-16b", "gpt4-1.8t-vision")])
def test_counts_are_those_of_transformers(name):
    # The two that are left out: Qwen2Moe, as which the first is saved, adds a gate, and the second is built below.
    model = on_meta(lambda: in_transformers(MODELS[name]))
    # DeepseekV3's biases of the router, which balance the load without a loss, are buffers there and no parameters.
    assert parameters(MODELS[name]).total == size(model)
    biases = [buffer.numel() for key, buffer in model.named_buffers() if key.endswith("e_score_correction_bias")]
    mixtures = len(MODELS[name].routing_layers)
    assert biases == ([256] * mixtures if name == "deepseek-v3" else [])


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_released_files(name):
    # The router's biases of DeepSeek-V3 are in the file, and its second-token block is counted apart (its README).
    biases = 58 * 256 if name == "deepseek-v3" else 0
    assert parameters(MODELS[name]).total + biases == PUBLISHED[name]


class CrossAttention(nn.Module):
    """A gated block of Flamingo: attention to an image's patches, then an MLP, each behind tanh of a learned scalar
    (Alayrac et al. 2022, section 2.2), with the decoder's norms and heads."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, W, inner = config.hidden_size, config.vision.hidden_size, 4 * config.hidden_size
        self.heads, self.kv_heads, self.channels = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.norm, self.mlp_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.queries = nn.Linear(D, self.heads * self.channels, bias=False)
        self.keys = nn.Linear(W, self.kv_heads * self.channels, bias=False)
        self.values = nn.Linear(W, self.kv_heads * self.channels, bias=False)
        self.out = nn.Linear(self.heads * self.channels, D, bias=False)
        self.up, self.down = nn.Linear(D, inner, bias=False), nn.Linear(inner, D, bias=False)
        self.gate, self.mlp_gate = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

    def forward(self, x, keys, values):
        """x (T, D), keys and values (G, patches, C) -> (T, D)."""
        q = self.queries(self.norm(x)).unflatten(-1, (self.heads, self.channels)).transpose(0, 1)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, 0) for part in (keys, values))
        seen = torch.softmax(q @ k.mT, dim=-1) @ v
        x = x + self.gate.tanh() * self.out(seen.transpose(0, 1).flatten(1))
        return x + self.mlp_gate.tanh() * self.down(self.up(self.mlp_norm(x)).square())


class Encoder(nn.Module):
    """A ViT without a class token (Dosovitskiy et al. 2021, section 3.1)."""

    def __init__(self, vision: VisionEncoder):
        super().__init__()
        W, patch = vision.hidden_size, vision.patch_size
        self.patches = nn.Conv2d(3, W, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(vision.image_tokens, W))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(W, 1, vision.intermediate_size) for _ in range(vision.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(W)


def seeing(config: ModelConfig) -> nn.ModuleDict:
    """The decoder, the encoder and the blocks between them."""
    crossing = range(0, config.num_hidden_layers, config.vision.cross_attention_period)
    return nn.ModuleDict({
        "decoder": Transformer(dataclasses.replace(config, vision=None)),
        "encoder": Encoder(config.vision),
        "crossing": nn.ModuleList(CrossAttention(config) for _ in crossing),
    })  # fmt: skip


def test_counts_of_vision_are_those_of_encoder_decoder_and_cross_attention():
    config = MODELS["gpt4-1.8t-vision"]
    model = on_meta(lambda: seeing(config))
    counts = parameters(config)
    assert counts.vision_encoder == size(model["encoder"])
    assert counts.total == size(model)
    assert len(model["crossing"]) == 18  # 120 layers, one before every seventh
    assert counts.cross_attention == size(model["crossing"])


# FLOPs


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4,
}  # fmt: skip
KINDS = {
    "gpt2": ModelConfig(**SMALL, num_key_value_heads=4, block="gpt2", num_local_experts=0, tie_word_embeddings=True),
    "mla": ModelConfig(
        **SMALL, num_key_value_heads=4, mla=LatentAttention(16, 8, 4, 6, 12), first_k_dense_replace=1,
        num_local_experts=8, n_shared_experts=1, moe_intermediate_size=20,
    ),
    "mamba": ModelConfig(
        **SMALL, num_key_value_heads=2, mamba=Mamba(4, 2, d_state=8, d_conv=4, expand=2, dt_rank=4),
        num_local_experts=8, expert_layer_period=2, expert_layer_offset=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_flops_of_what_is_planned_are_those_that_torch_counts_in_transformers(kind):
    config, length = KINDS[kind], 6
    model = in_transformers(config).eval()
    assert parameters(config).total == size(model)
    if config.is_moe:
        model.set_experts_implementation("eager")  # torch does not count the grouped products of the default
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 64, (1, length)), use_cache=False)
    per_token = counter.get_total_flops() / length
    if kind == "mamba":
        # Of the scan torch sees the product of states and C alone, 2 of 9 for each state. Of the convolution it sees
        # the positions that padding adds, too: d_conv - 1 more of them.
        inner, mamba, layers = 64, config.mamba, 3
        per_token += layers * 7 * inner * mamba.d_state
        per_token -= layers * 2 * inner * mamba.d_conv * (mamba.d_conv - 1) / length
        assert mamba_vectors(config) == inner * 8 + 3 * inner + 4 + 2 * 8
    assert per_token == forward_flops_per_token(config, context=length)


def test_flops_of_cross_attention_are_those_that_torch_counts():
    config = ModelConfig(**SMALL, num_local_experts=0, vision=VisionEncoder(24, 48, 2, 28, 14, 3))
    length, patches = 5, config.vision.image_tokens
    model = on_meta(lambda: seeing(config))
    x, keys = torch.zeros(length, 32, device="meta"), torch.zeros(1, patches, 8, device="meta")
    with torch.no_grad(), kernels.use_backend("reference"), FlopCounterMode(display=False) as counter:
        model["decoder"](torch.zeros(1, length, dtype=torch.int64, device="meta"))
        for block in model["crossing"]:
            block(x, keys, keys)
    assert len(model["crossing"]) == 2
    assert parameters(config).total == size(model)
    assert counter.get_total_flops() == length * forward_flops_per_token(config, context=length)


# The hand figures of the published systems


def test_llama_3_8b_grew_where_it_is_said_to():
    old, new = (parameters(MODELS[name]) for name in ("llama-2-7b", "llama-3-8b"))
    mib = {
        part: 2 * (getattr(new, part) - getattr(old, part)) / 2**20
        for part in ("embedding", "output", "attention", "mlp", "norms", "total")
    }
    assert mib["embedding"] + mib["output"] == 1504
    assert (mib["attention"], mib["mlp"], mib["norms"], mib["total"]) == (-1536, 2496, 0, 2464)
    assert (round(old.total / 1e9, 2), round(new.total / 1e9, 2)) == (6.74, 8.03)


def test_sizes_of_the_neighbours():
    billions = {name: parameters(model) for name, model in MODELS.items()}
    total, active = ({name: getattr(counts, part) / 1e9 for name, counts in billions.items()}
                     for part in ("total", "active"))  # fmt: skip
    assert round(total["mistral-7b"], 2) == 7.24
    assert (round(total["mixtral-8x7b"], 1), round(active["mixtral-8x7b"], 1)) == (46.7, 12.9)
    assert (round(total["deepseek-moe-16b"], 1), round(active["deepseek-moe-16b"], 1)) == (16.4, 2.8)
    assert (round(total["jamba-52b"]), round(active["jamba-52b"])) == (52, 12)
    assert (round(total["gpt3-175b"], 1), MODELS["gpt3-175b"].num_hidden_layers) == (174.6, 96)
    assert (round(total["deepseek-v3"]), active["deepseek-v3"]) == (671, pytest.approx(37, rel=0.02))
    assert total["dense-1t"] == pytest.approx(1008.0, abs=0.05)  # Narayanan et al. 2021, table 1
    assert 500 < total["dense-500b"] < 550
    assert active["gpt3-175b"] == total["gpt3-175b"]


def test_deepseek_moe_computes_two_fifths_of_llama():
    # Dai et al. 2024, table 3: 74.4 against 187.9 TFLOP for 4k tokens, three times a forward pass.
    ours, llama = (forward_flops_per_token(MODELS[name], 4096 / 2) for name in ("deepseek-moe-16b", "llama-2-7b"))
    assert ours / llama == pytest.approx(0.40, abs=0.005)


def test_caches_of_long_contexts():
    tokens = 256 * 1024
    gib = {name: 2 * tokens * cache_numbers(model) / 2**30 for name, model in MODELS.items()}
    assert (gib["llama-2-7b"], gib["mistral-7b"], gib["jamba-52b"]) == (128, 32, 4)
    assert cache_numbers(MODELS["gpt3-175b"]) == 96 * 2 * 12288
    assert cache_numbers(MODELS["deepseek-v3"]) == 61 * 576
    terabytes = 2 * 512 * 2048 * cache_numbers(MODELS["dense-500b"]) / 1e12
    assert terabytes == pytest.approx(3, rel=0.05)
    assert 2.5 < terabytes * 1e12 / (2 * parameters(MODELS["dense-500b"]).total) < 3.2
