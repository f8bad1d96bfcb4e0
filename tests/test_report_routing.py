"""What the report of a run says of its routers beyond their load, where the lines of its metrics tell it."""

import re

from test_report import metrics, report

from moe_lm.config import RunConfig
from moe_lm.toml import to_toml


def routing(lines: list[dict], dropped: float = 0.125, bias: bool = True) -> list[dict]:
    """The lines with the router's confidence, its drops, and its bias, which grows with the steps."""
    found = []
    for line in lines:
        layers = range(len(line["expert_load"]))
        line = line | {
            "router_confidence": [0.25 + layer / 100 for layer in layers], "drop_rate": [dropped] * len(layers),
        }  # fmt: skip
        if bias:
            line["expert_bias"] = [[-0.001 * line["step"], 0.002 * line["step"]] for _ in layers]
        found.append(line)
    return found


def test_confidence_drops_and_bias_are_told_where_there_are_any(tmp_path):
    markdown, _, page = report(tmp_path / "run", model=routing(metrics(40)))
    for figure in (
        "confidence",
        "27.0%",
        "dropped",
        "12.5%",
        "-0.040 to +0.080",
        "Dropped choices found their expert full",
    ):
        assert figure in markdown, figure
        assert figure in "".join(page.text), figure
    label = next(label for label in page.labels() if label.startswith("Range of the bias"))
    assert "layer 0 from 0.003 at step 1 to 0.1185 at step 40" in label
    labels = [label.split(",")[0] for label in page.labels()]
    assert labels[-4:] == ["Router entropy", "Router confidence", "Dropped", "Range of the bias"]
    markdown, _, page = report(tmp_path / "run", model=routing(metrics(40), dropped=0.0, bias=False))
    assert "confidence" in markdown
    assert not re.search("[Dd]ropped|bias", markdown.replace(to_toml(RunConfig()), ""))
    assert [label.split(",")[0] for label in page.labels()][-2:] == ["Router entropy", "Router confidence"]


def test_a_run_that_an_older_version_began(tmp_path):
    lines = metrics(40)
    markdown, _, page = report(tmp_path / "run", model=lines[:20] + routing(lines[20:]))
    assert "27.0%" in markdown
    assert any("layer 1 from 26 at step 21 to 26 at step 40" in label for label in page.labels())


def test_experts_that_starved_are_warned_of(tmp_path):
    lines, starved = metrics(40), [[layer, 2, 6, 30] for layer in range(3)]
    lines[30] |= {"starved": starved}
    lines[35] |= {"starved": [[0, 5, 12, 36]] * 11}
    markdown, _, page = report(tmp_path / "run", model=lines)
    said = [text for text in page.text if "starve" in text]
    assert len(said) == 13
    assert said[2] == (
        "In the model, layer 2, expert 2 starves: less than 5% of its even share in each of the steps 6 to 30. At step "
        "40 it got 0.00 times its even share."
    )
    assert said[-1] == "In the model, experts starved 2 times more."
    assert markdown.count("**Warning:**") == 14
    assert "3 experts got none" in "".join(page.text)
