"""The report of a run: complete, escaped, self-contained, and written whatever the run looked like."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moe_lm.config import ModelConfig, RunConfig, SampleConfig
from moe_lm.toml import to_toml
from moe_lm.train.charts import NEUTRAL, heat_map, level, smooth, thin, ticks
from moe_lm.train.report import (
    ModelFacts,
    RunFacts,
    Sample,
    SpeculationRow,
    Table,
    duration,
    fenced,
    markdown_table,
    plain,
    printable,
    write_report,
)

MODEL = ModelFacts("model", 8_123_648, 2_417_920, 40, 163_840, 1312.4, 1.6372, {"python:prose": 1.937, "web": 1.3865})
DRAFT = ModelFacts("draft", 812_544, 812_543, 30, 122_880, 61.0, 1.8911, {"python:prose": 2.2041, "web": 1.6132})
SPECULATION = (
    SpeculationRow("greedy", 212.4, 331.9, 1.563, 0.713, 3.24, (0.84, 0.74, 0.66)),
    SpeculationRow("temperature 0.7", 209.8, 1268.1, 0.978, 0.587, 2.71, (0.73, 0.62)),
)
FACTS = RunFacts(
    command="python train.py configs/nano.toml --run-dir 'runs/a & b'",
    commit="4f1c2d9+",
    hardware="A CPU <of> 2 cores",
    versions="moe-lm 0.1.0, torch 2.13.0",
    dtype="float32",
    gemm_gflops=138.42,
    models=(MODEL, DRAFT),
    samples=(Sample("def main(", "argv):\n    return 0\n", "length"), Sample("class ", "A: pass", "stop")),
    speculation=SPECULATION,
    warnings=("3 experts got none of the held-out tokens.",),
)
VOID = {"meta", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """The parsed page: its elements, its text, and the preformatted blocks; raises where tags do not balance."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.text, self.blocks = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names))
        self.elements.append((tag, dict(attributes)))
        if tag == "pre":
            self.blocks.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if "pre" in self.open:
            self.blocks[-1] += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def labels(self) -> list[str]:
        return [attributes["aria-label"] for _, attributes in self.elements if attributes.get("role") == "img"]


def metrics(steps: int, experts: int = 8, layers: int = 3, every: int = 10) -> list[dict]:
    """Lines as the training loop writes them: a falling loss, experts that drift apart and one that dies."""
    lines = []
    for step in range(1, steps + 1):
        weights = [[1 + step / steps * math.sin(7 * e + layer) for e in range(experts)] for layer in range(layers)]
        if weights and step == steps and experts:
            weights[-1][2] = 0.0
        load = [[round(w / sum(row), 5) for w in row] for row in weights] if experts else []
        line = {
            "step": step, "tokens": step * 4096, "loss": 8 / step**0.3, "bits_per_byte": 3.2 / step**0.3,
            "aux_loss": 1.1, "z_loss": 0.5, "expert_load": load, "dead_experts": 0,
            "router_entropy": [2.0 - 0.1 * layer for layer in range(len(load))],
            "grad_norm": 1.0, "learning_rate": 1e-3 * step / steps, "tokens_per_s": 4000.0 + step,
            "mfu": 0.31,
        }  # fmt: skip
        if step % every == 0 or step == steps:
            values = {"val_bits_per_byte": 3.3 / step**0.3, "val_bits_per_byte_by_source": MODEL.by_source}
            line |= values | {"val_dead_experts": 3 if experts else 0}
        lines.append(line)
    return lines


def report(
    run_dir: Path, facts: RunFacts = FACTS, config: RunConfig | None = None, model=None, draft=None
) -> tuple[str, str, Page]:
    """Write the metrics and the report; the Markdown, the HTML and the HTML parsed."""
    for folder, lines in ((run_dir, model), (run_dir / "draft", draft)):
        if lines is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    markdown, html = write_report(run_dir, config or RunConfig(), facts)
    assert (markdown, html) == (run_dir / "report.md", run_dir / "report.html")
    text = html.read_text("utf-8")
    return markdown.read_text("utf-8"), text, Page(text)


