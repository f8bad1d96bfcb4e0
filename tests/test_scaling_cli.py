"""python -m moe_lm.scaling: what it prints, in text and JSON, without torch; and what it says of what cannot be."""

import json
import os
import re
import subprocess
import sys

import pytest
from test_architecture import ROOT

from moe_lm.config import ConfigError
from moe_lm.scaling.__main__ import main
from moe_lm.scaling.configs import CONFIGS, config_path, run_of
from moe_lm.scaling.counts import parameters
from moe_lm.scaling.hardware import hardware_names, load_hardware, machine, read_sheet
from moe_lm.scaling.text import dollars, duration, short, size

NAMES = sorted(path.stem for path in CONFIGS.glob("*.toml"))


def told(capsys, *argv: str) -> dict:
    assert not main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        main(list(argv))
    (line,) = str(error.value).splitlines()
    return line


def test_a_plan_loads_neither_torch_nor_numpy():
    code = """
import sys
from moe_lm.scaling.__main__ import main
main(["gpt4-1.8t", "--gpu", "a100-80", "h100", "--json"])
main(["--facts"])
print(sorted({"torch", "numpy", "matplotlib", "kernels"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


@pytest.mark.parametrize(
    ("setting", "reason"),
    [("router_bias_update_rate = 0.001", "not counted"), ("expert_capacity_factor = 1.25", "computed all the same"),
     ("uniform_routing = True", "set plan.expert_imbalance = 1")],
)  # fmt: skip
def test_a_setting_that_leaves_the_plan_as_it_is_says_so(setting, reason, capsys):
    name, _, value = setting.partition(" = ")
    main(["nano"])
    plain = capsys.readouterr().out
    main(["nano", f"--model.{name}", value.lower()])
    [line] = set(capsys.readouterr().out.splitlines()) - set(plain.splitlines())
    assert line.startswith(f"model.{setting}: ")
    assert reason in line


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_planned(name, capsys):
    plan = told(capsys, name)
    counted = parameters(run_of(name).model)
    assert sum(plan["parameters"].values()) - plan["parameters"]["active_experts"] == counted.total
    (training,), (serving,) = plan["training"], plan["serving"]
    step = training["forecast"]["step"]
    assert sum(step["parts"].values()) == pytest.approx(step["seconds"])
    assert 0 < step["mfu"] < 1
    for key in ("seconds", "cost", "mfu"):
        told_of = training["forecast"][key]
        assert 0 < told_of["low"] <= told_of["mid"] <= told_of["high"]
    for figure in serving["forecast"]["figures"].values():
        assert 0 < figure["low"] <= figure["mid"] <= figure["high"]
    assert main([name]) is None
    text = capsys.readouterr().out
    assert text.startswith(f"{name}: {short(counted.total)} parameters, {short(counted.active)} active")
    assert f"training on {training['layout']['gpus']:,} x " in text


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("nano", "tiny", "small"))])
def test_layouts_that_come_with_the_project_fit(name, capsys):
    (training,), (serving,) = (told(capsys, name)[part] for part in ("training", "serving"))
    assert "and fits" in training["advice"]
    assert "and fits" in serving["advice"]


def test_several_gpus_side_by_side(capsys):
    plan = told(capsys, "mixtral-8x7b", "--gpu", "a100-80", "h100", "h200")
    names = [load_hardware(name).name for name in ("a100-80", "h100", "h200")]
    for part in ("training", "serving"):
        assert [answer["machine"]["sheet"]["name"] for answer in plan[part]] == names
    a100, h100, _ = (answer["forecast"]["step"]["seconds"] for answer in plan["training"])
    assert h100 < a100


def test_short_options_are_those_of_the_plan(capsys):
    short_form = told(capsys, "llama-2-70b", "--gpus", "256", "--tp", "8", "--pp", "4", "--zero", "1", "--recompute",
                      "full", "--interleave", "2", "--micro-batch", "1")  # fmt: skip
    long_form = told(
        capsys, "llama-2-70b", "--plan.gpus", "256", "--plan.tp", "8", "--plan.pp", "4", "--plan.zero", "1",
        "--plan.recompute", "full", "--plan.interleave", "2", "--plan.micro_batch", "1",
    )  # fmt: skip
    assert short_form == long_form
    layout = short_form["training"][0]["layout"]
    assert (layout["dp"], layout["plan"]["recompute"]) == (8, "full")


def test_replicas_stand_for_gpus(capsys):
    by_replicas = told(capsys, "llama-2-70b", "--tp", "8", "--pp", "2", "--dp", "4")
    assert by_replicas == told(capsys, "llama-2-70b", "--tp", "8", "--pp", "2", "--gpus", "64")
    assert "not allowed with" in refusal("llama-2-70b", "--dp", "4", "--gpus", "128")


def test_serving_has_its_own_layout(capsys):
    plan = told(capsys, "llama-2-70b", "--serving.tp", "4", "--serving.batch", "3")
    assert plan["serving"][0]["memory"]["batch"] == 3
    assert plan["serving"][0]["forecast"]["gpus"] == 4


def test_a_layout_that_does_not_fit_says_what_mends_it(capsys):
    assert (
        main(["llama-2-70b", "--gpus", "8", "--tp", "1", "--pp", "1", "--zero", "0", "--train.batch_tokens", "65536"])
        is None
    )
    text = capsys.readouterr().out
    assert re.search(r" GB more than the .*: plan\.\w+ = .* makes? it \d+\.\d GB\.", text)


def test_search_prints_the_fastest_first(capsys):
    assert main(["llama-2-7b", "--gpus", "64", "--search"]) is None
    text = capsys.readouterr().out
    assert "the fastest" in text.splitlines()[2]
    assert "slower: " in text.splitlines()[3]
    ((found,),) = [told(capsys, "llama-2-7b", "--gpus", "64", "--search")]
    rates = [layout["time"]["tokens_per_second"] for layout in found["layouts"]]
    assert rates == sorted(rates, reverse=True)


def test_sweep_prints_every_table(capsys):
    assert main(["gpt4-1.8t-serve", "--sweep"]) is None
    text = capsys.readouterr().out
    for title in ("decode", "latency against price", "key-value heads", "bits", "drafts of 4 tokens", "trained router"):
        assert title in text
    ((found,),) = [told(capsys, "gpt4-1.8t-serve", "--sweep")]
    mqa, mha = found["heads"]
    assert mha["cache_per_token"] == 120 * mqa["cache_per_token"]
    latencies = [point["per_token"] for point in found["frontier"]]
    prices = [point["price"] for point in found["frontier"]]
    assert latencies == sorted(latencies)
    assert prices == sorted(prices, reverse=True)
    plain, eight, *_ = found["bits"]
    assert eight["weight_bytes"] == pytest.approx(plain["weight_bytes"] / 2, rel=0.01)  # the router keeps its bits
    for rows in zip(*found["speculation"].values(), strict=True):
        speedups = [row["speedup"] for row in rows]
        assert speedups == sorted(speedups)
    (distinct, *_) = found["experts"]["128"]
    assert distinct["real"] < distinct["uniform"]
    assert told(capsys, "llama-2-7b", "--sweep")[0]["experts"] == {}


def test_check_builds_the_shards(capsys):
    assert main(["nano", "--tp", "2", "--ep", "4", "--check"]) == 0
    assert "tp 2 x pp 1 x ep 4" in capsys.readouterr().out


def test_names_and_paths_of_configs(tmp_path, monkeypatch):
    assert config_path("gpt4-1.8t") == CONFIGS / "gpt4-1.8t.toml"
    monkeypatch.chdir(tmp_path)
    assert config_path("nano") == CONFIGS / "nano.toml"
    (tmp_path / "mine.toml").write_text("[model]\nnum_hidden_layers = 2\n", "utf-8")
    assert run_of("mine.toml").model.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["gpt5"], "no config file gpt5"),
        (["nano", "--gpu", "a100-8O"], "'a100-8O' is no sheet of configs/hardware"),
        (["nano", "--gpu", "h100", "--measure"], "add --gpu cpu"),
        (["gpt4-1.8t", "--tp", "7"], "is not a multiple of plan.tp x plan.pp = 7 x 15"),
        (["mixtral-8x7b", "--ep", "3", "--gpus", "6"], "plan.ep = 3 does not divide model.num_local_experts = 8"),
        (["llama-2-7b", "--ep", "2", "--gpus", "2"], "plan.ep = 2 needs experts"),
        (["llama-2-7b", "--tp", "0"], "plan.tp = 0 must be greater than 0"),
        (["llama-2-7b", "--zero", "5"], "--plan.zero = '5' must be one of 0, 1, 2, 3"),
        (["llama-2-7b", "--recompute", "half"], "plan.recompute = 'half' must be one of"),
        (["llama-2-7b", "--pp", "33", "--gpus", "33"], "is more than model.num_hidden_layers = 32"),
        (["llama-2-7b", "--serving.tp", "5"], "serving.tp = 5 does not divide model.num_attention_heads = 32"),
        (["gpt4-1.8t", "--gpu", "a100-80", "--plan.dtype", "float8"], "float8 is not multiplied by A100"),
        (["--facts", "--gpu", "h100"], "--gpu is not a known setting"),
        (["--facts", "--validate"], "not allowed with"),
        (["nano", "--sarch"], "did you mean --search?"),
    ],
)
def test_refusals_name_the_value_and_the_knob(argv, said):
    assert said in refusal(*argv)


@pytest.mark.parametrize("name", hardware_names())
def test_every_figure_of_a_sheet_has_a_source(name):
    figures, sources = read_sheet(name)
    assert set(figures) - {"name", "family"} <= set(sources)
    assert all(len(source) > 10 and "to do" not in source for source in sources.values())
    assert machine(name).sheet.peak("bfloat16") > 0


def test_a_sheet_without_a_source_is_refused(tmp_path):
    text = (CONFIGS / "hardware" / "h100.toml").read_text("utf-8")
    (tmp_path / "mine.toml").write_text("\n".join(line for line in text.splitlines() if 'bandwidth = "' not in line))
    with pytest.raises(ConfigError, match="gives no source for bandwidth"):
        load_hardware(tmp_path / "mine.toml")


def test_units():
    assert [short(x) for x in (0.12345, 999, 1000, 7321344, 999_600_000, 1.81e12, 3.7e15)] == [
        "0.123", "999", "1k", "7.32M", "1B", "1.81T", "3,700T"]  # fmt: skip
    assert [size(x) for x in (10, 61440, 30.16e9, 999.7e9)] == ["10 B", "61.4 kB", "30.2 GB", "1000 GB"]
    assert [duration(x) for x in (1.2e-5, 0.295, 37.9, 600, 8000, 95 * 86400)] == [
        "12 us", "295 ms", "37.9 s", "10 min", "2.22 h", "95 days"]  # fmt: skip
    assert [dollars(x) for x in (0.00491, 0.25, 1500, 63e6, 2.5e9)] == ["$0.0049", "$0.25", "$1.5k", "$63M", "$2.5B"]
