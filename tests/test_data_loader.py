"""The loader: splits are disjoint, caches are reused, bytes are exact, and a resumed run reads what it would have."""

import ast
import json
import os
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from batches import documents_of, same

from moe_lm.config import ConfigError, DataConfig, SourceConfig
from moe_lm.data import cache, loader, prepare_data, stdlib
from moe_lm.data.mixture import Mixture
from moe_lm.data.packing import IGNORED
from moe_lm.data.sources import is_held_out, open_source
from moe_lm.data.tokenizer import save_tokenizer, train_tokenizer

LENGTH = 16


def write_rows(path, count, words="alpha beta gamma delta"):
    rows = [{"text": f"{words} {i} " * (i % 9 + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["text"] for row in rows]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A directory of text files and a file of rows, with their config."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "text").mkdir()
    for i in range(60):
        (root / "text" / f"{i}.txt").write_text(f"file {i} says é {'word ' * (i % 7)}" * (i % 5 + 1))
    write_rows(root / "rows.jsonl", 80)
    sources = (SourceConfig(str(root / "text"), epochs=2.0), SourceConfig(str(root / "rows.jsonl"), epochs=4.0))
    return DataConfig(sources=sources, validation_fraction=0.2, cache_dir=str(root / "cache"))


@pytest.fixture(scope="module")
def data(corpus):
    return prepare_data(corpus, 300)


def test_each_document_is_on_its_side_and_none_is_lost(data):
    for source, opened in zip(data.sources, data.opened, strict=True):
        for split, side in ((source.train, False), (source.validation, True)):
            expected = [d.text for d in opened if is_held_out(d.key, 0.2) == side]
            assert documents_of(data, split) == expected
            assert split.num_bytes == sum(len(text.encode()) for text in expected)
            assert split.num_bytes == data.token_bytes[split.tokens.astype(np.int64)].sum()
            assert split.num_documents == len(expected) > 3
            assert split.tokens.dtype == np.uint16


def test_a_pass_reads_every_training_token_once_in_an_order_of_its_own(data):
    split = data.sources[0].train
    passes = []
    for seed in (0, 1):
        reader = loader.ShuffledRows(split, (seed, 0), LENGTH)
        rows = reader.windows(0, 2 * reader.rows_per_pass)
        passes += [rows[: reader.rows_per_pass], rows[reader.rows_per_pass :]]
    for rows in passes:
        # Every token but the first of the line is predicted once; the last row is filled up with END_OF_TEXT.
        counts = Counter(rows[:, 1:].ravel().tolist()) - Counter(split.tokens.tolist())
        assert set(counts) <= {split.tokens[-1]}
        missing = Counter(split.tokens.tolist()) - Counter(rows[:, 1:].ravel().tolist())
        assert sum(missing.values()) <= 1
    assert len({rows.tobytes() for rows in passes}) == 4


def test_rows_are_those_of_a_plain_concatenation_in_another_order(data):
    split = data.sources[1].train
    parts = [split.tokens[a:b] for a, b in pairwise(split.starts)]
    reader = loader.ShuffledRows(split, (5, 1), LENGTH)
    for number in range(3):
        line = np.concatenate([parts[i] for i in np.random.default_rng([5, 1, number]).permutation(len(parts))])
        line = np.append(line, [line[-1]] * LENGTH)
        expected = [line[i * LENGTH : (i + 1) * LENGTH + 1].tolist() for i in range(reader.rows_per_pass)]
        first = number * reader.rows_per_pass
        got = [row.tolist() for start in range(0, reader.rows_per_pass, 7)
               for row in reader.windows(first + start, min(7, reader.rows_per_pass - start))]  # fmt: skip
        assert sorted(got) == sorted(expected)
        assert got != expected


def test_neighbouring_rows_come_from_different_documents(data):
    """A batch of consecutive rows of one document is a bad sample: it cost half the learning of a short run."""
    train = data.train_loader(0, LENGTH)
    line = {index: loader.ShuffledRows(s.train, (0, index), LENGTH) for index, s in enumerate(data.sources)}
    assert train.next_batch(8).num_targets > 0
    for reader in line.values():
        order = reader.order(0).rows
        assert (np.abs(np.diff(order)) == 1).mean() < 0.5


@pytest.mark.parametrize("sizes", [[1, 1, 1], [8, 3, 40], [100]])
def test_a_resumed_loader_gives_the_same_batches_however_it_was_cut(data, sizes):
    straight = data.train_loader(3, LENGTH)
    for rows in sizes:
        straight.next_batch(rows)
    whole = data.train_loader(3, LENGTH)
    whole.next_batch(sum(sizes))
    resumed = data.train_loader(3, LENGTH)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for rows in (5, 1, 64):
        batches = [each.next_batch(rows) for each in (straight, whole, resumed)]
        assert same(batches[0], batches[1])
        assert same(batches[0], batches[2])
        assert batches[0].tokens.shape == (rows, LENGTH)
    assert not same(data.train_loader(4, LENGTH).next_batch(8), data.train_loader(3, LENGTH).next_batch(8))


def test_batches_join_to_the_line_of_rows_that_the_mixture_deals_out(data):
    sources = Mixture(data.train_loader(3, LENGTH).mixture.shares).take(60)
    train = data.train_loader(3, LENGTH)
    got = torch.cat([train.next_batch(rows).tokens for rows in (7, 1, 20, 32)])
    for index, source in enumerate(data.sources):
        count = int((sources == index).sum())
        expected = loader.ShuffledRows(source.train, (3, index), LENGTH).windows(0, count)[:, :-1]
        assert count > 5
        assert got[sources == index].tolist() == expected.tolist()


def test_sources_are_read_by_epochs_times_tokens(data):
    train = data.train_loader(0, LENGTH)
    train.next_batch(600)
    passes = [n * LENGTH / s.train.num_tokens for n, s in zip(train.state_dict()["rows"], data.sources, strict=True)]
    assert passes[1] / passes[0] == pytest.approx(2, rel=0.02)


def test_a_saved_loader_of_another_run_is_refused(data, corpus, tmp_path):
    state = data.train_loader(0, LENGTH).state_dict()
    with pytest.raises(ConfigError, match=r"train\.seed = 1 is not the 0 of the saved run"):
        data.train_loader(1, LENGTH).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data\.sequence_length = 8 is not the 16"):
        data.train_loader(0, 8).load_state_dict(state)
    write_rows(tmp_path / "rows.jsonl", 80, words="other")
    changed = DataConfig((corpus.sources[0], SourceConfig(str(tmp_path / "rows.jsonl"))), cache_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="does not give the tokens that the saved run read"):
        prepare_data(changed, 300, tokenizer=data.tokenizer).train_loader(0, LENGTH).load_state_dict(state)


def test_validation_scores_every_held_out_token_once_and_counts_its_bytes(data):
    for index, source in enumerate(data.sources):
        batches = list(data.validation_batches(index, LENGTH, 10**9, 4))
        targets = torch.cat([b.targets[b.targets != IGNORED] for b in batches])
        line = source.validation.tokens.astype(np.int64)
        first = np.isin(np.arange(len(line)), source.validation.starts)
        assert Counter(targets.tolist()) == Counter(line[~first].tolist())
        assert sum(b.num_bytes for b in batches) == data.token_bytes[line[~first]].sum()
        assert sum(b.num_targets for b in batches) == len(targets)
        assert max(len(b.tokens) for b in batches) == 4


def test_a_small_evaluation_is_the_start_of_a_large_one_and_does_not_depend_on_the_batch(data):
    small = torch.cat([b.tokens for b in data.validation_batches(0, LENGTH, 5 * LENGTH, 2)])
    large = torch.cat([b.tokens for b in data.validation_batches(0, LENGTH, 10**9, 7)])
    assert small.shape == (5, LENGTH)
    assert torch.equal(small, large[:5])
    assert len(list(data.validation_batches(0, LENGTH, 1, 8))) == 1


def test_a_second_start_reads_the_cache_and_a_change_does_not(corpus, data, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_source", refuse)
        patch.setattr(loader, "train_tokenizer", refuse)
        again = prepare_data(corpus, 300)
        assert again.tokenizer.to_str() == data.tokenizer.to_str()
        assert same(again.train_loader(0, LENGTH).next_batch(9), data.train_loader(0, LENGTH).next_batch(9))
        with pytest.raises(AssertionError, match="tokenized again"):
            prepare_data(corpus, 299, tokenizer=train_tokenizer(["other"], 299))
    before = data.sources[0].train.num_documents + data.sources[0].validation.num_documents
    added = [f"{corpus.sources[0].path}/new{i}.txt" for i in range(9)]
    for path in added:
        with open(path, "w") as file:
            file.write("new words")
    after = prepare_data(corpus, 300, tokenizer=data.tokenizer).sources[0]
    for path in added:
        os.remove(path)
    assert after.train.num_documents + after.validation.num_documents == before + 9


def test_the_tokenizer_is_given_named_or_refused(corpus, data, tmp_path):
    given = train_tokenizer(["some text"] * 9, 280)
    assert prepare_data(corpus, 300, tokenizer=given).tokenizer is given
    save_tokenizer(given, tmp_path, 64)
    named = DataConfig(corpus.sources, validation_fraction=0.2, tokenizer=str(tmp_path), cache_dir=corpus.cache_dir)
    assert prepare_data(named, 300).tokenizer.to_str() == given.to_str()
    with pytest.raises(ConfigError, match=rf"has {given.get_vocab_size()} tokens, more than model\.vocab_size = 257"):
        prepare_data(named, 257)


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    source = SourceConfig(str(tmp_path / "rows.jsonl"))
    written = write_rows(tmp_path / "rows.jsonl", 50)
    sample = loader.sample_texts(open_source(source), False, 0.3, 10**6)
    assert sorted(sample) == sorted(d.text for d in open_source(source) if not is_held_out(d.key, 0.3))
    assert 0 < len(sample) < len(written)
    small = loader.sample_texts(open_source(source), False, 0.3, 500)
    assert small == sample[: len(small)]
    assert sum(map(len, small[:-1])) < 500 <= sum(map(len, small))
    first = loader.sample_texts(open_source(source), True, 0.3, 500)
    assert first == [d.text for d in open_source(source) if not is_held_out(d.key, 0.3)][: len(first)]


def test_a_cache_that_cannot_be_written_or_read_names_itself(corpus, data, tmp_path):
    (tmp_path / "file").write_text("")
    blocked = DataConfig(corpus.sources, validation_fraction=0.2, cache_dir=str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"data\.cache_dir = .*file cannot be written .*: name another"):
        prepare_data(blocked, 300)
    private = DataConfig(corpus.sources[:1], validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    prepare_data(private, 300, tokenizer=data.tokenizer)
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "train.npy").write_bytes((entry / "train.npy").read_bytes()[:-8])
    with pytest.raises(ConfigError, match=r"is damaged .*: delete that directory"):
        prepare_data(private, 300, tokenizer=data.tokenizer)


def test_a_failed_write_leaves_nothing_behind(corpus, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": \n')
    broken = DataConfig((SourceConfig(str(tmp_path / "rows.jsonl")),), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="cannot be"):
        prepare_data(broken, 300)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_split_without_two_sides_names_a_fraction_that_works(tmp_path):
    tokenizer = train_tokenizer(["text"], 257)

    def prepare(fraction):
        config = DataConfig(
            (SourceConfig(str(tmp_path / "text")),), validation_fraction=fraction, cache_dir=str(tmp_path)
        )
        return prepare_data(config, 257, tokenizer=tokenizer)

    (tmp_path / "text").mkdir()
    with pytest.raises(ConfigError, match="holds no text"):
        prepare(0.5)
    (tmp_path / "text" / "0.txt").write_text("text 0")
    with pytest.raises(ConfigError, match="holds one document"):
        prepare(0.5)
    for i in range(1, 5):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text {i}")
    for fraction, what in ((0.0001, "none of the 5 documents.* raise it to"), (0.9999, "all 5 documents.*lower it to")):
        with pytest.raises(ConfigError, match=what) as caught:
            prepare(fraction)
        named = str(caught.value).split(" it to ")[1].split()[0]
        assert prepare(float(named)).sources[0].validation.num_documents in (1, 4)


@pytest.fixture(scope="module")
def python_data(tmp_path_factory):
    """The real standard library, every sixth file of it."""
    every_file = stdlib.stdlib_files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib, "stdlib_files", lambda root, suffixes: every_file(root, suffixes)[::6])
        stdlib.read_library.cache_clear()
        yield prepare_data(DataConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))), 512)
    stdlib.read_library.cache_clear()