def blocks(markdown: str) -> list[str]:
    """What a CommonMark reader takes for fenced code: up to a fence of at least the opening one's length."""
    found, fence = [], ""
    for line in markdown.split("\n"):
        if fence:
            if re.fullmatch(f"`{{{len(fence)},}}", line):
                fence = ""
            else:
                found[-1] += line + "\n"
        elif opening := re.match("`{3,}", line):
            fence = opening[0]
            found.append("")
    assert not fence
    return found


# The whole report


def test_every_figure_is_in_both_files(tmp_path):
    config = RunConfig(sample=SampleConfig(temperature=0.25, max_tokens=77, draft_tokens=3))
    markdown, _, page = report(tmp_path / "first_run", config=config, model=metrics(40), draft=metrics(30, 0, 0))
    figures = [
        "first_run", "3 experts got none", "python train.py configs/nano.toml --run-dir 'runs/a & b'", "4f1c2d9+",
        "moe-lm 0.1.0, torch 2.13.0", "float32", "138.4 GFLOP/s",
        "8,123,648", "2,417,920", "163,840", "21 min 52 s", "1.637", "python:prose", "1.937", "1.387",
        "812,544", "812,543", "122,880", "1 min 01 s", "1.891", "2.204", "1.613",
        "8.12 M", "2.42 M active", "4,020", "MFU 31%",
        "greedy", "212.4", "331.9", "1.56×", "71.3%", "3.24", "84% 74% 66%",
        "temperature 0.7", "209.8", "1,268.1", "0.98×", "58.7%", "2.71", "73% 62%", "proposes 3 tokens",
        "Temperature 0.25", "77 tokens", "finish reason: length", "finish reason: stop",
        "argv):\n    return 0", "A: pass",
        "router entropy", "1.900", "ln 8 = 2.079", "Of all 24 experts, 3 got no token",
    ]  # fmt: skip
    text = "".join(page.text)
    for figure in figures:
        assert figure in markdown, figure
        assert figure in text, figure
    assert r"A CPU \<of\> 2 cores" in markdown
    assert "A CPU <of> 2 cores" in text
    assert to_toml(config) in blocks(markdown)
    assert to_toml(config) in page.blocks
    assert re.search(r"\| layer 2 +\| +0\.00 \| +\d\.\d\d \| +1 \|", markdown)
    assert re.search(r"\| 40 +\| 163,840 \|.* 1\.091 \|\n", markdown)


