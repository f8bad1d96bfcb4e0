"""Which experts took which tokens: the classes of tokens, the reading of texts, the counts and what is made of them."""

import io
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hub_models import SMALL, random_model
from routed_text import routes_of, tokens_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from moe_lm.data import is_held_out, stdlib, train_tokenizer
from moe_lm.model.attention import whole_rows
from moe_lm.routes import measures, texts
from moe_lm.routes.classes import CLASSES, PYTHON, class_name, keywords_of
from moe_lm.routes.observe import MIN_COUNT, observe, position_span, span_name

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = '''import os
import sys

class Größe:  # 日本 🙂
    """It's a "text"."""

    def f(self, x=0x1F, *args):
        if x is not None and 3.14 < x:
            return self.x[12345]\tor 'none'


for i in range(3):
    print(f"{i}\\n")\r
'''

# Classes


@pytest.mark.parametrize(
    ("text", "before", "after", "name"),
    [
        ("\n", "a", " ", "indent"), ("\n\n", ":", " ", "indent"), ("    ", "\n", "x", "indent"),
        ("\r\n", "a", "", "indent"), ("   ", "", "x", "indent"), ("   ", "=", "x", "space"), ("\t", "a", "b", "space"),
        (" ", "a", "", "space"), ("self", "(", ".", "word"), (" self", "f", ".", "word"), (".join", ")", "(", "word"),
        ("_name", " ", "", "word"), ("Größe", " ", ":", "word"), ("日本", " ", "", "word"),
        ("_x", "a", "", "word part"), ("utdown", "h", "", "word part"),
        ("x", "0", "1", "word part"), (" if", ":", " ", "keyword"),
        ("def", "\n", " ", "keyword"), ("in", "(", " ", "keyword"), (" if", ":", "f", "word"),
        ("in", "f", " ", "word part"), (" print", ":", "(", "word"), ("not", " ", "_", "word"),
        (" 123", "x", ".", "number"), ("14", ".", " ", "number"), ("²", "x", "", "number"),
        ("):\n", "x", " ", "operator"),
        (" ==", "x", " ", "operator"), ("€", "", "", "operator"), ("#", "", " ", "operator"), ('"""', " ", "", "quote"),
        ("('", "f", "x", "quote"), ("’", "s", "", "quote"), ("'s", "t", "", "word"), ("", "a", "b", "other"),
        ("\x00", "a", "b", "other"), ("\u0301", "e", "", "other"),
    ],
)  # fmt: skip
def test_the_class_of_a_token(text, before, after, name):
    assert class_name(text, before, after, PYTHON) == name
    assert name in CLASSES


def test_words_are_reserved_only_in_files_of_their_language():
    assert "None" in keywords_of("a/b.PY") == keywords_of("python:code") == keywords_of("python:packages")
    assert "struct" in keywords_of("x.rs") != keywords_of("x.py")
    assert not keywords_of("notes.txt") | keywords_of("standard input") | keywords_of("python:prose")


# Texts


@pytest.fixture(scope="module")
def words():
    """A tokenizer that knows the words of TEXT."""
    return train_tokenizer([TEXT.replace("日本 🙂", "")] * 3, 400)


@pytest.mark.parametrize("block", [5, 40, 1 << 16])
def test_a_text_read_in_blocks_has_the_tokens_of_the_whole(words, monkeypatch, block):
    monkeypatch.setattr(texts, "BLOCK", block)
    text = TEXT * 5 + "x" * 100 + "\n" * 30 + TEXT
    found = list(texts.tokens_of(io.StringIO(text, newline=""), "a.py", words))
    assert "".join(token.text for token in found) == text
    whole = words.encode(text).ids
    assert [token.id for token in found] == whole or block == 5  # which cuts inside of a line, and of its words
    if block == 40:
        assert len(list(texts.blocks(io.StringIO(text, newline="")))) > 10


