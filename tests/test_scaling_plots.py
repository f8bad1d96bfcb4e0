import re
import struct
import sys
from types import SimpleNamespace

import pytest

from moe_lm.config import ConfigError, ModelConfig, RunConfig, ServingPlan
from moe_lm.scaling import page
from moe_lm.scaling import pictures as module
from moe_lm.scaling.counts import parameters
from moe_lm.scaling.frontier import FrontierPoint, SweepRow
from moe_lm.scaling.hardware import machine
from moe_lm.scaling.html import Tile
from moe_lm.scaling.laws import Point, fit
from moe_lm.scaling.memory import StageMemory
from moe_lm.scaling.operations import operations
from moe_lm.scaling.pictures import write_page, write_pictures, write_plots
from moe_lm.scaling.plan import make_plan
from moe_lm.scaling.plots import (
    apart,
    batch_plot,
    frontier_plot,
    law_plot,
    memory_plot,
    roofline_plot,
    unbeaten,
    validation_plot,
)
from moe_lm.scaling.published import published
from moe_lm.scaling.validate import Row, Validation

MODEL = ModelConfig(hidden_size=4096, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=32)


def memory(weights: float) -> StageMemory:
    return StageMemory(weights=weights, gradients=10e9, optimizer=5e9, activations=20e9, buffers=1e9, overhead=2e9,
                       limit=80e9)  # fmt: skip


def points() -> list[FrontierPoint]:
    """Two layouts of four batches; the second of each is beaten."""
    return [
        FrontierPoint(ServingPlan(tp=tp, batch=2**n), tp, 0.1, 0.01 * (n + 8 / tp), 100.0 * 2**n, 100.0 * 2**n / tp,
                      0.1 / 2**n if n != 1 else 0.2, n != 1 and tp == 8)
        for tp in (4, 8) for n in range(4)
    ]  # fmt: skip


def sweep() -> list[SweepRow]:
    return [
        SweepRow(batch, context, 0.01, 100.0 * batch / context**0.1, 1e9, 1e8, 0.1, "memory", batch * context < 1e5)
        for context in (2048, 8192) for batch in (1, 8, 64)
    ]  # fmt: skip


def validation() -> Validation:
    training, decode = published()
    rows = [Row("training", run, run.measured * 1.1, run.measured * 1.2) for run in training[:40]]
    rows += [Row("decode", run, run.measured * 0.9, run.measured * 0.7) for run in decode[:20]]
    return Validation(tuple(rows), {}, 1.0)


def pictures() -> dict[str, bytes]:
    sheet = machine("h100")
    passes = [("decode", 32, 1, 4096), ("prefill", 1, 4096, 0)]
    found = [
        operation
        for phase, sequences, tokens, context in passes
        for operation in operations(
            phase, MODEL, ServingPlan(), sheet, sequences=sequences, tokens=tokens, context=context
        )
    ]
    law = fit([Point(f"run{i}", 1e14 * 3**i, 1 + 3.0**-i) for i in range(5)], draws=10)
    return {
        "frontier": frontier_plot(points(), "frontier"),
        "memory": memory_plot({"a": memory(20e9), "b": memory(60e9)}, "memory"),
        "batch": batch_plot(sweep(), "batch"),
        "roofline": roofline_plot(found, sheet, "roofline"),
        "validation": validation_plot(validation(), "validation"),
        "law": law_plot(law, "law"),
    }


def test_every_picture_is_a_png_of_a_thousand_pixels(tmp_path):
    drawn = pictures()
    paths = write_pictures(drawn, tmp_path / "plots")
    assert {path.name for path in paths} == {f"{name}.png" for name in drawn}
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert abs(width - 1000) < 5
        assert height > 250
        assert len(data) > 8_000  # an empty pair of axes takes about 5 kB
    assert len({path.read_bytes() for path in paths}) == len(paths)


def test_without_matplotlib_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pictures need matplotlib.*pip install 'moe-lm\[bench\]'"):
        batch_plot(sweep(), "x")


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_pictures({"a": b""}, tmp_path / "file")


