"""Texts drawn under a grammar, with detours that are taken back, match it; what cannot be a grammar is refused."""

import json
import random
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer

from moe_lm.config import ConfigError
from moe_lm.data.tokenizer import train_tokenizer
from moe_lm.engine import grammar

END = 0
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["héllo", "end"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "done": {"type": "boolean"},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_tokenizer(['héllo wörld 🙂 {"name": "end", "sizes": [12, 345], "done": true} the end.'] * 5, 320)


def drawn(mask, seed: int, detours: bool = True) -> list[int]:
    """A random walk to the end token that now and then goes ahead and comes back, as verified drafts do."""
    choose, tokens = random.Random(seed), []
    while not tokens or tokens[-1] != END:
        allowed = mask.allowed()
        options = allowed.nonzero()[:, 0].tolist()
        if detours and choose.random() < 0.4:
            ahead = [choose.choice([*options, choose.randrange(len(allowed) + 9)]) for _ in range(choose.randint(1, 4))]
            for token in ahead:
                mask.advance(token)
            back = choose.randint(0, len(ahead))
            mask.rollback(back)
            mask.rollback(len(ahead) - back)
            assert torch.equal(mask.allowed(), allowed)
        tokens.append(END if END in options and choose.random() < 0.3 else choose.choice(options))
        mask.advance(tokens[-1])
        assert len(tokens) < 500
    assert not mask.allowed().any()
    return tokens[:-1]


@pytest.mark.parametrize(
    "pattern",
    [r"[0-9]{3}-[0-9]{4}", r"(yes|no|the end)", r"h.llo( w.rld){0,3}", r"[🙂ö]{2,5}", r"a*b?", r"[a-zà-ÿ]{1,8}\."],
)
def test_texts_match_the_pattern(words, pattern):
    make = grammar.regex(pattern, words)
    texts = {words.decode(drawn(make(), seed)) for seed in range(25)}
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(texts) > 1


def test_texts_follow_the_schema(words):
    make, seen = grammar.json_schema(json.dumps(SCHEMA), words), set()
    for seed in range(25):
        text = words.decode(drawn(make(), seed))
        value = json.loads(text)
        assert text == json.dumps(value, ensure_ascii=False)
        assert set(value) in ({"name", "sizes"}, {"name", "sizes", "done"})
        assert value["name"] in ("héllo", "end")
        assert len(value["sizes"]) <= 3
        assert all(type(size) is int and 0 <= size <= 99 for size in value["sizes"])
        assert value.get("done", True) in (True, False)
        seen.add(text)
    assert len(seen) > 5


def test_any_object(words):
    make = grammar.json_object(words)
    mask = make()
    assert mask.allowed().shape == (words.get_vocab_size(),)
    for token in words.encode('{"a": [1, {"b": null}], "c": "d"}').ids:
        assert mask.allowed()[token], words.decode([token])
        mask.advance(token)
    assert mask.allowed().nonzero().tolist() == [[END]]
    assert not make().allowed()[words.encode("[").ids[0]]


def test_the_same_walk_with_and_without_detours(words):
    make = grammar.regex("ab", words)
    mask = make()
    a, b = (words.encode(text).ids[0] for text in "ab")
    mask.advance(a)
    for token in (b, END, b, a):
        mask.advance(token)
    assert not mask.allowed().any()
    mask.rollback(3)
    assert mask.allowed().nonzero().tolist() == [[END]]
    mask.rollback(1)
    assert bool(mask.allowed()[b])
    assert not mask.allowed()[END]
    mask.rollback(1)
    assert torch.equal(mask.allowed(), make().allowed())
    with pytest.raises(AssertionError, match="past the start"):
        mask.rollback(1)


def test_masks_of_one_grammar_are_apart(words):
    make = grammar.regex("(ab|ba)", words)
    one, other = make(), make()
    one.advance(words.encode("a").ids[0])
    assert torch.equal(other.allowed(), make().allowed())
    assert not torch.equal(one.allowed(), other.allowed())


def test_other_end_tokens(words):
    dot = words.encode(".").ids[0]
    mask = grammar.regex("a", words, end=[END, dot])()
    mask.advance(words.encode("a").ids[0])
    assert mask.allowed().nonzero()[:, 0].tolist() == [END, dot]
    mask.advance(dot)
    assert not mask.allowed().any()


def test_one_trie_for_each_tokenizer(words):
    grammar.token_trie.cache_clear()
    for pattern in "abc":
        grammar.regex(pattern, words)
    assert grammar.token_trie.cache_info().misses == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda words: grammar.regex("(a", words), r"the pattern '\(a' cannot be a grammar: unclosed group\.$"),
        (lambda words: grammar.regex("a(?=b)", words), r"cannot be a grammar: look-around"),
        (lambda words: grammar.json_schema({"type": "objectt"}, words), r"schema cannot be a grammar: Invalid type"),
        (lambda words: grammar.json_schema({"not": {}}, words), r"schema cannot be a grammar: Unimplemented keys"),
        (lambda words: grammar.json_schema("{", words), r"the JSON schema is not JSON: Expecting"),
        (lambda words: grammar.json_schema("3", words), r"the JSON schema is 3; it must be an object"),
        (lambda words: grammar.regex("a", words, end=999), r"end = \[999\] must be one or more token ids from 0 to"),
        (lambda words: grammar.regex("a", words, end=[]), r"end = \[\] must be"),
    ],
)
def test_bad_grammars_are_refused(words, make, message):
    with pytest.raises(ConfigError, match=message) as error:
        make(words)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_does_not_tell_its_end_is_refused(words):
    several = Tokenizer.from_str(words.to_str())
    several.add_special_tokens(["<a>", "<b>"])
    with pytest.raises(ConfigError, match=r"has 3 special tokens.* give its id as end"):
        grammar.regex("a", several)
    assert grammar.regex("a", several, end=END)().allowed().any()


@pytest.mark.parametrize("make", [lambda words: grammar.regex("a", words), grammar.json_object])
def test_a_missing_library_is_named(make, words, monkeypatch):
    grammar.token_trie.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"^grammars need .* pip install 'moe-lm\[structured\]'"):
        make(words)
