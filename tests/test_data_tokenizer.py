"""The tokenizer: exact round trips, few tokens for indentation, the same ids in transformers, errors with a knob."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from moe_lm.config import ConfigError
from moe_lm.data.tokenizer import (
    END_OF_TEXT,
    DocumentEncoder,
    end_of_text_id,
    load_tokenizer,
    save_tokenizer,
    token_byte_lengths,
    train_tokenizer,
)

CODE = "def area(self, width, height):\n    if width:\n        return width * height\n    return 0\n\n\n"
TOKENIZER = train_tokenizer([CODE * 20, "the quick brown fox, 1234567 times " * 20], 400)
UGLY = [
    "",
    " ",
    "\r\n \t\n",
    "naïve 🙂 – 漢字 \u00a0\u200b",
    "\x00\x7f",
    "a  b   c\n\n\n    d ",
    "'Ll don't",
    "12345678",
    "\f\v",
]


@pytest.mark.parametrize("text", UGLY)
def test_every_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_round_trip_and_byte_lengths_hold_for_any_text(text):
    ids = DocumentEncoder(TOKENIZER).encode([text])[0].astype(np.int64)
    assert TOKENIZER.decode(ids.tolist()) == text
    assert token_byte_lengths(TOKENIZER)[ids].sum() == len(text.encode())


def test_indentation_and_digits_are_grouped():
    pieces = [TOKENIZER.decode([i]) for i in TOKENIZER.encode("    if width:\n        return width").ids]
    assert pieces == ["   ", " if", " width", ":\n", "       ", " return", " width"]
    digits = [TOKENIZER.decode([i]) for i in TOKENIZER.encode("1234567").ids]
    assert all(len(piece) <= 3 for piece in digits)
    assert "123" in digits


def test_the_end_of_text_is_id_zero_and_training_repeats():
    assert end_of_text_id(TOKENIZER) == 0
    assert TOKENIZER.encode(f"a{END_OF_TEXT}").ids[-1] == 0
    again = train_tokenizer([CODE * 20, "the quick brown fox, 1234567 times " * 20], 400)
    assert again.to_str() == TOKENIZER.to_str()


def test_the_vocabulary_is_as_asked_or_smaller():
    words = [" ".join(f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx")] * 2
    assert train_tokenizer(words, 300).get_vocab_size() == 300
    assert train_tokenizer(["ab"], 300).get_vocab_size() == 257
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 256 must be at least 257"):
        train_tokenizer(["ab"], 256)


def test_a_document_that_spells_out_the_end_of_text_does_not_end():
    encoder = DocumentEncoder(TOKENIZER)
    (ids,) = encoder.encode([f"x{END_OF_TEXT}y"])
    assert ids.dtype == np.uint16
    assert (ids == 0).nonzero()[0].tolist() == [len(ids) - 1]
    assert TOKENIZER.decode(ids.tolist()) == f"x{END_OF_TEXT}y"
    # The tokenizer that was handed in still reads the token.
    assert 0 in TOKENIZER.encode(END_OF_TEXT).ids


def test_save_and_load_agree_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(TOKENIZER, tmp_path, max_length=512)
    settings_ = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings_["tokenizer_class"] == "PreTrainedTokenizerFast"
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = [load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")]
    assert (theirs.eos_token_id, theirs.bos_token_id, theirs.model_max_length) == (0, 0, 512)
    for text in [*UGLY, CODE, "a , b . n't !", f"one{END_OF_TEXT} two"]:
        ids = TOKENIZER.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
        assert all(tokenizer.encode(text).ids == ids for tokenizer in ours)


def test_a_missing_or_broken_tokenizer_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_not_byte_level_or_has_no_end_is_refused():
    words = Tokenizer(models.WordLevel({"漢字": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(ConfigError, match=r"no <\|endoftext\|> token.*data\.tokenizer"):
        end_of_text_id(words)
    with pytest.raises(ConfigError, match=r"bits per byte.*data\.tokenizer"):
        token_byte_lengths(words)
