"""Streamed sources: the training documents in order without end, resumed exactly from any row."""

import json

import numpy as np
import pytest
from batches import documents_of, same

from moe_lm.config import ConfigError, DataConfig, SourceConfig
from moe_lm.data import cache, prepare_data, streaming
from moe_lm.data.sources import is_held_out, open_source

LENGTH = 16


def write_rows(path, count, words="alpha beta gamma delta"):
    rows = [{"text": f"{words} {i} " * (i % 9 + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["text"] for row in rows]


@pytest.fixture
def streamed(tmp_path):
    (tmp_path / "rows").mkdir()
    for i in range(3):
        write_rows(tmp_path / "rows" / f"{i}.jsonl", 25, words=f"part{i} one two")
    source = SourceConfig(str(tmp_path / "rows"), streaming=True)
    return DataConfig((source,), validation_fraction=0.2, cache_dir=str(tmp_path / "cache"))


def test_a_stream_is_the_training_documents_over_and_over(streamed):
    data = prepare_data(streamed, 300)
    train = [d.text for d in data.opened[0] if not is_held_out(d.key, 0.2)]
    line = np.concatenate(data.encoder.encode(train * 3)).tolist()
    reader = data.train_loader(0, LENGTH)
    batch = reader.next_batch(2 * len(line) // 3 // LENGTH)
    assert batch.tokens.ravel().tolist() == line[: batch.tokens.numel()]
    held_out = [d.text for d in data.opened[0] if is_held_out(d.key, 0.2)]
    assert documents_of(data, data.sources[0].validation) == held_out
    assert data.sources[0].train is None


@pytest.mark.parametrize("shards", ["files", "parquet", "hub"])
def test_a_resumed_stream_gives_the_same_rows(streamed, shards, monkeypatch, tmp_path):
    import datasets

    config = streamed
    monkeypatch.setattr(streaming, "CHUNK_DOCUMENTS", 7)
    rows = [{"text": d.text} for d in open_source(streamed.sources[0])]
    if shards == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet", batch_size=10)
        config = DataConfig((SourceConfig(str(tmp_path / "rows.parquet"), streaming=True),), cache_dir=str(tmp_path))
    if shards == "hub":
        made = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made.to_iterable_dataset(num_shards=4))
        config = DataConfig((SourceConfig("owner/name", streaming=True),), cache_dir=str(tmp_path))
    data = prepare_data(config, 300)
    straight = data.train_loader(0, LENGTH)
    states, batches = [straight.state_dict()], []
    for _ in range(40):
        batches.append(straight.next_batch(11))
        states.append(straight.state_dict())
    assert 2 * sum(map(len, data.encoder.encode([row["text"] for row in rows]))) < 40 * 11 * LENGTH
    assert max(len(state["streams"][0]["carried"]) for state in states) <= LENGTH
    for at in (0, 1, 2, 13, 14, 15, 16, 30, 38):
        resumed = data.train_loader(0, LENGTH)
        resumed.load_state_dict(json.loads(json.dumps(states[at])))
        assert resumed.state_dict() == states[at]
        assert same(resumed.next_batch(11), batches[at])
        assert same(resumed.next_batch(11), batches[at + 1])


def test_stream_validation_stops_at_its_bound(streamed, monkeypatch):
    monkeypatch.setattr(cache, "STREAM_VALIDATION_TOKENS", 20)
    monkeypatch.setattr(cache, "CHUNK_DOCUMENTS", 5)
    source = prepare_data(streamed, 300).sources[0]
    assert 20 <= source.validation.num_tokens < 400
    assert source.validation.num_documents <= 5


def test_streams_and_known_sizes_do_not_mix(streamed, tmp_path):
    write_rows(tmp_path / "known.jsonl", 50)
    mixed = DataConfig(
        (*streamed.sources, SourceConfig(str(tmp_path / "known.jsonl"))),
        validation_fraction=0.2,
        cache_dir=streamed.cache_dir,
    )
    with pytest.raises(ConfigError, match=r"1 of 2 data\.sources have streaming = true"):
        prepare_data(mixed, 300).train_loader(0, LENGTH)
