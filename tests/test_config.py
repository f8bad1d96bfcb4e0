"""Config files: what is read back, what is refused and in which words."""

import dataclasses
import tomllib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moe_lm.cli import field_docs
from moe_lm.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    LatentAttention,
    Mamba,
    ModelConfig,
    RopeScaling,
    RunConfig,
    SampleConfig,
    ServingPlan,
    SourceConfig,
    TrainConfig,
    TrainingPlan,
    VisionEncoder,
)
from moe_lm.toml import from_value, load_config, to_dict, to_toml

CLASSES = [
    RopeScaling, LatentAttention, Mamba, VisionEncoder, ModelConfig, SourceConfig, DataConfig, TrainConfig,
    CheckpointConfig, SampleConfig, TrainingPlan, ServingPlan, RunConfig,
]  # fmt: skip

MLA = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
NEEDED = {SourceConfig: {"path": "text"}, LatentAttention: MLA, VisionEncoder: VISION}
"""Arguments that a class has no default for."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # no lone surrogates: they are no text, see the refusals
POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
CONTROL = "".join(map(chr, range(0xA0)))


def read(text: str) -> RunConfig:
    return from_value(RunConfig, tomllib.loads(text), "")


def one_sentence(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    assert message.endswith((".", "?"))
    return message


# Reading back


@given(
    run_dir=st.none() | TEXT,
    prompts=st.lists(TEXT).map(tuple),
    sources=st.lists(
        st.builds(
            SourceConfig, path=TEXT.filter(bool), epochs=POSITIVE, name=st.none() | TEXT, streaming=st.booleans()
        ),
        min_size=1,
    ).map(tuple),
    rope_scaling=st.none() | st.builds(RopeScaling, factor=st.floats(1, 1e9)),
    rope_theta=POSITIVE,
    steps=st.integers(40, 10**30),
)
@example(CONTROL, (CONTROL, "\"'\\\u2028\ufeff\U0001f600"), (SourceConfig('"""'),), None, 1e16, 40)
def test_toml_round_trip(run_dir, prompts, sources, rope_scaling, rope_theta, steps):
    config = RunConfig(
        run_dir=run_dir,
        model=ModelConfig(rope_scaling=rope_scaling, rope_theta=rope_theta),
        data=DataConfig(sources=sources),
        train=TrainConfig(steps=steps),
        sample=SampleConfig(prompts=prompts),
    )
    assert read(to_toml(config)) == config


def test_round_trip_through_a_file(tmp_path):
    config = RunConfig(draft="configs/nano-draft.toml", sample=SampleConfig(prompts=("é\x7f\r\n\t",)))
    (tmp_path / "config.toml").write_text(to_toml(config), "utf-8")
    assert load_config(tmp_path / "config.toml") == config


def test_empty_file_is_the_default_run(tmp_path):
    (tmp_path / "empty.toml").write_bytes(b"\xef\xbb\xbf# a byte order mark, as some editors write\r\n")
    assert load_config(tmp_path / "empty.toml") == RunConfig()


def test_what_is_not_set_is_not_written():
    assert "draft" not in to_dict(RunConfig())
    assert "rope_scaling" not in to_toml(RunConfig())


def test_whole_numbers_serve_as_numbers():
    rate = read("[train]\nlearning_rate = 1").train.learning_rate
    assert rate == 1.0
    assert type(rate) is float


@pytest.mark.parametrize(
    ("model", "head_dim"),
    [(ModelConfig(), 32), (ModelConfig(hidden_size=512), 64), (ModelConfig(hidden_size=250, head_dim=16), 16)],
)
def test_head_dim_is_filled_in(model, head_dim):
    assert model.head_dim == head_dim


def test_expert_size():
    assert ModelConfig(intermediate_size=96).expert_size == 96
    assert ModelConfig(intermediate_size=96, moe_intermediate_size=32).expert_size == 32
    assert not ModelConfig(num_local_experts=0).is_moe


@pytest.mark.parametrize(
    ("model", "routing"),
    [
        (ModelConfig(), [True] * 4),
        (ModelConfig(num_local_experts=0), [False] * 4),
        (ModelConfig(first_k_dense_replace=1), [False, True, True, True]),
        (ModelConfig(expert_layer_period=2), [True, False] * 2),
        (ModelConfig(expert_layer_period=2, expert_layer_offset=1), [False, True] * 2),
        (ModelConfig(expert_layer_period=2, first_k_dense_replace=1), [False, False, True, False]),
    ],
)
def test_which_layers_route(model, routing):
    assert [model.routes(layer) for layer in range(4)] == routing


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ()), ({"first_k_dense_replace": 1}, ()), ({"block": "gpt2"}, ("block",)), ({"mamba": Mamba()}, ("mamba",)),
        ({"mla": LatentAttention(**MLA), "vision": VisionEncoder(**VISION)}, ("mla", "vision")),
    ],
)  # fmt: skip
def test_what_is_only_planned_is_named(changes, names):
    assert ModelConfig(**changes).only_planned == names


