"""The command line: what --help lists, how settings are typed, and errors of one line."""

import dataclasses
from pathlib import Path

import pytest

from moe_lm import cli
from moe_lm.cli import Parser, field_docs, parse_run_config, read_value, settings, suggestion
from moe_lm.config import (
    ConfigError,
    DataConfig,
    LatentAttention,
    Mamba,
    ModelConfig,
    QualityConfig,
    QualityRules,
    RopeScaling,
    RunConfig,
    SourceConfig,
    TrainConfig,
    VisionEncoder,
)
from moe_lm.toml import load_config, to_toml

SETTINGS = {setting.name: setting for setting in settings()}


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text("[model]\nhidden_size = 128\n[train]\nsteps = 77\nwarmup = 0.1\n", "utf-8")
    return path


def parse(path: Path, *argv: str) -> RunConfig:
    config, _ = parse_run_config([str(path), *argv], "Test.")
    return config


def refusal(*argv: str, **options) -> str:
    with pytest.raises(ConfigError) as error:
        parse_run_config([str(token) for token in argv], "Test.", **options)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


# Which file and which of the command's own options


def test_the_default_file_and_a_named_one(config_file, tmp_path):
    other = tmp_path / "other.toml"
    other.touch()
    config, args = parse_run_config([], "Test.", default=config_file)
    assert (config, vars(args)) == (load_config(config_file), {"config_path": config_file, "overrides": {}})
    config, args = parse_run_config([str(other)], "Test.", default=config_file)
    assert (config, vars(args)) == (RunConfig(), {"config_path": other, "overrides": {}})


@pytest.mark.parametrize("option", ["--dry-run", "--dry_run"])
def test_a_command_keeps_its_own_options(config_file, option):
    def extra(parser):
        parser.add_argument("--dry-run", action="store_true")
        parser.add_argument("--top_k", type=int)

    argv = ["--train.steps", "9", option, str(config_file), "--top-k=3"]
    config, args = parse_run_config(argv, "Test.", extra=extra)
    assert config.train.steps == 9
    overrides = {"train.steps": 9}
    assert vars(args) == {"config_path": config_file, "overrides": overrides, "dry_run": True, "top_k": 3}


def test_a_parser_for_commands_without_a_run_config():
    parser = Parser("Serve.")
    parser.add_argument("--max-num-seqs", type=int)
    assert parser.parse_args(["--max_num_seqs", "3"]).max_num_seqs == 3
    with pytest.raises(ConfigError, match=r"--max-num-seq is not a known setting; did you mean --max-num-seqs\?"):
        parser.parse_args(["--max-num-seq", "3"])
    with pytest.raises(ConfigError, match="'a b' is more than this command takes"):
        parser.parse_args(["a", "b"])
    with pytest.raises(ConfigError, match="--max-num-seqs: invalid int value: 'x'"):
        parser.parse_args(["--max-num-seqs", "x"])


def test_only_names_are_respelled():
    parser = Parser("Echo.")
    parser.add_argument("--stop-at")
    parser.add_argument("words", nargs="*")
    args = parser.parse_args(["--stop_at=--stop_at", "a_b", "--", "--stop_at"])
    assert (args.stop_at, args.words) == ("--stop_at", ["a_b", "--stop_at"])


# Settings on top of the file


@pytest.mark.parametrize(
    ("argv", "get", "value"),
    [
        (["--train.steps", "100"], lambda c: c.train.steps, 100),
        (["--train.steps=100"], lambda c: c.train.steps, 100),
        (["--train.steps", "100", "--train.steps", "200"], lambda c: c.train.steps, 200),
        (["--train.learning-rate", "1"], lambda c: c.train.learning_rate, 1.0),
        (["--train.learning_rate", "3e-4"], lambda c: c.train.learning_rate, 3e-4),
        (["--train.tensorboard", "true"], lambda c: c.train.tensorboard, True),
        (["--train.tensorboard=false"], lambda c: c.train.tensorboard, False),
        (["--train.decay", "linear"], lambda c: c.train.decay, "linear"),
        (["--run-dir", "runs/X"], lambda c: c.run_dir, "runs/X"),
        (["--run_dir=a=b c"], lambda c: c.run_dir, "a=b c"),
        (["--draft", "12"], lambda c: c.draft, "12"),
        (["--data.cache_dir", "none"], lambda c: c.data.cache_dir, "none"),
        (["--sample.prompts", '["a\\n", "--b"]'], lambda c: c.sample.prompts, ("a\n", "--b")),
        (["--sample.prompts", "[]"], lambda c: c.sample.prompts, ()),
        (["--data.sources", '[{path="my.txt", epochs=1}]'], lambda c: c.data.sources, (SourceConfig("my.txt"),)),
        (["--model.rope_scaling", "{factor=2.0}"], lambda c: c.model.rope_scaling, RopeScaling(factor=2.0)),
        (["--model.rope-scaling.factor", "4"], lambda c: c.model.rope_scaling, RopeScaling(factor=4.0)),
        (
            ["--model.rope_scaling.rope_type", "llama3", "--model.rope_scaling.factor=8"],
            lambda c: c.model.rope_scaling,
            RopeScaling("llama3", 8.0),
        ),
        (
            ["--model.rope_scaling", "{factor=2.0}", "--model.rope_scaling.rope_type=llama3"],
            lambda c: c.model.rope_scaling,
            RopeScaling("llama3", 2.0),
        ),
        (
            ["--model.rope_scaling.factor=2", "--model.rope_scaling", "none"],
            lambda c: c.model.rope_scaling,
            None,
        ),
    ],
)
def test_override(config_file, argv, get, value):
    config = parse(config_file, *argv)
    assert get(config) == value
    assert type(get(config)) is type(value)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_can_be_set(name):
    kind = SETTINGS[name].kind
    text = {int: "2", float: "0.5", bool: "true", str: "x"}.get(cli.without_none(kind))
    if text is not None:
        assert str(read_value(kind, text, name)).lower() == text
    if cli.without_none(kind) is not kind:
        assert read_value(kind, "none", name) is None


