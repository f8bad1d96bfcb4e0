"""Structured output: which tokens may come so that the text matches a regular expression or is JSON of a schema.

The work is done by the llguidance library (derivatives of regular expressions over the tokenizer's trie), which the
extra `structured` installs. What is made here goes into SamplingParams.mask.

    mask = grammar.regex(r"[0-9]{3}-[0-9]{4}", tokenizer)
    engine.generate(prompts, SamplingParams(mask=mask))
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe_lm.config import ConfigError
from moe_lm.engine.request import TokenMask

JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""The form of json.dumps. Were any white space allowed between two items, a small model could go on with it forever."""


LONGEST_REASON = 300
"""Characters: the library quotes what is wrong as a whole, which may be megabytes."""


class Grammar:
    """The state of one text in a grammar: a TokenMask. Only end tokens may follow a complete match, nothing them."""

    def __init__(self, matcher, size: int, end: frozenset[int]):
        self.matcher, self.size, self.end = matcher, size, end
        self.unread = 0
        """Last tokens that the matcher has not consumed: the end token or one that is not allowed, and what followed.
        The matcher would not come back from them by itself."""

    def allowed(self) -> Tensor:
        """Tokens that may come next, bool (vocabulary of the tokenizer,); none after an end token."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        # In an error it allows the end alone, as if the text were complete.
        if self.matcher.is_error():
            raise RuntimeError(first_line(self.matcher.get_error()))
        mask = np.unpackbits(bits, bitorder="little", count=self.size).view(np.bool_)
        return torch.from_numpy(mask & (self.unread == 0))

    def advance(self, token: int) -> None:
        """A token came. One that is not allowed, and all after it, count for `rollback` alone."""
        # An id that the tokenizer lacks, as a model of a rounded vocabulary may give, is an error to the library that
        # it does not come back from.
        known = token < self.size and token not in self.end
        if self.unread or not known or not self.matcher.try_consume_tokens([token]):
            self.unread += 1

    def rollback(self, count: int) -> None:
        """Forget the last `count` tokens."""
        unread = min(count, self.unread)
        self.unread -= unread
        if count > unread:
            done = self.matcher.rollback(count - unread)
            assert done, f"rollback({count}) past the start: {self.matcher.get_error()}"


def regex(pattern: str, tokenizer: Tokenizer, end: int | Sequence[int] | None = None) -> Callable[[], TokenMask]:
    """Masks for texts that match `pattern` as a whole, one for each call of what is returned.

    The syntax is that of Rust's regex crate, without look-around and back-references. `end` are the tokens that end a
    text; None for the tokenizer's only special token. Raises ConfigError for a bad pattern, for a tokenizer that does
    not tell its end token, and when llguidance is not installed.
    """
    matcher_class = library().LLMatcher
    return compiled(f"the pattern {pattern!r}", matcher_class.grammar_from_regex(pattern), tokenizer, end)


def json_schema(
    schema: Mapping[str, Any] | str, tokenizer: Tokenizer, end: int | Sequence[int] | None = None
) -> Callable[[], TokenMask]:
    """Masks for JSON texts that `schema`, a JSON schema or its text, allows, written as json.dumps does it.

    `end` and what is raised are as in `regex`; a keyword of the schema that cannot be enforced is an error too.
    """
    try:
        schema = json.loads(schema) if isinstance(schema, str) else dict(schema)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the JSON schema is not JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise ConfigError(f"the JSON schema is {json.dumps(schema)}; it must be an object.")
    matcher_class = library().LLMatcher
    try:
        text = matcher_class.grammar_from_json_schema(schema, overrides=JSON_FORM)
    except ValueError as error:
        raise ConfigError(f"the JSON schema cannot be a grammar: {first_line(str(error))}.") from error
    return compiled("the JSON schema", text, tokenizer, end)


def json_object(tokenizer: Tokenizer, end: int | Sequence[int] | None = None) -> Callable[[], TokenMask]:
    """Masks for any JSON object, written as json.dumps does it. `end` and what is raised are as in `regex`."""
    return json_schema({"type": "object"}, tokenizer, end)


def compiled(what: str, grammar: str, tokenizer: Tokenizer, end: int | Sequence[int] | None) -> Callable[[], TokenMask]:
    """Check a grammar of llguidance, named `what` in errors, and compile it once for all texts."""
    ends = (end,) if isinstance(end, int) else tuple(end) if end is not None else (only_special_token(tokenizer),)
    size = tokenizer.get_vocab_size()
    if not ends or not all(0 <= token < size for token in ends):
        raise ConfigError(f"end = {list(ends)} must be one or more token ids from 0 to {size - 1}.")
    trie = token_trie(tokenizer.to_str(), ends)
    matcher_class = library().LLMatcher
    failed, messages = matcher_class.validate_grammar_with_warnings(grammar, trie)
    if failed:
        # The library quotes the pattern again, with line numbers of its own; what is wrong follows the last "error:".
        last = messages[0].rpartition("error: ")[2]
        raise ConfigError(f"{what} cannot be a grammar: {first_line(last if last.strip() else messages[0])}.")
    first = matcher_class(trie, grammar, log_level=0)
    trial = first.deep_copy()
    trial.compute_bitmask()
    if trial.is_error():
        raise ConfigError(f"{what} cannot be a grammar: nothing can begin a text that matches it.")
    return lambda: Grammar(first.deep_copy(), size, frozenset(ends))


def first_line(reason: str) -> str:
    """What the library says is wrong, without what it quotes below and without a full stop."""
    lines = reason.strip().splitlines()
    shown = lines[0][:LONGEST_REASON].rstrip(".") if lines else "it gives no reason"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def only_special_token(tokenizer: Tokenizer) -> int:
    special = [index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    if len(special) != 1:
        raise ConfigError(
            f"the tokenizer has {len(special)} special tokens, not one that would end a text; give its id as end."
        )
    return special[0]


# By its text, because two objects of one tokenizer share their trie and none is kept alive. Making the trie takes 10 ms
# for 300 tokens and about a second for 100,000.
@lru_cache(maxsize=8)
def token_trie(tokenizer: str, end: tuple[int, ...]):
    """llguidance's view of a tokenizer.json."""
    try:
        return library().LLTokenizer(tokenizer, eos_token=list(end))
    except ValueError as error:
        raise ConfigError(f"llguidance cannot read the tokenizer, which must be byte-level BPE: {error}.") from error


def library():
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError("grammars need the llguidance package: pip install 'moe-lm[structured]'.") from error
    return llguidance