def test_the_classes_of_a_text(words):
    found = list(texts.tokens_of(io.StringIO(TEXT, newline=""), "a.py", words))
    kinds = Counter(CLASSES[token.kind] for token in found)
    assert set(kinds) == set(CLASSES)
    of_kind = {name: {token.text.strip() for token in found if CLASSES[token.kind] == name} for name in CLASSES}
    assert all(text.isdigit() for text in of_kind["number"])
    assert {"def", "for"} < of_kind["keyword"] <= PYTHON
    assert {"import", "class"} & of_kind["word part"] == set()
    prose = list(texts.tokens_of(io.StringIO(TEXT, newline=""), "a.txt", words))
    assert [token[:2] for token in prose] == [token[:2] for token in found]
    assert "keyword" not in {CLASSES[token.kind] for token in prose}


def test_the_librarys_documents_are_those_that_training_holds_out(monkeypatch):
    keys = [f"{i}.py" for i in range(200)]
    library = stdlib.Library(tuple((key, f"code of {key}") for key in keys), (("a.py", "prose"),), 0)
    monkeypatch.setattr(stdlib, "read_library", lambda root: library)
    found = [(name, file.read()) for name, file in texts.documents(["python:code"])]
    assert found == [("python:code", f"code of {key}") for key in keys if is_held_out(key, 0.05)]
    assert 2 < len(found) < 30


