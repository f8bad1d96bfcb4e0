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
    text = library().LLMatcher.grammar_from_json_schema(schema, overrides=JSON_FORM)
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
        reason = messages[0].rpartition("error: ")[2].strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"{what} cannot be a grammar: {reason}.")
    first = matcher_class(trie, grammar, log_level=0)
    return lambda: Grammar(first.deep_copy(), size, frozenset(ends))


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