def test_only_optional_settings_default_to_none():
    for setting in SETTINGS.values():
        if setting.default is None:
            assert cli.without_none(setting.kind) is not setting.kind, setting.name


def test_the_rest_of_the_file_stays(config_file):
    assert parse(config_file, "--train.seed", "3").train == TrainConfig(steps=77, warmup=0.1, seed=3)


def test_settings_that_need_each_other_change_together(config_file):
    length, limit = ["--data.sequence_length", "2048"], ["--model.max_position_embeddings", "2048"]
    assert parse(config_file, *length, *limit).data.sequence_length == 2048
    assert "model.max_position_embeddings = 1024" in refusal(config_file, *length)
    ramp = parse(config_file, "--train.batch_ramp_steps=9", "--train.batch_tokens_start=4096").train
    assert (ramp.batch_ramp_steps, ramp.batch_tokens_start) == (9, 4096)
    assert "set both or neither" in refusal(config_file, "--train.batch_ramp_steps=9")


def test_an_override_can_mend_a_broken_file(tmp_path):
    (tmp_path / "broken.toml").write_text("[train]\nsteps = 'many'\n", "utf-8")
    assert parse(tmp_path / "broken.toml", "--train.steps", "5").train.steps == 5


def test_none_unsets_what_the_file_sets(tmp_path):
    path = tmp_path / "full.toml"
    config = RunConfig(
        run_dir="runs/x",
        draft="draft.toml",
        model=ModelConfig(rope_scaling=RopeScaling(factor=2.0), moe_intermediate_size=64),
        train=TrainConfig(batch_tokens_start=4096, batch_ramp_steps=9),
    )
    path.write_text(to_toml(config), "utf-8")
    names = ["run_dir", "draft", "model.rope_scaling", "model.moe_intermediate_size", "train.batch_tokens_start"]
    unset = [token for name in names for token in (f"--{name}", "none")]
    assert parse(path, *unset, "--train.batch_ramp_steps", "0") == RunConfig()


def test_head_dim_follows_the_override(config_file):
    assert parse(config_file).model.head_dim == 16
    assert parse(config_file, "--model.hidden-size=512").model.head_dim == 64
    assert parse(config_file, "--model.hidden-size=512", "--model.head-dim=16").model.head_dim == 16