def test_the_page_stands_alone(tmp_path):
    _, html, page = report(tmp_path, model=metrics(40), draft=metrics(30, 0, 0))
    assert not re.search(r"https?:|//|@import|url\(", html)
    assert not page.tags() & {"script", "img", "iframe", "object", "embed"}
    links = {value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")}
    assert links == {"data:,"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert {"h1", "h2", "main", "table", "svg", "details"} <= page.tags()
    assert [tag for tag, _ in page.elements].count("h1") == 1


def test_the_page_fits_both_schemes(tmp_path):
    _, html, page = report(tmp_path, model=metrics(40))
    assert "prefers-color-scheme: dark" in html
    light, dark = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    names = [set(re.findall(r"--[a-z]+(?=:)", block)) for block in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[a-z]+)\)", html)) <= names[0]
    assert not any(attributes.get("fill", attributes.get("stroke")) for _, attributes in page.elements)


def test_charts_say_what_they_show(tmp_path):
    lines = metrics(40)
    _, _, page = report(tmp_path, model=lines, draft=metrics(30, 0, 0))
    labels = page.labels()
    assert labels[0].startswith("Loss, bits per byte: model from 3.2 at step 1 to ")
    assert "; draft from 3.2 at step 1 to " in labels[0]
    assert [label.split(",")[0] for label in labels[1:]] == [
        "Learning rate", "Speed", "MFU", "layer 0", "layer 1", "layer 2", "colour scale: load of an expert relative to "
        "uniform", "Router entropy",
    ]  # fmt: skip
    most = 8 * max(lines[-1]["expert_load"][2])
    assert labels[6].endswith(f"at the end 0.00 to {most:.2f} times uniform")
    hints = [text for text in page.text if ", step " in text]
    assert "model, step 10: 1.654" in hints
    assert len(hints) == 4 + 3


def test_the_same_run_gives_the_same_bytes(tmp_path):
    first = report(tmp_path, model=metrics(40), draft=metrics(30, 0, 0))[:2]
    assert report(tmp_path)[:2] == first


# Text that is not ours


HOSTILE = "<script>alert(1)</script>\n```\n~~~~\n`````` </pre></code> & &amp; \"' | # * 日本 é\t→ \x1b[31m \x00 end"


def test_samples_are_text_and_nothing_else(tmp_path):
    facts = dataclasses.replace(
        FACTS,
        samples=(Sample(HOSTILE, "\n  " + HOSTILE + "\n\n", "length"), Sample("", "free text", "<stop>")),
        command="echo ```` <b>\n````",
        hardware="| <i> `x` [a](b)",
        warnings=("<script>1</script> | _a_ `",),
        models=(dataclasses.replace(MODEL, by_source={"<a>|`b`": 1.25, "c": 1.5}),),
        speculation=(),
    )
    markdown, html, page = report(tmp_path / "<b>run", facts, model=metrics(5))
    shown = HOSTILE.replace("\x1b", "␛").replace("\x00", "␀")
    assert page.blocks[0] == f"{shown}\n  {shown}\n\n"
    assert page.blocks[1] == "(no prompt)free text"
    assert page.blocks[2] == facts.command
    assert not page.tags() & {"script", "a"}
    assert "".join(page.text).count("<script>") == 3
    assert blocks(markdown)[:5] == [f"{facts.command}\n", f"{shown}\n", f"\n  {shown}\n\n", "\n", "free text\n"]
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$", "", markdown)
    assert not re.search(r"(?<!\\)<(?!/?details>|/?summary>)", outside)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", markdown + html)


def test_lone_surrogates_of_a_command_line_do_not_stop_the_report(tmp_path):
    markdown, html, _ = report(tmp_path, dataclasses.replace(FACTS, command="train \udcff"), model=metrics(2))
    assert "train �" in markdown
    assert "train �" in html


def test_markdown_tables_line_up_and_keep_their_columns(tmp_path):
    markdown, _, _ = report(tmp_path, model=metrics(40), draft=metrics(30, 0, 0))
    tables = re.findall(r"(?m)(?:^\|.*\n)+", markdown)
    assert len(tables) == 6
    for table in tables:
        rows = table.splitlines()
        assert len({len(row) for row in rows}) == 1
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


# Runs of other shapes


def test_a_dense_run_says_nothing_of_experts(tmp_path):
    config = RunConfig(model=ModelConfig(num_local_experts=0))
    facts = dataclasses.replace(FACTS, warnings=())
    markdown, _, page = report(tmp_path, facts, config, metrics(40, 0, 0), metrics(30, 0, 0))
    for text in (markdown, "".join(page.text)):
        assert "4 layers of width 256, dense." in text
        assert not re.search("expert|router|layer 0|warning", text.replace(to_toml(config), ""), re.IGNORECASE)
    assert [label.split(",")[0] for label in page.labels()] == ["Loss", "Learning rate", "Speed", "MFU"]


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ((MODEL,), "This run trained no draft model"),
        ((MODEL, DRAFT), "speculative decoding was not measured"),
    ],
)
def test_a_run_without_speculation_says_so(tmp_path, models, sentence):
    facts = dataclasses.replace(FACTS, models=models, speculation=())
    markdown, _, page = report(tmp_path, facts, model=metrics(40))
    text = "".join(page.text)
    for form in (markdown, text):
        assert sentence in form
        assert "speed-up" not in form
    assert ("812,544" in text) == (len(models) == 2)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_of_few_steps(tmp_path, steps):
    markdown, html, page = report(tmp_path, model=metrics(steps), draft=metrics(1, 0, 0))
    assert f"| {steps}    |" in markdown
    assert len(page.labels()) == 9
    assert not re.search(r"\b(nan|inf)\b", html)
    places = re.findall(r'<span class="x" style="left:[\d.]+%">([\d.]+)<', html)
    assert {float(step) for step in places} <= set(range(steps + 1))


def test_a_run_without_metrics(tmp_path):
    markdown, _, page = report(tmp_path, dataclasses.replace(FACTS, samples=()))
    assert "No step was logged." in markdown
    assert "No step was logged." in page.text
    assert "Samples" not in markdown
    assert page.labels() == []