def test_layers_with_attention():
    assert [layer for layer in range(16) if ModelConfig(mamba=Mamba()).attends(layer)] == [4, 12]
    assert all(ModelConfig().attends(layer) for layer in range(4))


# The classes themselves


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_docstring(cls):
    docs = field_docs(cls)
    assert list(docs) == [f.name for f in dataclasses.fields(cls)]
    assert all(docs.values())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_frozen(cls):
    config = cls(**NEEDED.get(cls, {}))
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))
    assert hash(config) == hash(dataclasses.replace(config))


# Refusals of values. Each message carries the value, the field and, where there is one, the field it clashes with.


def rows(cls: type, section: str, *cases: tuple) -> list:
    """Test parameters from (arguments, parts of the message); the first argument is the one that is refused."""
    params = []
    for arguments, *parts in cases:
        name, value = next(iter(arguments.items()))
        said = [f"{section}{name} = {value}", *parts]
        params.append(pytest.param(cls, NEEDED.get(cls, {}) | arguments, said, id=f"{cls.__name__}-{arguments}"))
    return params


def not_positive(cls: type, section: str, *names: str) -> list:
    return rows(cls, section, *(({name: value}, "greater than 0") for name in names for value in (0, -1)))


REFUSALS = [
    *not_positive(RopeScaling, "rope_scaling.", "original_max_position_embeddings"),
    *rows(
        RopeScaling, "rope_scaling.",
        ({"factor": 0.5}, "at least 1"),
        ({"high_freq_factor": 1.0}, "low_freq_factor = 1.0"),
        ({"high_freq_factor": 4.0, "low_freq_factor": 8.0}, "low_freq_factor = 8.0"),
        ({"high_freq_factor": 4.0, "low_freq_factor": 0.0}, "low_freq_factor = 0.0", "above 0"),
    ),
    *not_positive(LatentAttention, "model.mla.", *MLA),
    *rows(LatentAttention, "model.mla.", ({"q_lora_rank": -1}, "0 (none)")),
    *not_positive(Mamba, "model.mamba.", "attn_layer_period", "d_state", "d_conv", "expand", "dt_rank"),
    *rows(
        Mamba, "model.mamba.",
        ({"attn_layer_offset": -1}, "attn_layer_period = 8"), ({"attn_layer_offset": 8}, "attn_layer_period = 8"),
    ),
    *not_positive(VisionEncoder, "model.vision.", *VISION, "cross_attention_period"),
    *rows(
        VisionEncoder, "model.vision.",
        ({"image_size": 30}, "patch_size = 14"), ({"cross_attention_intermediate_size": -1}, "0 or more"),
    ),
    *not_positive(
        ModelConfig, "", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps", "initializer_range",
        "moe_intermediate_size", "expert_layer_period",
    ),
    *(
        pytest.param(
            ModelConfig, {"num_local_experts": 0, name: 1} | others, [name, "num_local_experts = 0"],
            id=f"ModelConfig-dense-{name}",
        )
        for name, others in (
            ("first_k_dense_replace", {}), ("expert_layer_period", {"expert_layer_period": 2}),
            ("expert_layer_offset", {"expert_layer_period": 2}),
        )
    ),
    *rows(
        ModelConfig, "",
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads = 3", "divisor of 8"),
        ({"hidden_size": 250}, "num_attention_heads = 8", "head_dim"),
        ({"head_dim": 0}, "even"),
        ({"head_dim": -2}, "above 0"),
        ({"head_dim": 15}, "even"),
        ({"num_local_experts": -1}, "0 (dense)"),
        ({"n_shared_experts": -1}, "0 or more"),
        ({"n_shared_experts": 1, "num_local_experts": 0}, "num_local_experts"),
        ({"num_experts_per_tok": 0}, "num_local_experts = 16"),
        ({"num_experts_per_tok": 5, "num_local_experts": 4}, "num_local_experts = 4"),
        ({"first_k_dense_replace": -1}, "num_hidden_layers = 4"),
        ({"first_k_dense_replace": 4}, "num_hidden_layers = 4"),
        ({"expert_layer_offset": -1}, "expert_layer_period = 1"),
        ({"expert_layer_offset": 2, "expert_layer_period": 2}, "expert_layer_period = 2"),
        ({"router_aux_loss_coef": -0.1}, "0 or more"),
        ({"router_z_loss_coef": -0.1}, "0 or more"),
        ({"router_jitter_noise": -0.1}, "at least 0"),
        ({"router_jitter_noise": 1.0}, "below 1"),
    ),
    pytest.param(ModelConfig, {"hidden_size": 24}, ["head_dim = 3", "even"], id="ModelConfig-derived-head_dim"),
    pytest.param(SourceConfig, {"path": ""}, ["path", "empty"], id="SourceConfig-path"),
    pytest.param(SourceConfig, {"path": "x", "epochs": 0.0}, ["epochs = 0.0 of source x"], id="SourceConfig-epochs"),
    pytest.param(DataConfig, {"sources": ()}, ["data.sources", "empty"], id="DataConfig-sources"),
    *rows(
        DataConfig, "data.",
        ({"sequence_length": 1}, "at least 2"),
        ({"validation_fraction": 0.0}, "excluded"),
        ({"validation_fraction": 1.0}, "excluded"),
    ),
    *not_positive(
        TrainConfig, "train.", "steps", "batch_tokens", "micro_batch_tokens", "learning_rate", "adam_eps",
        "eval_every", "eval_tokens", "log_every",
    ),
    *rows(
        TrainConfig, "train.",
        ({"beta1": -0.1}, "at least 0"), ({"beta1": 1.0}, "below 1"), ({"beta2": 1.0}, "below 1"),
        ({"min_learning_rate_ratio": -0.1}, "between 0 and 1"), ({"min_learning_rate_ratio": 1.1}, "between 0 and 1"),
        ({"warmup": -0.1}, "below 1"), ({"warmup": 1.0}, "below 1"), ({"decay_share": 0.0}, "above 0 and at most 1"),
        ({"decay_share": 1.1}, "above 0 and at most 1"),
        ({"decay_share": 0.95, "decay": "wsd"}, "train.warmup = 0.06 and"), ({"batch_ramp_steps": -1}, "0 or more"),
        ({"weight_decay": -1.0}, "0 or more"), ({"max_grad_norm": -1.0}, "0 or more"), ({"seed": -1}, "0 or more"),
        ({"batch_ramp_steps": 5}, "set both or neither"), ({"batch_tokens_start": 4096}, "set both or neither"),
        ({"batch_tokens_start": 0}, "between 1"),
        ({"batch_tokens_start": 9000, "batch_tokens": 8192}, "batch_tokens = 8192"),
    ),
    *not_positive(CheckpointConfig, "checkpoint.", "every", "keep"),
    *not_positive(SampleConfig, "sample.", "max_tokens", "draft_tokens"),
    *rows(SampleConfig, "sample.", ({"temperature": -0.5}, "0 or more")),
    *not_positive(
        TrainingPlan, "plan.", "tp", "pp", "ep", "interleave", "micro_batch", "gpus", "zero_group", "price",
    ),
    *rows(TrainingPlan, "plan.", ({"expert_imbalance": 0.9}, "at least 1")),
    *not_positive(ServingPlan, "serving.", "tp", "pp", "ep", "batch", "prompt_tokens", "output_tokens", "price"),
    *rows(
        ServingPlan, "serving.",
        ({"draft_tokens": -1}, "0 (none)"), ({"acceptance": -0.1}, "between 0 and 1"),
        ({"acceptance": 1.1}, "between 0 and 1"),
    ),
    pytest.param(
        RunConfig, {"data": DataConfig(sequence_length=2048)},
        ["data.sequence_length = 2048", "model.max_position_embeddings = 1024"], id="RunConfig-sequence_length",
    ),
    *(
        pytest.param(
            RunConfig, {"train": TrainConfig(**{name: 255}, **others)},
            ["255 tokens", "data.sequence_length = 256", f"train.{name}"], id=f"RunConfig-{name}",
        )
        for name, others in (
            ("batch_tokens", {}), ("batch_tokens_start", {"batch_ramp_steps": 9}), ("micro_batch_tokens", {}),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "arguments", "parts"), REFUSALS)
def test_refusal_names_the_value_and_the_field(cls: type, arguments: dict[str, Any], parts: list[str]):
    with pytest.raises(ConfigError) as error:
        cls(**arguments)
    message = one_sentence(error)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (RopeScaling, {"factor": 1.0}),
        (ModelConfig, {"num_local_experts": 0, "num_experts_per_tok": 99}),
        (ModelConfig, {"num_experts_per_tok": 16}),
        (ModelConfig, {"num_key_value_heads": 8}),
        (DataConfig, {"sequence_length": 2}),
        (TrainConfig, {"steps": 1}),  # a share of one step is no warm-up
        (TrainConfig, {"beta1": 0.0, "min_learning_rate_ratio": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0}),
        (TrainConfig, {"batch_tokens_start": 8192, "batch_ramp_steps": 1}),
        (SampleConfig, {"temperature": 0.0, "prompts": ()}),
        (ModelConfig, {"first_k_dense_replace": 3}),
        (ModelConfig, {"uniform_routing": True, "expert_capacity_factor": 0.01, "norm_topk_prob": False}),
        (ModelConfig, {"expert_layer_period": 4, "expert_layer_offset": 3}),
        (Mamba, {"attn_layer_offset": 7}),
        (VisionEncoder, VISION | {"image_size": 14}),
        (TrainingPlan, {"expert_imbalance": 1.0, "gpus": 1, "zero_group": 1}),
        (ServingPlan, {"acceptance": 1.0, "draft_tokens": 1}),
    ],
)
def test_the_edge_is_allowed(cls, arguments):
    assert cls(**arguments)