# Refusals


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.step", "5"], "--train.step is not a known setting; did you mean --train.steps?"),
        (["--train.step=5"], "--train.step is not a known setting; did you mean --train.steps?"),
        (["--trian.steps", "5"], "--trian.steps is not a known setting; did you mean --train.steps?"),
        (["--model.batch-tokens", "5"], "--model.batch-tokens is not a known setting; did you mean "
         "--train.batch_tokens?"),
        (["--hidden-size=5"], "--hidden-size is not a known setting; did you mean --model.hidden_size?"),
        (["--every", "5"], "--every is not a known setting; did you mean --checkpoint.every?"),
        (["--rundir", "x"], "--rundir is not a known setting; did you mean --run_dir?"),
        (["--train.zebra", "5"], "--train.zebra is not a known setting."),
        (["-x"], "-x is not a known setting."),
        (["--train.st", "5"], "--train.st is not a known setting."),
        (["one", "two"], "'one two' is more than this command takes."),
        (["--train.steps"], "argument --train.steps: expected one argument."),
        (["--train.steps", "many"], "--train.steps = 'many' must be a whole number."),
        (["--train.steps", "5.0"], "--train.steps = '5.0' must be a whole number."),
        (["--train.steps", "none"], "--train.steps = 'none' must be a whole number."),
        (["--train.steps="], "--train.steps = '' must be a whole number."),
        (["--train.steps=a\nb"], "--train.steps = 'a\\nb' must be a whole number."),
        (["--train.steps=0"], "train.steps = 0 must be greater than 0."),
        (["--train.learning-rate", "fast"], "--train.learning_rate = 'fast' must be a number."),
        (["--train.learning-rate", "nan"], "--train.learning_rate = nan must be a finite number."),
        (["--train.tensorboard", "yes"], "--train.tensorboard = 'yes' must be true or false."),
        (["--train.decay", "step"], "--train.decay = 'step' must be one of 'cosine', 'linear', 'wsd'."),
        (["--model.head_dim", "x"], "--model.head_dim = 'x' must be a whole number."),
        (["--run-dir", "\udcff"], r"--run_dir = '\udcff' must be valid UTF-8."),
        (["--sample.prompts", "hi"], "--sample.prompts = 'hi' must be written as in TOML: [\"TEXT\", ...]."),
        (["--sample.prompts", '"hi"'], "--sample.prompts = 'hi' must be a list."),
        (["--sample.prompts", "[1]"], "--sample.prompts[0] = 1 must be a string."),
        (["--sample.prompts", "[]\nx=1"], "--sample.prompts = '[]\\nx=1' must be written as in TOML: "
         '["TEXT", ...].'),
        (["--data.sources", "x.txt"], "--data.sources = 'x.txt' must be written as in TOML: "
         "[{KEY = VALUE, ...}, ...]."),
        (["--data.sources", "[]"], "data.sources is empty: name at least one source."),
        (["--data.sources", "[{epochs=1}]"], "--data.sources[0] lacks path."),
        (["--model.rope_scaling", "4"], "--model.rope_scaling = 4 must be a table."),
        (["--model.rope_scaling", "{faktor=4}"], "--model.rope_scaling.faktor is not a known setting; "
         "did you mean --model.rope_scaling.factor?"),
    ],
)  # fmt: skip
def test_refusal(config_file, argv, message):
    assert refusal(config_file, *argv) == message


def test_a_table_in_the_file_that_is_none(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("train = 3\n", "utf-8")
    assert refusal(path, "--train.steps", "5") == "train = 3 must be a table."
    path.write_text("[model]\nrope_scaling = 3\n", "utf-8")
    assert refusal(path, "--model.rope_scaling.factor", "5") == "model.rope_scaling = 3 must be a table."


def test_unknown_settings_come_before_the_file():
    assert refusal("no.toml", "--train.step", "5").startswith("--train.step is not")
    assert refusal(default="no.toml") == "no config file no.toml."


@pytest.mark.parametrize("name", SETTINGS)
def test_a_letter_missing_from_any_setting_is_found(name):
    typo = missing_letter(name)
    # Without their first letters, plan.tp, plan.pp and plan.ep are one: any of them will do.
    meant = [other for other in SETTINGS if other == name or missing_letter(other) == typo]
    said = suggestion(f"--{typo}", [f"--{known}" for known in SETTINGS])
    assert said in [f"; did you mean --{other}?" for other in meant]


def missing_letter(name: str) -> str:
    section, dot, key = name.rpartition(".")
    return f"{section}{dot}{key[1:]}"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--hidden_size", "--model.hidden_size"),
        ("--gpu", "--plan.gpu"),
        ("--draft-tokens", "--sample.draft_tokens"),
        ("--modle.hidden_size", "--model.hidden_size"),
        ("--model.vison.hidden_size", "--model.vision.hidden_size"),
        ("--serve.gpu", "--serving.gpu"),
        ("--servin.draft_tokens", "--serving.draft_tokens"),
        ("--plan.dtyp", "--plan.dtype"),
        ("--serving.dtyp", "--serving.dtype"),
        ("--model.faktor", "--model.rope_scaling.factor"),
        ("--train.tp", "--plan.tp"),
    ],
)
def test_a_key_of_several_sections_is_found_in_the_nearest(typo, meant):
    assert suggestion(typo, [f"--{known}" for known in SETTINGS]) == f"; did you mean {meant}?"


# --help