def test_what_another_point_beats_is_left_out():
    kept = unbeaten(points()[:4])
    assert [point.plan.batch for point in kept] == [1, 4, 8]


def test_labels_keep_their_distance():
    assert apart([3.0, 2.9, 1.0], 0.5) == [3.0, 2.5, 1.0]
    assert apart([1.0, 1.0, 1.0], 0.5) == [1.0, 0.5, 0.0]


def test_operations_stay_below_the_roof():
    sheet = machine("h100")
    decode = operations("decode", MODEL, ServingPlan(), sheet, sequences=8, tokens=1, context=2048)
    prefill = operations("prefill", MODEL, ServingPlan(), sheet, sequences=1, tokens=8192, context=0)
    assert {"projections", "attention", "experts", "output"} <= {operation.name for operation in decode}
    for operation in decode + prefill:
        assert 0 < operation.rate < 1.001 * sheet.sheet.peak("bfloat16")
        assert operation.rate < 1.001 * operation.intensity * sheet.sheet.bandwidth, operation
    of = {(o.phase, o.name): o for o in decode + prefill}
    assert of["prefill", "experts"].intensity > 20 * of["decode", "experts"].intensity
    # 16 experts of 3 D F weights in 2 bytes, all hit by 8 tokens of 2 experts at most once each
    assert of["decode", "experts"].bytes <= 16 * 3 * 4096 * 8192 * 2 * 1.01


def test_the_page_stands_alone_and_has_what_it_was_given():
    stages = (memory(20e9), memory(20e9), memory(70e9))
    step = SimpleNamespace(seconds=4.0, parts={"gemm": 3.0, "data_parallel": 1.0, "bubble": 0.0})
    facts = [{"id": "F01", "reported": "1.8T <b>", "computed": 1.81, "unit": "T", "difference": 0.005, "verdict": "ok",
              "derivation": "closed form"}]  # fmt: skip
    sections = {
        "Parameters": page.parameters_html(parameters(MODEL)),
        "Memory": page.memory_html(stages),
        "Time": page.time_html(step),
        "Serving": page.serving_html(points()) + page.sweep_html(sweep()),
        "Facts": page.facts_html(facts),
        "Validation": page.validation_html(validation()),
        "Picture": page.picture_html(b"png", "a picture"),
    }
    html = page.plan_page("tiny <1>", "in words", [Tile("step", "4 s")], sections)
    for heading in sections:
        assert f"<h2>{heading}</h2>" in html
    assert "tiny &lt;1&gt;" in html
    assert "1.8T &lt;b&gt;" in html
    assert f"{parameters(MODEL).total:,}" in html
    assert "stages 0-1" in html
    assert "28.0 too many" in html  # 70 + 38 GB of 80
    assert "data parallel, 25.0%" in html
    assert "bubble" not in html
    assert published()[0][0].source in html
    assert not re.search(r"<script|src=\"http|href=\"http|@import|url\(", html)
    assert "prefers-color-scheme: dark" in html


def test_a_plan_has_its_pictures_and_its_page(tmp_path, monkeypatch):
    plan = make_plan("tiny", RunConfig(), [machine("h100")], [machine("a100-80")])
    names = {path.name for path in write_plots(plan, tmp_path / "plots")}
    kinds = [name.partition("-")[0] for name in sorted(names)]
    assert kinds == ["batch", "frontier", "memory", "roofline"]
    monkeypatch.setattr(module, "facts", list)
    monkeypatch.setattr(module, "validate", lambda *_: validation())
    write_page(plan, tmp_path / "plan.html")
    html = (tmp_path / "plan.html").read_text("utf-8")
    assert html.count("data:image/png") == len(names)
    assert "Serving on 1 x A100 SXM 80 GB" in html
    with pytest.raises(ConfigError, match=r"--html .* cannot be written"):
        write_page(plan, tmp_path)
