"""What the benchmark of generation asks for: the same requests of every contender, other ones every turn. No torch."""

import dataclasses
import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from moe_lm.config import ModelConfig, require
from moe_lm.data import stdlib

SHAPES = {
    name: ModelConfig(
        vocab_size=8192, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=1,
        intermediate_size=width, num_local_experts=16, num_experts_per_tok=2, max_position_embeddings=1024,
    )
    for name, hidden, layers, heads, width in (
        ("tiny", 256, 4, 8, 512), ("small", 512, 8, 8, 1024), ("base", 1024, 12, 16, 1792),
    )
}  # fmt: skip
"""Shapes of models with random weights, of 30, 215 and 1,101 million parameters."""

TEXT_TOKENS = 1 << 16
"""Length of the text that prompts are cut from."""
LEAST_TEXT_TOKENS = 1 << 12


@dataclass(frozen=True)
class Workload:
    """Requests that all arrive at once, each to be continued greedily to its full length."""

    prompts: list[list[int]]
    outputs: list[int]
    """New tokens of each."""

    @property
    def tokens(self) -> int:
        """New tokens of all."""
        return sum(self.outputs)

    def shortened(self, most: int) -> "Workload":
        """The same with at most so many new tokens each."""
        return dataclasses.replace(self, outputs=[min(most, n) for n in self.outputs])


@dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    name: str
    """`prefill`: tokens of prompt per second until there is a new token. `decode`: new tokens per second once every
    request has one. `trace`: new tokens per second over the whole."""
    batch: int
    """Requests."""
    prompt: tuple[int, int]
    """Fewest and most tokens of a prompt."""
    output: tuple[int, int]
    """Fewest and most new tokens of a request."""

    @property
    def context(self) -> int:
        """Positions that the longest request may take."""
        return self.prompt[1] + self.output[1]

    def lengths(self) -> list[tuple[int, int]]:
        """Prompt and output of each request, the same in every turn."""
        draw = random.Random(f"{self.name} {self.batch}")
        return [(draw.randint(*self.prompt), draw.randint(*self.output)) for _ in range(self.batch)]

    def workload(self, text: list[int], turn: int) -> Workload:
        """The requests of one turn, their prompts cut from `text` at places of that turn.

        No two turns share a prompt, so that a cache of prefixes finds none of the last turn's.
        """
        draw = random.Random(f"{self.name} {self.batch} {turn}")
        lengths = self.lengths()
        starts = [draw.randrange(len(text) - n) for n, _ in lengths]
        return Workload(
            [text[start : start + n] for start, (n, _) in zip(starts, lengths, strict=True)], [n for _, n in lengths]
        )


CASES = (
    Case("prefill", 1, (512, 512), (1, 1)),
    *(Case("decode", batch, (32, 32), (128, 128)) for batch in (1, 4, 16)),
    Case("trace", 32, (16, 256), (16, 128)),
)
QUICK_CASES = (
    Case("prefill", 1, (24, 24), (1, 1)),
    *(Case("decode", batch, (6, 6), (8, 8)) for batch in (1, 2)),
    Case("trace", 4, (4, 16), (2, 8)),
)


def random_text(vocab_size: int) -> list[int]:
    """Token ids without any order, the same every time: what a model with random weights reads."""
    return random.Random(0).choices(range(vocab_size), k=TEXT_TOKENS)


def stdlib_text(tokenizer: Tokenizer) -> list[int]:
    """Python source of the running interpreter's standard library, files in an order that is the same every time.

    Models of this house have been trained on most of it. Raises ConfigError where the interpreter came without it.
    """
    root = stdlib.stdlib_root()
    files = stdlib.stdlib_files(root, (".py",))
    random.Random(0).shuffle(files)
    tokens: list[int] = []
    for file in files:
        tokens += tokenizer.encode((root / file).read_text("utf-8", errors="replace")).ids
        if len(tokens) >= TEXT_TOKENS:
            break
    require(
        len(tokens) > LEAST_TEXT_TOKENS,
        f"the standard library at {root} has {len(tokens)} tokens of source to cut prompts from, and more than "
        f"{LEAST_TEXT_TOKENS} are needed: use a complete installation of Python, or --shape.",
    )
    return tokens