def test_rows_end_with_their_text_and_with_the_most_tokens(tokenizer, tmp_path):
    names = []
    for i, size in enumerate((300, 0, 45)):
        names.append(str(tmp_path / f"{i}.txt"))
        (tmp_path / f"{i}.txt").write_text("ab " * size, "utf-8")
    sizes = [len(row) for row in texts.rows(names, tokenizer, 100, 10**9)]
    first, last = (len(tokenizer.encode("ab " * size).ids) for size in (300, 45))
    assert sizes == [100] * (first // 100) + [first % 100] * (first % 100 > 0) + [100] * (last // 100) + [last % 100]
    assert [len(row) for row in texts.rows(names, tokenizer, 100, 130)] == [100, 30]


def test_a_tokenizer_of_single_spaces(monkeypatch):
    """As Mixtral's, which also begins every text with a token that is none of it."""
    spaced = Tokenizer(models.BPE(unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    text = "def main():\n     return  0 # none\n"
    kinds = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>"], show_progress=False)
    spaced.train_from_iterator([text] * 20, kinds)
    spaced.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = list(texts.tokens_of(io.StringIO(text), "a.py", spaced))
    assert "".join(token.text for token in found) == text
    assert [(token.text, CLASSES[token.kind]) for token in found][:2] == [("", "other"), ("def", "keyword")]
    assert [CLASSES[token.kind] for token in found if token.text == " "] == ["indent"] * 4 + ["space"]
    monkeypatch.setattr(texts, "BLOCK", 10)
    found = list(texts.tokens_of(io.StringIO(text * 3), "a.py", spaced))
    assert "".join(token.text for token in found) == text * 3
    assert [i for i, token in enumerate(found) if not token.text] == [0]


# What is counted, against loops over the tokens


@pytest.fixture(scope="module")
def observed():
    """A random mixture's routes of three rows, and per row and layer the experts and probabilities of each token."""
    model, draw = random_model(SMALL["mixture"]), random.Random(0)
    rows = [[texts.Token(draw.randrange(40), f"t{i}", draw.randrange(9)) for i in range(size)] for size in (50, 3, 1)]
    routes = observe(model, rows, 50, 52)
    said = []
    for row in rows:
        ids = torch.tensor([[token.id for token in row]])
        _, routings = model.hidden_states(ids, torch.arange(len(row))[None], whole_rows())
        said.append([(r.routing.experts.tolist(), torch.softmax(r.logits, -1).detach().numpy()) for r in routings])
    return rows, routes, said


def test_counts_are_those_of_a_loop(observed):
    rows, routes, said = observed
    assert routes.tokens == 54
    for number, layer in enumerate(routes.layers):
        kinds, spans, pairs, by_token = Counter(), Counter(), Counter(), Counter()
        entropy, confidence, shared, steps = [], [], 0, 0
        windows = {size: [] for size in measures.WINDOWS}
        for row, layers in zip(rows, said, strict=True):
            experts, probabilities = layers[number]
            for place, (token, chosen) in enumerate(zip(row, experts, strict=True)):
                for a in chosen:
                    kinds[token.kind, a] += 1
                    spans[position_span(place), a] += 1
                    by_token[token.id, a] += 1
                    pairs.update((a, b) for b in chosen)
                entropy.append(-sum(p * np.log(p) for p in probabilities[place]))
                confidence.append(max(probabilities[place]))
                if place + 1 < len(row):
                    shared, steps = shared + len(set(chosen) & set(experts[place + 1])), steps + 1
                for size, counts in windows.items():
                    if place + size <= len(row):
                        counts.append(len(set().union(*experts[place : place + size])))
        for table, counted in ((layer.by_class, kinds), (layer.by_position, spans), (layer.pairs, pairs)):
            assert {place: int(table[place]) for place in np.ndindex(table.shape) if table[place]} == dict(counted)
        assert layer.by_token == by_token
        assert layer.counts.sum() == 108
        assert layer.entropy == pytest.approx(np.mean(entropy), rel=1e-5)
        assert layer.confidence == pytest.approx(np.mean(confidence), rel=1e-5)
        assert layer.again == shared / steps / 2
        assert layer.distinct == pytest.approx([np.mean(counts) for counts in windows.values()])


def test_the_head_is_kept_as_it_was(observed):
    rows, routes, said = observed
    assert routes.head == [*rows[0], *rows[1][:2]]
    assert [kept.shape for kept in routes.head_choices] == [(2, 50, 2), (2, 2, 2)]
    assert routes.head_choices[0][1].tolist() == said[0][1][0]
    assert routes.head_weights[0].sum(-1) == pytest.approx(1)
    assert routes.kinds == Counter(token.kind for row in rows for token in row)
    assert routes.texts[rows[0][0].id] == "t0"


def test_rows_of_one_token_have_no_neighbours():
    routes = routes_of([tokens_of(["a"])], lambda layer, index: [0, 1])
    assert routes.layers[0].again is None
    assert routes.layers[0].distinct == [2.0, *[None] * 7]


def test_spans_of_positions():
    assert [position_span(place) for place in (0, 1, 2, 3, 4, 7, 8, 255, 256)] == [0, 1, 2, 2, 3, 3, 4, 8, 9]
    assert [span_name(span) for span in range(5)] == ["0", "1", "2-3", "4-7", "8-15"]


def test_what_is_characteristic_of_an_expert():
    words = ["a"] * 10 + ["b"] * 20 + ["c"] * 7 + ["d"] * 63
    routes = routes_of([tokens_of(words)], lambda layer, index: [(0,), (0,), (1,), (2,)][index], 1, 4, 1, 128)
    first, rare, other, dead = routes.layers[0].characteristic
    assert [(each.id, each.count) for each in first] == [(1, 20), (0, 10)]
    assert first[0].lift == pytest.approx(100 / 30)
    assert rare == []  # seven is too few to tell
    assert MIN_COUNT == 8
    assert [(each.id, each.lift) for each in other] == [(3, pytest.approx(100 / 63))]
    assert dead == []
    assert routes.layers[0].dead == [3]


# Measures


def test_loads_and_lifts():
    assert measures.relative_load(np.array([1, 2, 3, 2])).tolist() == [0.5, 1, 1.5, 1]
    assert measures.relative_load(np.array([[0, 0], [3, 1]])).tolist() == [[0, 0], [1.5, 0.5]]
    table = np.array([[8, 0, 0], [0, 0, 0], [4, 4, 0]])
    assert measures.lift(table).tolist() == [[8 / (8 * 12 / 16), 0, 1], [1, 1, 1], [4 / 6, 2, 1]]


def test_information_is_none_of_chance_and_all_of_a_rule():
    assert measures.information(np.diag([500, 500, 1000])) == pytest.approx(1, abs=2e-3)
    assert measures.information(np.outer([10, 20], [1, 2, 3])) == 0
    assert measures.information(np.zeros((3, 4))) == 0
    assert measures.information(np.array([[5, 0], [7, 0]])) == 0
    draw = np.random.default_rng(0)
    chance = [measures.information(draw.multinomial(400, [1 / 80] * 80).reshape(5, 16)) for _ in range(200)]
    assert np.mean(chance) < 0.006  # what is above 0 half of the time; uncorrected it is 0.027


@pytest.mark.parametrize(("experts", "top_k"), [(2, 2), (5, 2), (8, 3), (16, 2), (64, 8)])
def test_pairs_expected_of_loads_keep_every_load(experts, top_k):
    draw = np.random.default_rng(experts)
    tokens = 500
    counts = np.zeros(experts, np.int64)
    skew = draw.dirichlet(np.ones(experts)) if experts > 2 else np.full(2, 0.5)
    for _ in range(tokens):
        counts[draw.choice(experts, top_k, replace=False, p=skew)] += 1
    expected = measures.independent_pairs(counts, top_k)
    assert (expected.diagonal() == 0).all()
    assert expected == pytest.approx(expected.T)
    assert expected.sum(1) == pytest.approx(counts * (top_k - 1), rel=1e-3, abs=0.1)
    even = measures.independent_pairs(np.full(experts, 10 * experts), top_k)
    assert even[0, 1:] == pytest.approx(10 * experts * (top_k - 1) / (experts - 1), rel=1e-4)


def test_pairs_of_a_router_that_pairs_by_rule_stand_out():
    draw = random.Random(0)
    words = [str(draw.randrange(8)) for _ in range(4000)]
    rows = [tokens_of(words)]
    partners = routes_of(rows, lambda layer, index: [index, index ^ 1], 1, 8, 2, 4096).layers[0]
    ratio = measures.pair_ratio(partners.pairs, 2)
    assert all(6 < ratio[e, e ^ 1] < 8 for e in range(8))
    assert ratio[0, 2] == ratio[5, 7] == 0
    others = np.random.default_rng(0)
    loose = routes_of(rows, lambda *_: others.choice(8, 2, replace=False).tolist(), 1, 8, 2, 4096).layers[0]
    ratio = measures.pair_ratio(loose.pairs, 2)
    assert abs(ratio[~np.eye(8, dtype=bool)] - 1).max() < 0.35
    assert (measures.pair_ratio(np.diag([3, 4, 5]), 1) == 1).all()


def test_windows_of_independent_tokens_are_as_expected():
    draw, words = np.random.default_rng(1), [str(i) for i in range(6000)]
    shares = np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02])
    layer = routes_of(
        [tokens_of(words)], lambda *_: draw.choice(8, 2, replace=False, p=shares).tolist(), 1, 8, 2, 8192
    ).layers[0]
    assert layer.distinct == pytest.approx(measures.distinct_if_independent(layer.counts, 6000), rel=0.02)
    assert layer.again == pytest.approx(measures.again_if_independent(layer.counts, 6000, 2), rel=0.04)
    uniform = measures.distinct_if_uniform(8, 2)
    assert uniform[:2] == pytest.approx([2, 8 * (1 - 0.75**2)])
    assert all(a > b for a, b in zip(uniform[1:], layer.distinct[1:], strict=True))
    even = np.full(8, 1500)
    assert measures.distinct_if_independent(even, 6000) == pytest.approx(uniform)
    assert measures.again_if_independent(even, 6000, 2) == pytest.approx(2 / 8)
