import json
import math
from types import SimpleNamespace

import pytest

from moe_lm.config import ConfigError
from moe_lm.scaling.constants import EFFICIENCY, FITTED, MODEL_ERROR
from moe_lm.scaling.counts import train_flops_per_token
from moe_lm.scaling.published import DecodeRun, TrainingRun, customary_flops, published
from moe_lm.scaling.validate import (
    BARS,
    Case,
    Search,
    decode_case,
    evaluate,
    to_json,
    training_case,
    validate,
    validation_table,
)
from moe_lm.toml import from_value


@pytest.fixture(scope="module")
def found():
    return validate(*published())


def test_every_published_run_has_a_source_and_a_plan():
    training, decode = published()
    assert len(training) >= 30
    assert len(decode) >= 30
    assert len({run.name for run in training}) == len(training)
    for run in (*training, *decode):
        assert run.source
        assert run.family
        assert run.measured > 0
        assert run.machine().sheet.name
    for run in training:
        layout = run.layout()[1]
        assert layout.batch_tokens == run.batch * run.sequence_length
        assert layout.dp * run.tp * run.pp == run.gpus
    for run in decode:
        assert run.plan()[1].batch == run.batch


def test_a_quantity_is_what_the_step_time_gives():
    """A measurement and the step time it stands for are one: from_step inverts each definition."""
    seen = set()
    for run in published()[0]:
        tokens = run.batch * run.sequence_length
        model = run.layout()[0]
        seconds = {
            "step_seconds": lambda r: r.measured,
            "tokens_per_s_per_gpu": lambda r, tokens=tokens: tokens / r.measured / r.gpus,
            "gpu_hours": lambda r, tokens=tokens: r.measured * 3600 / r.gpus / r.tokens * tokens,
        }.get(run.quantity, lambda r, tokens=tokens, model=model: (
            tokens * customary_flops(model, r.sequence_length, r.quantity) / r.gpus / r.measured / 1e12
        ))(run)  # fmt: skip
        assert run.from_step(seconds) == pytest.approx(run.measured)
        useful = train_flops_per_token(model, run.sequence_length) * tokens / seconds / run.gpus
        assert 0.005 < useful / run.machine().sheet.peak("bfloat16") < 0.9, run.name  # no unit was mistaken
        seen.add(run.quantity)
    assert len(seen) == 5


def test_customary_flops_are_those_of_the_megatron_paper():
    """Narayanan et al. 2021, equation 3: 96 B s l h^2 (1 + s / 6h + V / 16lh)."""
    run = next(run for run in published()[0] if run.name == "Megatron-LM 1T")
    s, layers, h, vocabulary = 2048, 128, 25600, 51200
    expected = 96 * layers * h**2 * (1 + s / (6 * h) + vocabulary / (16 * layers * h))
    model = run.layout()[0]
    assert customary_flops(model, s, "hardware_tflops_per_gpu") == pytest.approx(expected, rel=1e-3)
    expected = 72 * layers * h**2 * (1 + s / (6 * h) + vocabulary / (12 * layers * h))
    assert customary_flops(model, s, "model_tflops_per_gpu") == pytest.approx(expected, rel=1e-3)


