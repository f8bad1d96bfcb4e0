"""The commands of moe_lm.data, their page, the classifier, and that docs/data.md does what it says."""

import json
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from test_data_cleaning import corpus  # noqa: F401

from moe_lm.bench import data_ablation
from moe_lm.config import ConfigError, DataConfig, ModelConfig, QualityConfig, RunConfig
from moe_lm.data import __main__ as program
from moe_lm.data import is_held_out, prepare_data
from moe_lm.data.quality import classifier as classifiers
from moe_lm.data.report import cut, plain, sample_text
from moe_lm.data.report_page import page
from moe_lm.toml import from_value, to_dict, to_toml

ROOT = Path(__file__).resolve().parents[1]
DOCS = (ROOT / "docs" / "data.md").read_text("utf-8")
NASTY = '<script>alert(1)</script>\x1b[31m & "quoted"\0'


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A file of labels that a classifier can learn: shouting is bad."""
    draw = np.random.default_rng(0)
    words = np.array([f"w{i}" for i in range(50)])
    rows = [{"text": " ".join(draw.choice(words, 30)), "label": "good"} for _ in range(60)]
    rows += [{"text": " ".join(draw.choice(words, 25)) + " BUY NOW" * 3, "label": 0} for _ in range(60)]
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n", "utf-8")
    texts = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows)
    path.with_name("rows.jsonl").write_text(texts, "utf-8")
    return path


@pytest.fixture(scope="module")
def trained(labels, tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifier") / "made"
    program.main(["classifier", str(directory), "--labels", str(labels), "--kind", "prose"])
    return directory


@pytest.fixture(scope="module")
def config_file(corpus, trained, tmp_path_factory):  # noqa: F811
    quality = QualityConfig(exact=True, lines=True, heuristics=True, near=True, outliers=True, line_repeats=3,
                            classifier=str(trained), min_score=0.01)  # fmt: skip
    data = DataConfig(corpus.sources, validation_fraction=corpus.validation_fraction, quality=quality,
                      cache_dir=corpus.cache_dir)  # fmt: skip
    config = RunConfig(model=ModelConfig(vocab_size=300), data=data)
    assert from_value(RunConfig, to_dict(config), "") == config
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(to_toml(config), "utf-8")
    return path


def test_the_classifier_tells_good_from_bad_and_says_how_well(labels, trained):
    texts, truth = classifiers.read_labels(labels)
    loaded = classifiers.load_classifier(trained)
    scores = loaded.scores(texts)
    held_out = np.array([is_held_out(classifiers.content_key(text), classifiers.HELD_OUT) for text in texts])
    assert loaded.facts.accuracy == ((scores > 0.5) == truth)[held_out].mean() > 0.9
    assert loaded.facts.auc == 1.0
    assert sum(loaded.facts.held_out) == held_out.sum()
    assert sum(loaded.facts.trained_on) == (~held_out).sum()
    assert loaded.judges("prose")
    assert not loaded.judges("code")
    # Alone as in company, and twice the same.
    assert [loaded.scores([text])[0] for text in texts[:5]] == scores[:5].tolist()
    again = classifiers.train_classifier(texts, truth, "prose", "labels.jsonl")
    assert (again.weights == loaded.weights).all()
    assert {path.suffix for path in trained.iterdir()} == {".json", ".safetensors"}


def test_a_classifier_that_cannot_be_used_is_refused(trained, tmp_path, labels, monkeypatch):
    with pytest.raises(ConfigError, match=r"holds no classifier\.json: make one with"):
        classifiers.load_classifier(tmp_path)
    (tmp_path / "classifier.json").write_text((trained / "classifier.json").read_text())
    (tmp_path / "weights.safetensors").write_bytes(b"12345")
    with pytest.raises(ConfigError, match="is damaged"):
        classifiers.load_classifier(tmp_path)
    bad = tmp_path / "bad.jsonl"
    for line in ('{"text": "a"}', '{"text": 3, "label": 1}', '{"text": "a", "label": "so so"}', "[1]", "{", "3"):
        bad.write_text(f'{{"text": "a", "label": 1}}\n{line}\n')
        with pytest.raises(ConfigError, match=r"line 2 of --labels .* is not"):
            classifiers.read_labels(bad)
    with pytest.raises(ConfigError, match=r"1 good and 0 bad documents"):
        classifiers.train_classifier(["a"], [1], "any", "x")
    with pytest.raises(ConfigError, match="cannot be read"):
        classifiers.read_labels(tmp_path / "none.jsonl")
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ConfigError, match=r"needs the scikit-learn library: pip install 'moe-lm\[quality\]'"):
        classifiers.load_classifier(trained)


def test_weak_labels_follow_the_place_of_a_file(tmp_path):
    files = {
        "a.py": "x = 1\n", "test/t.py": "y = 2\n", "encodings/c.py": "z", "big.py": f"T = {[*range(900)]}",
        "site-packages/s.py": "no", "broken.py": "def", "test/odd.py": "\0",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {path: label for path, _, label in classifiers.files_of_library(tmp_path)}
    assert found == {"a.py": 1, "big.py": 0, "encodings/c.py": 0, "test/odd.py": 0, "test/t.py": 0}


def run(capsys, *argv):
    program.main(list(map(str, argv)))
    return capsys.readouterr().out


def test_the_report_fits_its_columns_and_is_the_same_twice(config_file, capsys, tmp_path):
    out = run(capsys, "report", "--config", config_file, "--samples", 2, "--html", tmp_path / "page.html")
    assert out == run(capsys, "report", "--config", config_file, "--samples", 2)
    assert max(map(len, out.splitlines())) <= 100
    for words in ("copies", "near copy", "repeated line", "words 4 < 50", "divergence", "stays", "share of rows",
                  "lowest scores", "AUC 1.000", "(held out)"):  # fmt: skip
        assert words in out, words
    html = (tmp_path / "page.html").read_text("utf-8")
    for words in (
        "near copy",
        "words 4 &lt; 50",
        'class="bars"',
        'class="pair"',
        "held out",
        "Content-Security-Policy",
    ):
        assert words in html, words
    assert "<script" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_the_account_as_json_has_the_tokens_that_training_reads(config_file, capsys):
    account = json.loads(run(capsys, "report", "--config", config_file, "--json", "--samples", 0))
    (told,) = account["sources"]
    assert told["share"] == told["kept_share"] == 1.0
    assert not any(rule["samples"] for rule in told["removed"])
    assert sum(account["scores"]["histogram"]) > 5
    from moe_lm.toml import load_config

    config = load_config(config_file)
    before = prepare_data(DataConfig(config.data.sources, validation_fraction=config.data.validation_fraction,
                                     cache_dir=config.data.cache_dir), 300)  # fmt: skip
    after = prepare_data(config.data, 300, tokenizer=before.tokenizer)
    assert told["tokens"] == before.sources[0].train.num_tokens
    assert told["kept_tokens"] == after.sources[0].train.num_tokens
    assert told["kept_documents"] == after.sources[0].train.num_documents


def test_whatever_a_document_says_is_only_text():
    item = {"key": NASTY, "reason": "words 4 < 50", "value": 1.0, "text": NASTY, "twin_key": NASTY, "twin_text": NASTY,
            "twin_side": "training"}  # fmt: skip
    shown = sample_text(item)
    assert "\x1b" not in shown
    assert "\0" not in plain(NASTY)
    rule = {"step": "near", "rule": "near copy", "above": True, "limit": 0.8, "documents": 1, "bytes": 9,
            "samples": [item]}  # fmt: skip
    source = {"name": NASTY, "epochs": 1.0, "documents": 2, "bytes": 9, "held_out_documents": 1, "held_out_bytes": 9,
              "kept_documents": 1, "kept_bytes": 0, "removed": [rule], "tokens": 9, "kept_tokens": 0, "share": 1.0,
              "kept_share": 0.0}  # fmt: skip
    html = page({"steps": ["near"], "sources": [source], "classifier": None, "scores": {}}, {"min_score": 0.2})
    assert "<script" not in html
    assert "\x1b" not in html
    assert cut("x" * 50).startswith("...")
    assert len(cut("x" * 50)) == 34


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report"], "name a SOURCE, such as python:code, or a config with --config FILE."),
        (["report", "python:nonsense"], "data source python:nonsense is not known"),
        (["report", "python:code", "--samples", "-1"], "--samples = -1 must be 0 or more."),
        (["report", "--config", str(ROOT / "configs" / "nano.toml")], "switches no step on: set data.quality.heur"),
        (["report", "a.txt", "--config", "no.toml"], "no config file no.toml"),
        (["report", "python:code", "--classifier", "/nowhere"], "/nowhere holds no classifier.json"),
        (["report", "python:code", "--colour"], "--colour is not a known setting"),
        (["clean"], "invalid choice: 'clean'"),
    ],
)
def test_what_cannot_work_is_one_sentence(argv, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        program.main(argv)
    assert "\n" not in str(refused.value)


def test_the_ablation_dirties_as_it_says_and_its_table_compares_like_with_like():
    documents = [(f"{i}.py", "\n".join(f"name{i} = value{j}" for j in range(150))) for i in range(40)]
    dirty, again = (list(data_ablation.dirt("code", documents, random.Random("x"))) for _ in range(2))
    assert dirty == again
    texts = [text for _, text in dirty]
    copies, near = 4 * data_ablation.COPIES, 4 * data_ablation.NEAR_COPIES
    assert set(documents) <= set(dirty)
    assert sum(".copy" in name for name, _ in dirty) == copies == len(texts) - len(set(texts))
    assert sum(".near" in name for name, _ in dirty) == near
    assert data_ablation.quality("exact+near", "x").steps == ("exact", "near")
    assert len(data_ablation.quality("all", "x").steps) == 6
    assert data_ablation.quality("none", "x") is None
    with pytest.raises(ConfigError, match="--only exakt is no step: it is one of none, all, exact"):
        data_ablation.main(["--only", "near+exakt"])
    rows = [
        {"corpus": "dirtied", "step": step, "seed": seed, "bits_per_byte": bits, "prose": bits, "code": bits,
         "train_tokens": tokens}
        for step, seed, bits, tokens in (("none", 0, 2.0, 100), ("none", 1, 2.5, 100), ("exact", 0, 1.9, 40))
    ]  # fmt: skip
    none, exact = data_ablation.results_table(rows).splitlines()[1:]
    assert none.split()[2:6] == ["100%", "2.250", "+0.000", "0.500"]
    # Against seed 0 alone, not against the mean of both.
    assert exact.split()[2:5] == ["40%", "1.900", "-0.100"]


def commands():
    fences = re.findall(r"^```bash\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
    return [line.partition("  #")[0].strip() for fence in fences for line in fence.splitlines() if line.strip()]


@pytest.mark.parametrize("command", commands())
def test_the_docs_do_what_they_say(command, config_file, labels, trained, corpus, tmp_path, capsys, monkeypatch):  # noqa: F811
    """With the names in them standing for small things."""
    quality, (source,) = tmp_path / "quality", corpus.sources
    stand_ins = {
        "python:code": source.path, "python:prose": source.path, "my.jsonl": str(labels.with_name("rows.jsonl")),
        "configs/mine.toml": str(config_file), "labels.jsonl": str(labels),
        "runs/quality": str(trained if "report" in command else quality),
    }  # fmt: skip
    words = [stand_ins.get(word, word) for word in shlex.split(command)]
    if words[:3] == ["python", "-m", "moe_lm.data"]:
        if words[3] == "classifier" and "--labels" not in words:
            monkeypatch.setattr(classifiers, "labels_of_library", lambda: classifiers.read_labels(labels))
        monkeypatch.chdir(tmp_path)
        program.main(words[3:])
        assert capsys.readouterr().out
    elif words[:4] == ["python", "-m", "moe_lm.bench", "data-ablation"]:
        with pytest.raises(SystemExit):
            data_ablation.main([*words[4:], "--help"])
    else:
        assert words[:2] == ["pip", "install"] or words[:2] == ["python", "train.py"], words