def test_a_draft_with_experts_gets_its_own_section(tmp_path):
    markdown, _, page = report(tmp_path, model=metrics(12, layers=2), draft=metrics(12, experts=4, layers=1))
    assert "## Experts of the draft" in markdown
    assert "Experts of the draft" in page.text
    assert [label.split(",")[0] for label in page.labels()].count("layer 0") == 2


def test_a_wide_and_long_run_stays_small(tmp_path):
    lines = metrics(2, experts=64, layers=30)
    lines = [lines[0] | {"step": step, "tokens": step * 4096} for step in range(1, 400)] + [lines[1] | {"step": 400}]
    _, html, page = report(tmp_path, model=lines)
    assert len(html) < 2_000_000
    keys = re.findall(r"</i>([^<]*)</li>", html)
    assert keys == ["model", "uniform, ln 64", "layer 0", "layer 29"]
    assert len(page.labels()) == 4 + 30 + 2


def test_logs_that_skip_steps(tmp_path):
    lines = [line for line in metrics(40) if line["step"] % 7 == 0 or line["step"] == 40]
    markdown, _, page = report(tmp_path, model=lines)
    assert page.labels()[0].startswith("Loss, bits per byte: model from 1.785 at step 7 to ")
    assert "| 7 " in markdown


# The parts


def test_smoothing_keeps_a_constant_and_quiets_noise():
    assert smooth([]) == []
    assert smooth([2.5]) == [2.5]
    assert smooth([1.5] * 300) == pytest.approx([1.5] * 300)
    means = smooth([3 + (-1) ** i for i in range(400)])
    assert means[0] == 4
    assert max(abs(mean - 3) for mean in means[10:]) < 0.1


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 1000])
def test_thinning_keeps_the_ends(count):
    kept = thin(range(count), 12)
    assert len(kept) == min(count, 12)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert kept == sorted(set(kept))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 600), (1.31, 3.4), (0, 0), (2, 2), (0, 2e-3), (0, 1e-9), (0, 3.4e11), (-1, 1), (0.0, 0.95)]
)
def test_ticks_are_round_and_reach_around_the_data(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 8
    assert f"{found[1] - found[0]:.3e}".split("e")[0] in ("1.000", "2.000", "2.500", "5.000")


def test_levels_are_symmetric_about_uniform():
    assert [level(value) for value in (0, 0.01, 0.25, 1, 4, 16)] == [0, 0, 0, NEUTRAL, 2 * NEUTRAL, 2 * NEUTRAL]
    for ratio in (1.1, 1.5, 2, 3):
        assert level(ratio) + level(1 / ratio) == 2 * NEUTRAL


def test_a_heat_map_draws_every_cell_in_its_place():
    columns = [[0.0, 1.0, 2.0], [0.0, 1.0, 1.0], [4.0, 0.5, 1.0], [0.5, 0.5, 9.0]]
    painted = {}
    for shade, data in re.findall(r'<path class="h(\d+)" d="([^"]*)"', heat_map(0, [1, 2, 3, 4], columns)):
        for x, y, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)", data):
            cells = [(i, j) for i in range(int(x), int(x) + int(width)) for j in range(int(y), int(y) + int(height))]
            painted |= dict.fromkeys(cells, int(shade))
    assert painted == {(x, y): level(value) for x, column in enumerate(columns) for y, value in enumerate(column)}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (59.97, "1 min 00 s"), (61, "1 min 01 s"), (3599.7, "1 h 00 min"),
     (7500, "2 h 05 min"), (360_000, "100 h 00 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_text_is_made_safe_for_a_terminal_and_for_markdown():
    assert printable("a\tb\n\x1b[0m\r\x7f\x85\ud800é") == "a\tb\n␛[0m␍␡\ufffd\ufffdé"
    assert plain("a_b _c_ *d*\n<e> | `f`") == r"a_b \_c\_ \*d\* \<e\> \| \`f\`"
    assert fenced("a ``` b") == "````\na ``` b\n````"
    assert fenced("") == "```\n\n```"
    assert markdown_table(Table(["", "n"], [["a|b", "1"]])).splitlines()[2] == r"| a\|b |   1 |"