def test_what_a_source_says_of_its_machine_replaces_the_sheet():
    runs = {run.family: run for run in published()[0]}
    assert runs["bloom"].machine().sheet.network < runs["megatron-2021"].machine().sheet.network
    assert runs["torchtitan-h100"].machine().sheet.bandwidth == 2.4e12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": ""}, "lacks a source"),
        ({"step_seconds": 1.0}, "2 quantities"),
        ({"config": "llama-2-7b"}, "either a config or a model"),
        ({"hidden": 4}, "hidden is not a known setting"),
        ({"gpu_hours": 1.0, "tokens_per_s_per_gpu": None}, "go together"),
    ],
)
def test_an_incomplete_entry_is_refused(change, message):
    entry = {
        "name": "x", "family": "f", "source": "s", "verified": True, "gpu": "h100", "model": {}, "sequence_length": 64,
        "gpus": 1, "tp": 1, "pp": 1, "interleave": 1, "ep": 1, "zero": 0, "batch": 1, "micro_batch": 1,
        "recompute": "none", "flash_attention": True, "sequence_parallel": False, "dtype": "bfloat16",
        "tokens_per_s_per_gpu": 1.0,
    }  # fmt: skip
    from_value(TrainingRun, entry, "x")
    entry = {key: value for key, value in {**entry, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        from_value(TrainingRun, entry, "x")


def test_a_rate_with_its_prompts_needs_their_length():
    entry = {
        "name": "x", "family": "f", "source": "s", "verified": True, "gpu": "h100", "model": {}, "tp": 1, "ep": 1,
        "batch": 1, "context": 64, "weight_bits": 16, "kv_bits": 16, "weight_only": False, "tokens_per_s": 1.0,
        "engine": "e", "includes_prefill": True,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="prompt_tokens and output_tokens"):
        from_value(DecodeRun, entry, "x")


def made_up(families: dict[str, float], *, gemm: float, kind: str = "a100") -> list[Case]:
    """Three runs of each family, whose time is work / gemm; each family measured so many times longer."""
    cases = []
    for family, slower in families.items():
        for n in range(3):
            work, share = 1.0 + n, 0.1 * (n + 1)
            measured = slower * (work / gemm + share)
            run = SimpleNamespace(name=f"{family} {n}", family=family, quantity="step_seconds", unit="s", source=family,
                                  measured=measured, comparable=True, gpu=kind, verified=True)  # fmt: skip
            cases.append(Case("training", run, kind, lambda r, work=work, share=share: work / r.gemm + share))
    return cases


def test_a_fit_finds_the_constant_that_made_the_times():
    start = EFFICIENCY["a100"].gemm
    for true in (start * 0.8, start * 1.2):
        cases = made_up({"a": 1.0, "b": 1.0}, gemm=true)
        found = Search(cases, ["gemm"]).fit(range(len(cases)))
        assert found.gemm == pytest.approx(true, rel=0.04)
        assert found._replace(gemm=start) == EFFICIENCY["a100"]


def test_a_share_never_passes_one():
    cases = made_up({"a": 0.2}, gemm=1.0)
    assert Search(cases, ["gemm"]).fit(range(3)).gemm <= 1


def test_a_poisoned_family_changes_no_prediction_of_its_own():
    """Left out, a family is predicted with constants that it had no part in; it does change those of the others."""
    gemm = EFFICIENCY["a100"].gemm * 0.9
    clean = evaluate(made_up({"a": 1.0, "b": 1.0, "c": 1.0}, gemm=gemm), 0.0)
    dirty = evaluate(made_up({"a": 1.0, "b": 1.0, "c": 1.3}, gemm=gemm), 0.0)
    for before, after in zip(clean.rows, dirty.rows, strict=True):
        if after.run.family == "c":
            assert after.left_out == before.left_out
            assert after.left_out_error == pytest.approx(1 - 1 / 1.3, abs=0.03)
        else:
            assert after.left_out_error < 0.2
    assert clean.errors("training", True).median < 0.02
    assert clean.passes("training")
    assert not evaluate(made_up({"a": 1.0, "b": 1.5, "c": 0.6}, gemm=gemm), 0.0).passes("training")


def test_what_is_not_comparable_is_fitted_on_by_nothing_and_in_no_median():
    gemm = EFFICIENCY["a100"].gemm * 0.9
    cases = made_up({"a": 1.0, "b": 1.0, "bound": 2.0}, gemm=gemm)
    for case in cases:
        case.run.comparable = case.run.family != "bound"
    found = evaluate(cases, 0.0)
    assert found.errors("training", True).runs == 6
    assert found.errors("training", True).median < 0.02
    assert found.errors("training", True, "bound") is None
    assert [row.left_out is not None for row in found.rows] == [True] * 9


def test_a_family_alone_on_its_gpu_has_no_unfitted_prediction():
    found = evaluate(made_up({"a": 1.0}, gemm=0.7, kind="h100"), 0.0)
    assert all(row.left_out is None for row in found.rows)
    assert not found.passes("training")


def test_predictions_follow_the_constants():
    training, decode = published()
    reached = EFFICIENCY["a100"]
    step = training_case(next(run for run in training if run.name == "Megatron-LM 2022 175B selective recomputation"))
    assert step.predict(reached._replace(gemm=reached.gemm / 2)) > 1.3 * step.predict(reached)
    rate = decode_case(next(run for run in decode if run.name == "gpt-fast Llama-2-7B bf16, 1 x A100, batch 1"))
    assert rate.predict(reached._replace(bandwidth=reached.bandwidth / 2)) < 0.7 * rate.predict(reached)


def test_published_runs_are_predicted_within_the_bars(found):
    for sort, bar in BARS.items():
        assert found.errors(sort, left_out=True).median <= bar, sort
        assert found.passes(sort)


def test_the_error_that_plans_state_is_the_one_found(found):
    for sort, stated in MODEL_ERROR.items():
        assert found.errors(sort, left_out=True).high == pytest.approx(stated, abs=0.02)


def test_refitted_constants_stay_near_and_others_do_not_move(found):
    for (sort, kind, _), reached in found.refitted.items():
        for name, value in reached._asdict().items():
            before = getattr(EFFICIENCY[kind], name)
            if name in FITTED.get(sort, ()):
                assert abs(math.log(value / before)) < 0.4
            else:
                assert value == before


def test_the_table_has_every_run_with_its_source(found):
    text = validation_table(found)
    assert "bar 15%" in text
    assert "bar 25%" in text
    for row in found.rows:
        assert row.run.name[:48] in text
        assert row.run.source in text
    data = json.loads(json.dumps(to_json(found)))
    assert len(data["runs"]) == len(found.rows)
    assert data["sorts"]["training"]["left_out"]["median"] == found.errors("training", True).median
