"""The reported facts: every row is there, says what it should, and notices when a config no longer agrees."""

import dataclasses
import json
import re

import pytest

from moe_lm.scaling import configs
from moe_lm.scaling import facts as package
from moe_lm.scaling.__main__ import main
from moe_lm.scaling.facts import facts, training
from moe_lm.scaling.facts.row import FACTS, Draft, Figure, Row
from moe_lm.scaling.facts.text import facts_text

NUMBERS = (*range(1, 9), *range(10, 21), *range(30, 40), *range(50, 59))
IDS = [f"F{number:02}" for number in NUMBERS]
CONTRADICTIONS = {"F05", "F07", "F30", "F55"}
SHOWN = {"F19", "F20", "F38", "F39", "F58"}


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {row.id: row for row in facts()}


def figure(row: Row, name: str) -> Figure:
    (found,) = [each for each in row.figures if each.name == name]
    return found


def test_every_row_has_its_verdict(rows):
    assert list(rows) == IDS
    for id, row in rows.items():
        expected = "contradiction" if id in CONTRADICTIONS else "shown" if id in SHOWN else "ok"
        assert row.verdict == expected, row
        assert row.derivation
        assert "\n" not in row.derivation


def test_figures_by_hand(rows):
    """Arithmetic that shares nothing with the planner's."""
    experts = 120 * 16 * 3 * 14848 * 20480
    attention = 120 * (2 * 120 + 2) * 128 * 14848
    total = experts + attention + 120 * 16 * 14848 + 2 * 100352 * 14848 + 241 * 14848
    assert figure(rows["F01"], "parameters").computed == total
    assert figure(rows["F03"], "attention").computed == attention
    active = total - experts * 14 // 16
    assert figure(rows["F04"], "active parameters").computed == active
    assert figure(rows["F05"], "forward pass of a token").computed == 2 * active
    assert figure(rows["F06"], "multi-head over multi-query").computed == 120
    assert figure(rows["F08"], "cache").computed == 512 * 2048 * 2 * 118 * 48 * 128 * 2
    assert figure(rows["F11"], "6 x active parameters x tokens").computed == 6 * active * 13e12
    assert figure(rows["F14"], "cost").computed == 8192 * 55 * 24 * 2
    assert figure(rows["F17"], "weights per GPU, mean").computed == total * 2 / 120
    assert figure(rows["F19"], "p = 15, m = 60").computed == 14 / 74
    assert figure(rows["F35"], "tokens of an expert at batch 4,096").computed == 512
    assert figure(rows["F39"], "4 bit at 1000 words a minute").computed == pytest.approx(34e9 * 2 / (1000 / 60 * 2))


def test_two_ways_to_the_same_chance(rows):
    for n in (0, 1, 4, 8):
        closed = figure(rows["F34"], f"chance of {n} tokens, closed form").computed
        drawn = figure(rows["F34"], f"chance of {n} tokens, 2,000 simulated batches").computed
        assert drawn == pytest.approx(closed, abs=0.01)


def test_a_config_that_no_longer_agrees_is_off(monkeypatch, capsys):
    smaller = configs.run_of("gpt4-1.8t")
    smaller = dataclasses.replace(smaller, model=dataclasses.replace(smaller.model, intermediate_size=18432))
    real = configs.run_of
    monkeypatch.setattr(training, "run_of", lambda name: smaller if name == "gpt4-1.8t" else real(name))
    assert FACTS["F11"]().verdict == "off"
    monkeypatch.setattr(package, "facts", lambda: [FACTS["F11"]()])
    assert main(["--facts"]) == 1
    assert "1 off" in capsys.readouterr().out


def test_json_has_the_keys_that_are_promised(capsys):
    assert main(["--facts", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["id"] for row in rows] == IDS
    for row in rows:
        assert {"id", "reported", "computed", "unit", "difference", "verdict", "derivation"} <= set(row)
        assert row["verdict"] in ("ok", "shown", "contradiction", "off")
        for each in row["figures"]:
            if isinstance(each["reported"], int | float) and not isinstance(each["computed"], str):
                assert each["difference"] == pytest.approx(each["computed"] / each["reported"] - 1)


def test_text_says_that_it_is_unconfirmed(rows):
    text = facts_text(rows.values())
    assert "reported, unconfirmed" in text
    assert re.search(r"F05 .*: contradiction\n(.*\n)*?.*GFLOP per token", text)
    assert text.splitlines()[-1].endswith("shown")


@pytest.mark.parametrize(
    ("computed", "reported", "tolerance", "verdict"),
    [(102, 100, 0.02, "ok"), (98, 100, 0.02, "ok"), (102.1, 100, 0.02, "off"), (97.9, 100, 0.02, "off")],
)
def test_a_tolerance_is_of_what_is_reported(computed, reported, tolerance, verdict):
    draft = Draft()
    draft.near("x", computed, reported, "", tolerance)
    assert draft.figures[0].verdict == verdict


def test_a_row_is_as_bad_as_its_worst_figure():
    draft = Draft()
    draft.show("a", 1)
    draft.exact("b", 2, 2, "")
    assert Row("X", "", tuple(draft.figures), "").verdict == "ok"
    draft.contradiction("c", 2, 3, "")
    assert Row("X", "", tuple(draft.figures), "").verdict == "contradiction"
    draft.exact("d", 2, 3, "")
    assert Row("X", "", tuple(draft.figures), "").verdict == "off"