def test_the_standard_library_trains_and_holds_out_apart(python_data):
    prose, code = python_data.opened
    keys = [{d.key for d in source if not is_held_out(d.key, 0.05)} for source in (prose, code)]
    held = [{d.key for d in source if is_held_out(d.key, 0.05)} for source in (prose, code)]
    assert not (keys[0] | keys[1]) & (held[0] | held[1])
    for opened, source in zip(python_data.opened, python_data.sources, strict=True):
        assert source.train.num_documents == sum(not is_held_out(d.key, 0.05) for d in opened) > 50
        train, held_out = (set(documents_of(python_data, split)) for split in (source.train, source.validation))
        assert held_out == {d.text for d in opened if is_held_out(d.key, 0.05)}
        assert not train & held_out


def test_code_compiles_without_docstrings_and_prose_is_not_code(python_data):
    prose, code = python_data.opened
    for document in code:
        tree = ast.parse(document.text)
        compile(tree, document.key, "exec", dont_inherit=True)
        assert not any(stdlib.leading_strings(node) for _, node in stdlib.definitions(tree, ""))
    assert not {d.text for d in prose} & {d.text for d in code}
    assert sum("def " in d.text for d in code) > 50
    total = sum(d.text.count(" ") for d in prose)
    assert sum(d.text.count("self.") for d in prose) < total / 50


def test_a_batch_is_cheap(python_data):
    train = python_data.train_loader(0, 256)
    train.next_batch(32)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        train.next_batch(32)
        times.append(time.perf_counter() - start)
    # Around 1 ms; the best of many, since the machine may be busy with other things.
    assert min(times) < 5e-3


def test_importing_the_data_package_and_opening_python_sources_leaves_datasets_alone():
    code = (
        "import sys, moe_lm.data as d; from moe_lm.config import SourceConfig; "
        "d.open_source(SourceConfig('python:code')); "
        "sys.exit(any(name in sys.modules for name in ('datasets', 'transformers', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