def helped(capsys, *argv: str, **options) -> str:
    with pytest.raises(SystemExit) as stop:
        parse_run_config(list(argv), "A command at 100%.", **options)
    assert stop.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def all_docs() -> dict[str, str]:
    """The docstring of every option, found without `settings`."""
    docs = {name: doc for name, doc in field_docs(RunConfig).items() if name in ("run_dir", "draft")}
    for section in dataclasses.fields(RunConfig)[2:]:
        docs |= {f"{section.name}.{name}": doc for name, doc in field_docs(section.type).items()}
    tables = {"rope_scaling": RopeScaling, "mla": LatentAttention, "mamba": Mamba, "vision": VisionEncoder}
    for table, cls in tables.items():
        docs |= {f"model.{table}.{name}": doc for name, doc in field_docs(cls).items()}
    docs |= {f"data.quality.{name}": doc for name, doc in field_docs(QualityConfig).items() if name != "rules"}
    return docs | {f"data.quality.rules.{name}": doc for name, doc in field_docs(QualityRules).items()}


def test_settings_are_all_fields():
    assert {name: setting.doc for name, setting in SETTINGS.items()} == all_docs()


@pytest.mark.usefixtures("wide")
def test_help_lists_every_setting_with_type_doc_and_default(capsys, config_file):
    text = squeezed(helped(capsys, str(config_file), "--help"))
    for name, setting in SETTINGS.items():
        assert squeezed(f"--{name} {cli.type_name(setting.kind)} {setting.doc}") in text, name
    for section in dataclasses.fields(RunConfig)[2:]:
        assert squeezed(f"{section.name}: {field_docs(RunConfig)[section.name]}") in text
    for key in field_docs(SourceConfig):
        assert f"{key}(" in text
    for shown in [
        "--train.steps INTEGER Optimizer steps of the whole run. (default 77)",
        "Width of the residual stream (d_model). (default 128)",
        "if not given. (default none)",
        "--model.vision.patch_size INTEGER Pixels on a side of a patch; an image has (image_size / patch_size)^2 "
        "tokens. (no default)",
        "Base of the rotary frequencies (Su et al. 2021). (default 10000.0)",
        "--train.decay cosine|linear|wsd Shape of the decay from the peak to the end; `wsd` stays at the peak",
        'and then falls as 1 - sqrt (Hu et al. 2024; Haegele et al. 2024). (default "cosine")',
        "Whether the output projection is the embedding itself. (default false)",
        r'continues in the report. (default ["def main(", "class ", "import os\n"])',
    ]:
        assert squeezed(shown) in text


@pytest.mark.usefixtures("wide")
def test_help_is_readable(capsys, config_file):
    text = helped(capsys, str(config_file), "-h")
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("usage: ")
    assert "A command at 100%." in text
    starts = [text.index(f"\n{section}:\n") for section in ("run", "model", "data", "train", "checkpoint", "sample")]
    assert starts == sorted(starts)


def test_help_shows_the_tables_of_the_file(capsys, tmp_path):
    path = tmp_path / "run.toml"
    data = DataConfig(sources=(SourceConfig("100% é.txt"),))
    path.write_text(to_toml(RunConfig(data=data, model=ModelConfig(rope_scaling=RopeScaling(factor=2.5)))), "utf-8")
    text = squeezed(helped(capsys, "--help", str(path)))
    assert squeezed('(default [{ path = "100% é.txt", epochs = 1.0') in text
    assert squeezed("How many times longer the context becomes. (default 2.5)") in text


@pytest.mark.parametrize("content", [None, "steps =", "[train]\nsteps = 'many'"])
def test_help_works_without_a_good_file(capsys, tmp_path, content):
    path = tmp_path / "run.toml"
    if content:
        path.write_text(content, "utf-8")
    text = helped(capsys, "--help", default=path)
    assert "(default 600)" in text
    assert "The defaults above are those without a config file: " in text


def test_help_lists_the_command_s_own_options(capsys, config_file):
    def extra(parser):
        parser.add_argument("--dry-run", action="store_true", help="stop early")

    text = helped(capsys, str(config_file), "--help", extra=extra)
    assert "--dry-run\n      stop early" in text
    assert text.index("--dry-run") < text.index("\nrun:")


@dataclasses.dataclass
class Documented:
    """Not a field."""

    one: int = 1
    """One
    line: 100% `ok`."""
    undocumented: int = 2
    two: str = "not a doc"
    """Two."""

    def three(self):
        """Not a field."""


def test_field_docs():
    assert field_docs(Documented) == {"one": "One line: 100% `ok`.", "two": "Two."}


@pytest.mark.usefixtures("wide")
def test_percent_in_a_docstring(capsys, monkeypatch, config_file):
    odd = cli.Setting("train.steps", int, 1, "Half: 50%, %(prog)s %s %d.")
    monkeypatch.setattr(cli, "settings", lambda: iter([odd]))
    assert "Half: 50%, %(prog)s %s %d. (default 77)" in helped(capsys, str(config_file), "--help")
