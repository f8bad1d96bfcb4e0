"""Byte-level BPE: training, loading, saving. The type is `tokenizers.Tokenizer` itself, with no wrapper around it."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_lm.config import ConfigError, require

END_OF_TEXT = "<|endoftext|>"

# Words take one leading space or sign with them, digits come in groups of up to three, and the last three branches
# keep a line's end together with the blank lines after it, and its indentation (all but the space that goes with the
# word) as one piece, so that Python source costs few tokens. The rule is the one that GPT-4 and Llama 3 use.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
SMALLEST_VOCABULARY = 257
"""The 256 bytes and the end of text."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` entries; id 0 is END_OF_TEXT, every string round-trips.

    The same texts in the same order give the same tokenizer. It has fewer entries when the texts run out of pairs
    that occur twice. Raises ConfigError where `vocab_size` has no room for the 256 bytes.
    """
    require(
        vocab_size >= SMALLEST_VOCABULARY,
        f"model.vocab_size = {vocab_size} must be at least {SMALLEST_VOCABULARY}: the 256 bytes and {END_OF_TEXT}.",
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # Sorted, because the library hands the alphabet over as a set.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in `path`, a tokenizer.json or a directory with one. Raises ConfigError if there is none."""
    file = Path(path).expanduser()
    file = file / "tokenizer.json" if file.is_dir() else file
    require(file.is_file(), f"there is no tokenizer at {file}: name a tokenizer.json or a directory with one.")
    try:
        return Tokenizer.from_file(str(file))
    # The library raises a bare Exception for everything that is wrong with a file.
    except Exception as error:
        raise ConfigError(f"{file} is not a tokenizer of the tokenizers library: {error}.") from error


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path, max_length: int) -> None:
    """Write tokenizer.json and the tokenizer_config.json with which `transformers.AutoTokenizer` reads it alike.

    `max_length` is the longest sequence, in tokens, that the model takes. The directory is made if need be.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    write_text(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with the line ends of `text`, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(text.encode())
    os.replace(partial, path)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id of END_OF_TEXT. Raises ConfigError for a tokenizer that lacks it."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    require(
        token is not None,
        f"the tokenizer has no {END_OF_TEXT} token, which ends every document: name another in data.tokenizer.",
    )
    return token


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(highest id + 1,) int64: the UTF-8 bytes of text that each token stands for; special tokens stand for none.

    Raises ConfigError for a tokenizer that is not byte-level, whose tokens do not tell.
    """
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.get_added_tokens_decoder()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    lengths = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for token, index in vocabulary.items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
            continue
        require(
            alphabet.issuperset(token),
            f"token {token!r} of the tokenizer is not made of byte-level BPE's characters, so bits per byte cannot be "
            "counted: name a byte-level tokenizer in data.tokenizer.",
        )
        lengths[index] = len(token)
    return lengths


class DocumentEncoder:
    """Turns texts into token arrays in which END_OF_TEXT stands at the end of each document and nowhere else."""

    def __init__(self, tokenizer: Tokenizer):
        self.end_of_text = end_of_text_id(tokenizer)
        self.description = tokenizer.to_str()
        self.dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
        # A copy, because a document that spells out a special token must be read as plain text here only: elsewhere,
        # as in chat prompts, the caller's tokenizer goes on reading it as the token.
        self.tokenizer = Tokenizer.from_str(self.description)
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def identity(self) -> str:
        """A hash of the tokenizer: equal for tokenizers that encode alike."""
        return hashlib.blake2b(self.description.encode(), digest_size=16).hexdigest()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """One array (tokens + 1,) of `self.dtype` per text, its last entry END_OF_TEXT."""
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array([*encoding.ids, self.end_of_text], self.dtype) for encoding in encodings]