# Refusals of files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trian]\nsteps = 5", "trian is not a known setting; did you mean train?"),
        ("[train]\nstep = 5", "train.step is not a known setting; did you mean train.steps?"),
        ("[zebra]", "zebra is not a known setting."),
        ("[model.rope_scaling]\nfaktor = 2.0", "model.rope_scaling.faktor is not a known setting; "
         "did you mean model.rope_scaling.factor?"),
        ("[[data.sources]]\npath = 'x'\nepoch = 2", "data.sources[0].epoch is not a known setting; "
         "did you mean data.sources[0].epochs?"),
        ("train = 3", "train = 3 must be a table."),
        ("[model]\nrope_scaling = 4", "model.rope_scaling = 4 must be a table."),
        ("[data]\nsources = 'x'", "data.sources = 'x' must be a list."),
        ("[data]\nsources = ['x']", "data.sources[0] = 'x' must be a table."),
        ("[[data.sources]]\nepochs = 2", "data.sources[0] lacks path."),
        ("[sample]\nprompts = ['a', 1]", "sample.prompts[1] = 1 must be a string."),
        ("[train]\nsteps = 'many'", "train.steps = 'many' must be a whole number."),
        ("[train]\nsteps = 5.0", "train.steps = 5.0 must be a whole number."),
        ("[train]\nsteps = true", "train.steps = True must be a whole number."),
        ("[train]\nlearning_rate = '1'", "train.learning_rate = '1' must be a number."),
        ("[train]\nlearning_rate = true", "train.learning_rate = True must be a number."),
        ("[train]\nlearning_rate = nan", "train.learning_rate = nan must be a finite number."),
        ("[train]\nlearning_rate = -inf", "train.learning_rate = -inf must be a finite number."),
        ("[train]\ntensorboard = 1", "train.tensorboard = 1 must be true or false."),
        ("[train]\ndecay = 'step'", "train.decay = 'step' must be one of 'cosine', 'linear', 'wsd'."),
        ("[train]\nsteps = 0", "train.steps = 0 must be greater than 0."),
        ("run_dir = 2026-01-01", "run_dir = datetime.date(2026, 1, 1) must be a string."),
    ],
)  # fmt: skip
def test_refused_files(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "run.toml")
    assert one_sentence(error) == message


def test_lone_surrogates_are_refused():
    with pytest.raises(ConfigError) as error:
        from_value(RunConfig, {"run_dir": "runs/\udcff"}, "")
    assert one_sentence(error) == r"run_dir = 'runs/\udcff' must be valid UTF-8."


@pytest.mark.parametrize("content", [b"steps = ", b"[a]\n[a]", b"x = \xff", b"x = " + b"1" * 5000])
def test_invalid_toml_is_refused(tmp_path, content):
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert f"{path} is not valid TOML: " in one_sentence(error)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "nano.toml").touch()
    cases = {
        tmp_path / "nanno.toml": f"no config file {tmp_path}/nanno.toml; did you mean {tmp_path}/nano.toml?",
        tmp_path / "nowhere" / "x.toml": f"no config file {tmp_path}/nowhere/x.toml.",
        tmp_path: f"{tmp_path} is a directory; name a .toml file.",
        tmp_path / "nano.toml" / "x.toml": f"{tmp_path}/nano.toml/x.toml cannot be read: Not a directory.",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError) as error:
            load_config(path)
        assert one_sentence(error) == message
