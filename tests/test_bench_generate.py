"""The benchmark of generation: limits and counts by hand, who is timed how, the table, refusals, and one short run."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hub_models import SMALL, random_model
from test_architecture import ROOT

from moe_lm.bench import contest, generate, limits, machine, peers, throughput, throughput_table, workload
from moe_lm.bench.throughput import CannotMeasure, EngineContender, Timeline
from moe_lm.bench.workload import CASES, QUICK_CASES, SHAPES, Workload
from moe_lm.checkpoint import save_hf
from moe_lm.config import ConfigError, ModelConfig
from moe_lm.data.tokenizer import train_tokenizer
from moe_lm.engine import Output, Stats
from moe_lm.model import Transformer
from moe_lm.scaling.counts import parameters

pytestmark = pytest.mark.usefixtures("one_thread")

HAND = ModelConfig(
    vocab_size=10, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=2, num_local_experts=4, num_experts_per_tok=2,
)  # fmt: skip
# A layer: queries, keys, values (2 + 1 + 1) 2 x 4 = 32, output 4 x 4 = 16, router 4 x 4 = 16, an expert 3 x 4 x 6 = 72.
HAND_FIXED = 2 * (32 + 16 + 16) + 10 * 4


@pytest.mark.parametrize("experts", [2, 2.5, 4])
def test_bytes_of_a_step_by_hand(experts):
    assert limits.step_bytes(HAND, 2, experts) == 2 * (HAND_FIXED + 2 * experts * 72)


@pytest.mark.parametrize("kind", [*SMALL, "mixed"])
def test_bytes_of_a_step_with_every_expert_are_those_of_the_model(kind):
    mixed = {"first_k_dense_replace": 1, "moe_intermediate_size": 8, "n_shared_experts": 1}
    config = SMALL[kind] if kind in SMALL else dataclasses.replace(SMALL["mixture"], **mixed)
    model = Transformer(config)
    weights = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and name != "embed_tokens"}
    assert limits.step_bytes(config, 4, config.num_local_experts) == 4 * sum(weights.values())


def test_expected_experts_are_the_mean_over_all_choices():
    choices = [set(pair) for pair in itertools.combinations(range(4), 2)]
    for tokens in (1, 2, 3):
        unions = [len(set().union(*chosen)) for chosen in itertools.product(choices, repeat=tokens)]
        assert limits.expected_experts(HAND, tokens) == pytest.approx(sum(unions) / len(unions))
    assert limits.expected_experts(SMALL["dense"], 5) == 0


def test_limits_by_hand():
    active = 2 * (HAND_FIXED + 2 * 2 * 72)
    assert limits.decode_limit(HAND, 2, 3, 2, 1000.0) == 3 * 1000.0 / active
    # Two FLOPs per weight but those of the projection, 4 L H C for each of (1 + 2 + 3) keys, and one projection.
    flops = 2 * 3 * (2 * (32 + 16 + 16) + 2 * 2 * 72) + 4 * 2 * 2 * 2 * 6 + 2 * 40
    assert limits.prefill_flops(HAND, 3) == flops
    assert limits.prefill_limit(HAND, 3, 500.0) == pytest.approx(3 * 500.0 / flops)
    # Outputs of 1 and 3: a step for the second token and one for the third, both of one request.
    work = Workload([[1, 2, 3], [4, 5, 6]], [1, 3])
    seconds = 2 * flops / 500 + 2 * active / 1000
    assert limits.trace_limit(HAND, 2, work, 1000.0, 500.0) == pytest.approx(4 / seconds)
    both = limits.step_bytes(HAND, 2, 3) / 1000 + active / 1000  # two tokens choose 3 of 4 experts
    work = Workload([[1, 2, 3], [4, 5, 6]], [2, 3])
    assert limits.trace_limit(HAND, 2, work, 1000.0, 500.0) == pytest.approx(5 / (2 * flops / 500 + both))


def test_shapes_and_cases_are_the_documented_ones():
    assert [round(parameters(config).total / 1e6) for config in SHAPES.values()] == [30, 215, 1101]
    assert [(case.name, case.batch) for case in CASES] == [
        ("prefill", 1), ("decode", 1), ("decode", 4), ("decode", 16), ("trace", 32),
    ]  # fmt: skip
    assert CASES[0].lengths() == [(512, 1)]
    assert set(CASES[2].lengths()) == {(32, 128)}
    prompts, outputs = zip(*CASES[-1].lengths(), strict=True)
    assert 16 <= min(prompts) < 60 < 200 < max(prompts) <= 256
    assert 16 <= min(outputs) < 32 < 110 < max(outputs) <= 128


@pytest.mark.parametrize("case", CASES + QUICK_CASES, ids=lambda case: f"{case.name} {case.batch}")
def test_every_turn_asks_for_the_same_lengths_with_other_prompts(case):
    text = workload.random_text(8192)
    first, again, other = (case.workload(text, turn) for turn in (0, 0, 1))
    assert first == again
    assert first.outputs == other.outputs
    assert list(map(len, first.prompts)) == list(map(len, other.prompts))
    beginnings = [tuple(prompt[:4]) for prompt in first.prompts + other.prompts]
    assert len(set(beginnings)) == len(beginnings)


def test_a_trained_model_reads_source_text():
    text = workload.stdlib_text(tokenizer := train_tokenizer(("def",), 257))
    assert len(text) >= workload.TEXT_TOKENS
    assert "def " in tokenizer.decode(text)


class Script:
    """An engine that gives out what it was told to, and takes a second for each step."""

    def __init__(self, clock, steps):
        self.clock, self.steps, self.resets = clock, list(steps), 0
        self.stats = Stats()
        self.asked = []

    def add(self, prompt, params):
        self.asked.append((prompt, params))
        return f"r{len(self.asked) - 1}"

    @property
    def has_work(self):
        return bool(self.steps)

    def step(self):
        self.clock.now += 1
        self.stats.steps += 1
        return [Output(name, 0, tokens=[7] * n) for name, n in self.steps.pop(0).items()]

    def reset_stats(self):
        self.stats = Stats()


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_decoding_is_timed_from_the_moment_when_every_request_has_a_token(clock):
    engine = Script(clock, [{"r0": 1}, {"r0": 2, "r1": 1}, {"r0": 1, "r1": 2}, {"r1": 3}])
    contender = EngineContender(engine, "ngram")
    served = contender(Workload([[1, 2], [3]], [4, 6]))
    assert served == Timeline(prompt_tokens=3, first_tokens=4, first_seconds=2, tokens=10, seconds=4)
    assert (served.rate("prefill"), served.rate("decode"), served.rate("trace")) == (3 / 2, 6 / 2, 10 / 4)
    prompt, params = engine.asked[1]
    assert (prompt, params.max_tokens, params.temperature, params.ignore_eos) == ([3], 6, 0, True)
    assert params.speculation == "ngram"
    engine.stats.steps += 5
    assert [each.steps for each in contender.stats] == [2]  # neither the first two nor those of others


def test_a_failed_request_is_no_measurement(clock):
    engine = Script(clock, [{"r0": 1}, {"r1": 1}])
    step, aborted = engine.step, []
    engine.step = lambda: step() and [Output("r0", 0, finish_reason="error", error="logits are not finite.")]
    engine.abort = aborted.append
    with pytest.raises(CannotMeasure, match="logits are not finite"):
        EngineContender(engine, "none")(Workload([[1], [2]], [1, 1]))
    assert aborted == ["r0", "r1"]
    assert not engine.has_work
    with pytest.raises(AssertionError, match="more or fewer"):
        EngineContender(Script(clock, [{"r0": 1}]), "none")(Workload([[1]], [2]))


def test_contenders_take_turns_on_the_same_requests():
    calls = []

    def contender(name):
        return lambda work: calls.append((name, work)) or name

    case = QUICK_CASES[-1]
    rates = throughput.alternate(case, {"a": contender("a"), "b": contender("b")}, list(range(999)), 3)
    assert [name for name, _ in calls] == ["a", "b", "b", "a", "a", "b"]
    assert [work for _, work in calls[::2]] == [work for _, work in calls[1::2]]
    assert rates == {"a": ["a"] * 3, "b": ["b"] * 3}


def test_ratios_are_of_each_turn_and_the_fastest_setting_is_the_peer():
    # A machine that is twice as slow in every other turn: the ratio of medians would be 2 or 1/2 by chance.
    ours, theirs = [100.0, 50.0, 100.0, 50.0, 100.0], [50.0, 25.0, 50.0, 25.0, 25.0]
    assert throughput.ratio(ours, theirs) == 2
    assert throughput.spread([90.0, 100.0, 130.0]) == pytest.approx((-0.05, 0.15))
    assert throughput.spread([90.0]) == (0, 0)
    line = throughput.record(CASES[1], "tiny", "none", ours, [200.0, 100.0] * 2 + [400.0])
    assert (line["tokens_per_s"], line["fraction"], line["peer"], line["ratio"]) == (100, 0.5, None, None)
    beside = throughput.with_peer(line, [30.0] * 3, {"default": [10.0] * 3, "eager experts": [20.0, 5.0, 15.0]})
    assert (beside["peer"], beside["ratio"], beside["peer_setting"]) == (15, 2, "eager experts")
    assert (beside["peer_default"], beside["ratio_to_default"]) == (10, 3)
    assert throughput.with_peer(line, ours, {"default": [9.0] * 5, "slower": [8.0] * 5})["peer"] == 9


def test_counters_are_summed_before_they_are_divided():
    stats = [
        Stats(steps=1, experts=8, decodes=1, decoded=1, seconds={"schedule": 1.0, "forward": 3.0}),
        Stats(steps=3, experts=12, decodes=3, decoded=9, seconds={"schedule": 0.0, "forward": 4.0}),
    ]
    stats[1].proposed_at, stats[1].accepted_at = {"ngram": [6, 2]}, {"ngram": [5, 1]}
    assert throughput.distinct_experts(stats, layers=2) == 20 / 8
    assert throughput.phase_shares(stats) == {"schedule": 1 / 8, "forward": 7 / 8}
    assert throughput.speculation_facts(stats) == {"acceptance": 6 / 8, "tokens_per_step": 10 / 4}
    assert throughput.speculation_facts([Stats()]) == {"acceptance": None, "tokens_per_step": None}


def test_the_table_has_a_column_for_each_figure():
    line = throughput.record(CASES[3], "small", "none", [1234.0, 1234.0], [2468.0] * 2) | {"overhead": 0.07}
    line = throughput.with_peer(line, [1234.0], {"default": [99.5]})
    faster = line | {"name": "decode, draft", "ratio_to_plain": 1.5, "acceptance": 0.61, "tokens_per_step": 2.4}
    shown = throughput_table.columns(speculation=True, peer=True)
    lines = [throughput_table.header(shown), *(throughput_table.row(shown, each) for each in (line, faster))]
    figures = "1,234 +0% +0% 2,468 50% 7%"
    peer = "99.5 12.40x 99.5 12.40x default"
    assert " ".join(lines[1].split()) == f"decode 16 {figures} {peer}"
    assert " ".join(lines[2].split()) == f"decode, draft 16 {figures} 1.50x 61% 2.40 {peer}"
    assert [text.index("16") for text in lines[1:]] == [lines[0].index("batch") + 3] * 2
    assert [text.index("50%") + 3 for text in lines[1:]] == [lines[0].index("of limit") + 8] * 2
    plain = throughput_table.columns(speculation=False, peer=False)
    assert throughput_table.header(plain).split()[-1] == "overhead"
    assert "transformers 5.0" in throughput_table.legend(False, ("transformers", "5.0"))


REFUSALS = {
    "": "nothing to measure: name a MODEL or a --shape",
    "runs/x --shape tiny": "runs/x and --shape tiny exclude each other",
    "--shape huge": "invalid choice: 'huge'",
    "--shape tiny --turns 0": "--turns 0 must be at least 1",
    "--shape tiny --speculation staged": "--speculation staged needs a draft model",
    "--shape tiny --speculation ngram --draft d": "--draft d means nothing with --speculation ngram",
    "--shape tiny --draft-tokens 3": "--draft-tokens 3 means nothing without",
    "--shape tiny --against vllm": "invalid choice: 'vllm'",
    "--shape tiny --device tpu": "device = 'tpu' is not a device",
    "--shape tiny --batch 3": "--batch is not a known setting",
    "nowhere/at/all": "there is no directory nowhere/at/all",
}


@pytest.fixture
def rates(monkeypatch):
    """Round figures for the machine, and threads that stay where they are."""
    tuned = []
    monkeypatch.setattr("kernels.cpu.process.tune_process", lambda: tuned.append(True))
    monkeypatch.setattr(machine, "gemm_rate", functools.cache(lambda device, dtype: 1e12))
    monkeypatch.setattr(machine, "read_bandwidth", functools.cache(lambda device: 1e10))
    return tuned


@pytest.mark.parametrize("argv", REFUSALS)
def test_refusals(argv, rates):
    with pytest.raises(ConfigError) as error:
        generate.main(argv.split())
    assert REFUSALS[argv] in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_peer_that_is_not_installed_is_refused_before_anything_is_opened(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs that package, which is not installed: pip install transformers"):
        generate.main(["--shape", "base", "--against", "transformers"])


def test_a_draft_with_another_tokenizer_is_refused(saved, tmp_path, rates):
    save_hf(tmp_path, random_model(SMALL["dense"]), train_tokenizer(("abab abab",), 258))
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        generate.main([str(saved / "mixture"), "--draft", str(tmp_path), "--quick"])


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["generate", "--shape", "tiny", "--turns", "0"], 2, "--turns 0 must be at least 1."),
        (["knit"], 2, "argument NAME: invalid choice: 'knit'"),
        ([], 2, "the following arguments are required: NAME."),
    ],
)
def test_benchmarks_go_by_one_name(argv, status, said):
    done = subprocess.run(
        [sys.executable, "-m", "moe_lm.bench", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


KEYS = {"name", "shape", "batch", "tokens_per_s", "limit", "fraction", "peer", "ratio"}


def test_a_run_from_end_to_end(saved, rates, capsys):
    """With speculation and a peer, in float32, of a model directory."""
    path = str(saved / "mixture")
    generate.main([path, "--against", "transformers", "--draft", path, "--draft-tokens", "2", "--quick", "--json",
                   "--turns", "2", "--dtype", "float32"])  # fmt: skip
    assert rates == [True]
    out, table = capsys.readouterr()
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    cases = found["cases"]
    names = [(case.name, case.batch) for case in QUICK_CASES]
    assert [(line["name"], line["batch"]) for line in cases] == [
        (name + with_draft, batch) for name, batch in names for with_draft in ("", ", draft")
    ]
    config = SMALL["mixture"]
    for line in cases:
        assert line.keys() >= KEYS
        assert line["shape"] == path
        assert line["turns"] == 2
        assert line["tokens_per_s"] > 0
        assert line["fraction"] == pytest.approx(line["tokens_per_s"] / line["limit"])
        assert line["peer"] >= line["peer_default"] * 0.999
        assert line["ratio"] > 0
        assert f"{line['name']:16}  {line['batch']:5}" in table
    prefill, alone, drafted = cases[0], cases[2], cases[3]
    assert prefill["limit"] == limits.prefill_limit(config, 24, 1e12)
    assert alone["distinct_experts"] == 2  # top-2 of one token
    assert alone["limit"] == limits.decode_limit(config, 4, 1, 2, 1e10)
    assert sum(alone["phases"].values()) == pytest.approx(1)
    assert alone["overhead"] == alone["phases"]["schedule"] + alone["phases"]["sample"]
    assert drafted["limit"] == alone["limit"]
    assert drafted["acceptance"] in (1, None)  # the model is its own draft; it may be found to be too slow
    assert drafted["ratio_to_plain"] > 0
    assert 2 <= cases[4]["distinct_experts"] <= 4
    assert found["not_measured"] == []
    assert found["machine"]["dtype"] == "float32"
    assert found["machine"]["transformers"]
    assert set(found["warm_up_s"]) == {"engine", "engine, draft", "transformers"}


def test_a_shape_runs_with_the_table_first_and_the_json_last(rates, capsys):
    generate.main(["--shape", "tiny", "--quick", "--turns", "1", "--speculation", "ngram"])
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert [line["name"] for line in found["cases"]][:4] == ["prefill", "prefill, ngram", "decode", "decode, ngram"]
    assert all(line["peer"] is None and line["ratio"] is None for line in found["cases"])
    assert any(line.startswith("case") for line in table)
    assert any(line.startswith("warm-up: engine ") for line in table)


def test_the_machine_takes_its_turns(saved, rates, monkeypatch, capsys):
    """Its rates are measured anew in every turn of what they limit, and a line's limit is the median over its turns."""
    measured = []
    monkeypatch.setattr(
        machine,
        "read_bandwidth",
        functools.cache(lambda device: measured.append(1e9 * 2 ** len(measured)) or measured[-1]),
    )
    generate.main([str(saved / "mixture"), "--quick", "--turns", "3", "--dtype", "float32"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(measured) == 1 + 3 * 3  # at the start, and in the two cases of decoding and the trace
    alone = found["cases"][1]
    assert alone["limit"] == limits.decode_limit(SMALL["mixture"], 4, 1, 2, 4e9)  # of turns with 2, 4 and 8 GB/s
    assert found["machine"]["gemm_flops_per_s"] == 1e12


def test_what_does_not_fit_the_context_is_said(saved, rates, capsys):
    generate.main([str(saved / "dense"), "--turns", "1"])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["cases"] == []
    assert len(found["not_measured"]) == len(CASES)
    sentence = "its longest request takes 384 positions, and the context holds 64."
    assert f"trace at batch 32 is not measured: {sentence}" in out


def test_a_model_that_fails_is_said(tmp_path, tokenizer, rates, capsys):
    model = random_model(SMALL["dense"])
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    save_hf(tmp_path, model, tokenizer)
    generate.main([str(tmp_path), "--quick", "--turns", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["cases"] == []
    assert [note.partition(" is not measured: a request failed: ")[0] for note in found["not_measured"]] == [
        "prefill at batch 1", "decode at batch 1", "decode at batch 2", "trace at batch 4",
    ]  # fmt: skip
    assert "not finite" in found["not_measured"][0]


def test_random_routers_choose_by_token():
    model = contest.random_model("tiny", torch.device("cpu"), torch.float32)
    x = torch.nn.functional.rms_norm(torch.randn(512, 256), (256,))
    logits = model.layers[2].mlp.gate(x)
    assert 1.8 < logits.std() < 2.2
    assert len(logits.argmax(1).unique()) == 16


def test_a_case_without_its_peer_is_said_and_ours_is_measured(saved, rates, monkeypatch, capsys):
    monkeypatch.setattr(peers.TransformersPeer, "trials", lambda self, *_: self.failures.update(default="Oh: no") or {})
    generate.main([str(saved / "dense"), "--against", "transformers", "--quick", "--turns", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(line["peer"] is None and line["tokens_per_s"] > 0 for line in found["cases"])
    assert (
        "decode at batch 2 has no peer: transformers cannot do it with its default setting: Oh: no"
        in found["not_measured"]
    )
