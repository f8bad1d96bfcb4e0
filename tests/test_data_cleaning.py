"""Cleaning as training meets it: what goes, that nothing held out leaks or changes, caches, streams, refusals."""

import dataclasses
import json
import random
import re
import sys

import pytest
from batches import documents_of

from moe_lm.config import ConfigError, DataConfig, QualityConfig, QualityRules, SourceConfig
from moe_lm.data import is_held_out, open_source, prepare_data
from moe_lm.data.quality import Cleaning, cleaning, source

FRACTION = 0.2
STEPS = QualityConfig(exact=True, lines=True, heuristics=True, near=True, outliers=True, line_repeats=3)
FOOTER = "this footer is in every single file, word for word"


def names(held_out, prefix):
    """Names of files that fall on that side, without end."""
    return (name for i in range(10_000) if is_held_out(name := f"{prefix}{i}.txt", FRACTION) == held_out)


def prose(seed, sentences=12):
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randrange(3, 9))) for _ in range(200)]
    lines = [draw.choices(words, k=12) for _ in range(sentences)]
    return "".join(
        f"The {' '.join(line[:5])} with {' '.join(line[5:9])} that {' '.join(line[9:])}.\n" for line in lines
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files of which we know what should happen to them, by what they are called."""
    root = tmp_path_factory.mktemp("dirty")
    texts = {name: prose(i) for i, name in zip(range(12), names(False, "fine"), strict=False)}
    texts |= {name: prose(100 + i) for i, name in zip(range(4), names(True, "held"), strict=False)}
    fine, held = (next(iter(n for n in texts if n.startswith(kind))) for kind in ("fine", "held"))
    # Before and after the original in the order of the paths.
    texts[next(names(False, "acopy"))] = texts[fine].replace("The", "the ")
    texts[next(names(False, "leak"))] = texts[held].replace("\n", "\n ")
    texts[next(names(False, "aleak"))] = texts[held].replace(" with ", " without ", 1)
    texts[next(names(False, "znear"))] = texts[fine].replace(" with ", " without ", 1)
    texts[next(names(False, "short"))] = "Too short to stay."
    strange = ["".join(chr(0x4E00 + (i * j * 37) % 5000) for j in range(1, 9)) for i in range(120)]
    texts[next(names(False, "odd"))] = "\n".join(
        f"{a} the {b} that." for a, b in zip(*[iter(strange)] * 2, strict=True)
    )
    fine, held = ([n for n in texts if n.startswith(kind)] for kind in ("fine", "held"))
    for name in [*fine[6:], held[-1]]:
        texts[name] += FOOTER + "\n"
    (root / "text").mkdir()
    for name, text in texts.items():
        (root / "text" / name).write_text(text, "utf-8")
    return DataConfig((SourceConfig(str(root / "text")),), validation_fraction=FRACTION, cache_dir=str(root / "cache"))


def cleaned(config, **changes):
    config = dataclasses.replace(config, quality=dataclasses.replace(config.quality or STEPS, **changes))
    return Cleaning(config, tuple(map(open_source, config.sources)), None, samples=3).run()


def taken(account):
    """Rule by kind of file, of the first source."""
    found = {}
    for rule in account["sources"][0]["removed"]:
        for item in rule["samples"]:
            found.setdefault(re.match("[a-z]+", item["key"])[0], set()).add(rule["rule"])
    return found


def test_a_missing_library_is_told_before_the_first_step(corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    config = dataclasses.replace(corpus, quality=STEPS)
    steps, told = Cleaning(config, tuple(map(open_source, config.sources)), None, samples=3), []
    with pytest.raises(ConfigError, match="needs the datasketch library"):
        steps.run(told.append)
    assert told == []


@pytest.fixture(scope="module")
def account(corpus):
    return cleaned(corpus).as_json()


def test_each_step_takes_what_is_its(account):
    found = taken(account)
    assert found.pop("fine") == {"copies", "repeated line"}
    assert found == {
        "leak": {"copies"}, "aleak": {"near copy"}, "znear": {"near copy"}, "short": {"words"}, "odd": {"divergence"},
    }  # fmt: skip


def test_a_copy_is_shown_beside_its_original_and_an_original_that_is_held_out_wins(account):
    shown = {item["key"]: item for rule in account["sources"][0]["removed"] for item in rule["samples"]
             if "twin_key" in item}  # fmt: skip
    sides = {key[:4]: item["twin_side"] for key, item in shown.items()}
    assert sides == {"fine": "training", "leak": "held out", "alea": "held out", "znea": "training"}
    near = next(item for key, item in shown.items() if key.startswith("aleak"))
    assert " without " in near["text"]
    assert " with " in near["twin_text"]
    assert near["text"].replace(" without ", " with ")[:150] == near["twin_text"][:150]
    assert near["value"] > 0.8


def test_the_account_adds_up(corpus, account):
    (told,) = account["sources"]
    gone = sum(rule["documents"] for rule in told["removed"] if rule["step"] != "lines")
    assert told["documents"] - gone == told["kept_documents"] == 12
    assert told["bytes"] - sum(rule["bytes"] for rule in told["removed"]) == told["kept_bytes"]
    data = prepare_data(dataclasses.replace(corpus, quality=STEPS), 300)
    assert data.sources[0].train.num_bytes == told["kept_bytes"]
    assert data.sources[0].train.num_documents == 12
    assert json.loads(json.dumps(account)) == cleaned(corpus).as_json() == account


def test_training_reads_what_is_left_and_held_out_documents_stay_as_they_are(corpus):
    before = prepare_data(corpus, 300)
    after = prepare_data(dataclasses.replace(corpus, quality=STEPS), 300, tokenizer=before.tokenizer)
    assert documents_of(after, after.sources[0].validation) == documents_of(before, before.sources[0].validation)
    assert any(FOOTER in text for text in documents_of(after, after.sources[0].validation))
    left = documents_of(after, after.sources[0].train)
    assert not any(FOOTER in text for text in left)
    assert len(left) == 12 < before.sources[0].train.num_documents == 18
    assert set(left) <= {text.replace(FOOTER + "\n", "") for text in documents_of(before, before.sources[0].train)}


def test_a_verdict_is_made_once_and_again_when_anything_changes(corpus, monkeypatch, tmp_path):
    config = dataclasses.replace(corpus, quality=QualityConfig(exact=True), cache_dir=str(tmp_path))
    runs = []
    run = Cleaning.run
    monkeypatch.setattr(Cleaning, "run", lambda self, report: runs.append(1) or run(self, report))
    said = []
    for _ in range(2):
        data = prepare_data(config, 300, progress=said.append)
    assert len(runs) == 1
    assert sum(message.startswith("cleaned: 2 of 18 training documents and ") for message in said) == 2
    prepare_data(dataclasses.replace(config, quality=QualityConfig(exact=True, lines=True)), 300)
    monkeypatch.setattr(source, "VERSION", -1)
    again = prepare_data(config, 300)
    assert len(runs) == 3
    assert again.opened[0].identity() != data.opened[0].identity()
    for file in tmp_path.glob("quality-*/0.npz"):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the verdict on the data in .* is damaged .*: delete that directory"):
        prepare_data(config, 300)


def test_without_settings_nothing_of_it_is_touched(corpus, monkeypatch):
    for module in ("moe_lm.data.quality", "datasketch", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)
    before = prepare_data(corpus, 300)
    assert before.opened[0].identity() == open_source(corpus.sources[0]).identity()


def test_lines_are_counted_by_bucket_and_by_document(corpus):
    def lines(**changes):
        rules = cleaned(corpus, exact=False, heuristics=False, near=False, outliers=False, **changes).rules[0]
        return rules["repeated line"].documents if rules else 0

    assert lines() == 6
    # No bucket of four files has the footer in more than three.
    assert lines(line_bucket=4) < 6
    assert lines(line_repeats=6) == 0
    assert lines(line_characters=len(FOOTER) + 1) == 0


def test_a_source_has_rules_of_its_own_and_may_skip_steps(corpus):
    (plain,) = corpus.sources
    rules = {"words", "copies", "near copy"}
    short = dataclasses.replace(plain, rules=QualityRules(min_words=0, min_sentences=0, min_stop_words=0))
    found = set(cleaned(dataclasses.replace(corpus, sources=(short,))).rules[0])
    assert found & rules == {"copies", "near copy"}
    skipping = dataclasses.replace(plain, skip_quality=("exact", "near"))
    assert set(cleaned(dataclasses.replace(corpus, sources=(skipping,))).rules[0]) & rules == {"words"}
    code = dataclasses.replace(plain, kind="code")
    assert not set(cleaned(dataclasses.replace(corpus, sources=(code,))).rules[0]) & {"words", "repeated line"}


def test_copies_are_found_across_sources(corpus):
    (plain,) = corpus.sources
    twice = cleaned(dataclasses.replace(corpus, sources=(plain, plain)), heuristics=False, outliers=False)
    sizes = [source["kept_documents"] for source in twice.as_json()["sources"]]
    # The second copy of the source goes whole, its held-out files excepted.
    assert sizes == [14, 0]


def test_a_source_of_which_nothing_is_left_is_refused(corpus, tmp_path):
    config = dataclasses.replace(
        corpus, cache_dir=str(tmp_path), quality=QualityConfig(heuristics=True, rules=QualityRules(min_words=5000))
    )
    with pytest.raises(ConfigError, match=r"removes all 18 training documents of .*, 18 of them by the rule 'words'"):
        prepare_data(config, 300)


@pytest.fixture
def streamed(tmp_path):
    (tmp_path / "rows").mkdir()
    rows = [prose(i) if i % 3 else f"Short {i}." for i in range(60)]
    (tmp_path / "rows" / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return DataConfig(
        (SourceConfig(str(tmp_path / "rows"), streaming=True),), validation_fraction=FRACTION,
        cache_dir=str(tmp_path / "cache"), quality=QualityConfig(heuristics=True),
    )  # fmt: skip


def test_a_stream_passes_the_rules_one_document_at_a_time(streamed):
    before = prepare_data(dataclasses.replace(streamed, quality=None), 300)
    data = prepare_data(streamed, 300, tokenizer=before.tokenizer)
    texts = [d.text for d in data.opened[0] if not is_held_out(d.key, FRACTION)]
    assert len(texts) > 10
    assert not any(text.startswith("Short") for text in texts)
    line = [token for text in texts for token in data.encoder.encode([text])[0].tolist()]
    loader = data.train_loader(0, 16)
    loader.next_batch(5)
    state = json.loads(json.dumps(loader.state_dict()))
    batch, resumed = loader.next_batch(5), data.train_loader(0, 16)
    assert batch.tokens.ravel().tolist() == line[80:160]
    resumed.load_state_dict(state)
    assert resumed.next_batch(5).tokens.equal(batch.tokens)
    assert documents_of(data, data.sources[0].validation) == documents_of(before, before.sources[0].validation)


def test_a_stream_cannot_be_compared_with_itself(streamed):
    config = dataclasses.replace(streamed, quality=QualityConfig(near=True))
    with pytest.raises(ConfigError, match=r'data.quality.near = true .* streaming = true: .* add "near" to .*skip_qu'):
        prepare_data(config, 300)
    (rows,) = streamed.sources
    skipping = dataclasses.replace(rows, skip_quality=("near",))
    assert prepare_data(dataclasses.replace(config, sources=(skipping,)), 300).sources


def test_short_documents_are_no_outliers(corpus):
    assert "divergence" in cleaned(corpus, max_divergence=0.5).rules[0]
    assert cleaning.SHORTEST == 512
    assert not cleaned(corpus, exact=False, near=False, lines=False, heuristics=False, max_divergence=9.0).rules[0]
