"""From logits to a distribution, and from a distribution to a token, for all rows of a step at once.

n rows, V vocabulary. Everything is on the CPU and float32 unless said otherwise.

A row's result has the same bits whatever the other rows are. Operations are therefore elementwise, exact (maximum,
sort) or one sequential pass along the row (softmax, cumulative sum): never `sum`, which torch splits among threads when
there is one long row and not when there are two.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_lm.engine.request import Logprob, SamplingParams
from moe_lm.engine.uniforms import gumbels, uniform

HEAD = 1024
"""Likeliest tokens that top_p tries first. Finding them in 16 rows of 8,192 and sorting them takes 0.26 ms, sorting all
0.82 ms (numpy 2.4 with AVX-512); from a trained model they hold nearly all of the mass."""

LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)
"""Where the halves of an int64 are in memory."""


class TokenCounts:
    """Which tokens one sequence has, for the penalties. Adding a token is O(1), whatever the length."""

    def __init__(self, vocab_size: int, prompt: list[int]):
        self.seen = np.zeros(vocab_size, np.bool_)
        """(V,) whether a token is in prompt or output."""
        self.output = np.zeros(vocab_size, np.float32)
        """(V,) how often it is in the output."""
        self.seen[prompt] = True

    def add(self, tokens: list[int]) -> None:
        """Tokens came out."""
        for token in tokens:
            self.seen[token] = True
            self.output[token] += 1

    def overlaid(self, drafted: list[int] | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that are seen, ascending, and how often each is in the output, as if `drafted` were at its end."""
        tokens = np.flatnonzero(self.seen)
        if not drafted:
            return tokens, self.output[tokens]
        tokens = np.union1d(tokens, drafted)
        output = self.output[tokens]
        np.add.at(output, np.searchsorted(tokens, drafted), 1)
        return tokens, output


@dataclass
class Row:
    """How the token after one position of one sequence is drawn."""

    params: SamplingParams
    position: int
    """Index of the token to draw in the list of all the sequence's tokens."""
    sample: int = 0
    """Which of the request's n samples."""
    counts: TokenCounts | None = None
    """Of prompt and output, without `drafted`; needed with a penalty only."""
    drafted: list[int] | tuple[int, ...] = ()
    """Guessed tokens between the output and this row."""
    allowed: Tensor | None = None
    """Tokens that may come, bool (V,), or shorter where the last ones of the vocabulary may not; None for all."""
    coupled: bool = False
    """Whether the token is the one that seed and position decide (`decided`), in the draft model as in the target."""

    @property
    def is_decided(self) -> bool:
        """Whether there is one token that may come, given the logits: speculation then cannot change it."""
        return self.coupled or self.params.temperature == 0

    def uniform(self, purpose: int) -> float:
        return uniform(self.params.seed, self.sample, self.position, purpose)


def usable(logits: Tensor) -> list[bool]:
    """Whether each row of logits (n, V) can be drawn from: no NaN, no +inf, and not -inf all over."""
    # numpy's maximum takes 2 us for a row of 8,192, torch's 30 us; both let a NaN through.
    return np.isfinite(logits.numpy().max(1)).tolist()


def cleared(logits: Tensor, ready: list[bool]) -> Tensor:
    """Logits (n, V) with zeros in the rows that are not `usable`, so that the others can be drawn from beside them."""
    return logits if all(ready) else torch.where(torch.tensor(ready)[:, None], logits, 0.0)


def distributions(logits: Tensor, rows: list[Row]) -> Tensor:
    """What each row's token is drawn from, (n, V), given logits (n, V). Greedy rows are one-hot.

    A row of which the mask allows nothing is NaN.
    """
    scores = adjusted(logits, rows)
    greedy = [i for i, row in enumerate(rows) if row.params.temperature == 0]
    if not greedy:
        return filtered(scores, [row.params for row in rows])
    p = torch.zeros_like(scores)
    p[greedy, likeliest(take(scores, greedy))] = 1
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        p = put(p, drawn, filtered(take(scores, drawn), [rows[i].params for i in drawn]))
    return p


def take(x: Tensor, chosen: list[int]) -> Tensor:
    """Some rows of x (n, V), in ascending order; x itself where they are all."""
    return x if len(chosen) == x.shape[0] else x.index_select(0, torch.tensor(chosen, dtype=torch.int64))


def put(x: Tensor, chosen: list[int], new: Tensor) -> Tensor:
    """x (n, V), overwritten in its chosen rows, in ascending order; `new` itself where they are all."""
    # Whole rows: x[chosen] = new goes by elements and takes 3 ms for 16 rows of 8,192.
    return new if len(chosen) == len(x) else x.index_copy_(0, torch.tensor(chosen, dtype=torch.int64), new)


def decided(logits: Tensor, rows: list[Row]) -> list[int]:
    """The token of each row that `is_decided`, given logits (n, V): the likeliest one, or the one whose log-probability
    plus a Gumbel number of its place is highest.

    That has the row's distribution (Gumbel 1954; Maddison et al. 2014), and as a draft model that shares the numbers
    mostly finds the same token, it can guess it without a say in it (Daliri et al. 2024).
    """
    tokens = likeliest(adjusted(logits, rows))
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        own = [rows[i] for i in drawn]
        p = distributions(take(logits, drawn), own).double().numpy()
        noise = [gumbels(row.params.seed, row.sample, row.position, p.shape[1]) for row in own]
        with np.errstate(divide="ignore"):
            found = (np.log(p) + np.stack(noise)).argmax(1).tolist()
        for i, token in zip(drawn, found, strict=True):
            tokens[i] = token
    return tokens


def likeliest(scores: Tensor) -> list[int]:
    """The token of the highest score in each row of (n, V), the lowest id among equals."""
    # numpy's takes 13 us for 16 rows of 8,192, torch's 315 us.
    return scores.numpy().argmax(1).tolist()


def adjusted(logits: Tensor, rows: list[Row]) -> Tensor:
    """Logits (n, V) after mask, logit_bias and penalties: themselves where no row has any, else a copy."""
    masked = [i for i, row in enumerate(rows) if row.allowed is not None]
    biased = [i for i, row in enumerate(rows) if row.params.logit_bias]
    penalised = [i for i, row in enumerate(rows) if row.params.penalised]
    if not (masked or biased or penalised):
        return logits
    scores = logits.clone()
    for i in masked:
        allowed = rows[i].allowed
        scores[i, : len(allowed)].masked_fill_(~allowed, -torch.inf)
        scores[i, len(allowed) :] = -torch.inf
    for i in biased:
        bias = rows[i].params.logit_bias
        scores[i, list(bias)] += torch.tensor(list(bias.values()), dtype=torch.float32)
    if penalised:
        penalise(scores.numpy(), penalised, [rows[i] for i in penalised])
    return scores


def penalise(scores: np.ndarray, chosen: list[int], rows: list[Row]) -> None:
    """Apply the repetition, presence and frequency penalties of `rows` to the chosen rows of scores (n, V), in place.

    Only the tokens that a sequence has are touched, not whole rows.
    """
    tokens, counts = zip(*(row.counts.overlaid(row.drafted) for row in rows), strict=True)
    sizes = [len(each) for each in tokens]
    places, ids, output = np.repeat(chosen, sizes), np.concatenate(tokens), np.concatenate(counts)

    def spread(values: list[float], low: float) -> np.ndarray:
        return np.repeat(np.array([within(value, low) for value in values], np.float32), sizes)

    repetition = spread([row.params.repetition_penalty for row in rows], 1e-30)
    presence = spread([row.params.presence_penalty for row in rows], -2)
    frequency = spread([row.params.frequency_penalty for row in rows], -2)
    old = scores[places, ids]
    new = np.where(old > 0, old / repetition, old * repetition)
    scores[places, ids] = new - presence * (output > 0) - frequency * output


def filtered(scores: Tensor, params: list[SamplingParams]) -> Tensor:
    """The softmax of scores (n, V) by temperature, with what top_k, top_p and min_p leave of it, (n, V)."""
    p = softened(scores, [each.temperature for each in params])
    cut = [i for i, each in enumerate(params) if cuts(each, p.shape[1])]
    if cut:
        p = put(p, cut, torch.from_numpy(keep_head(take(p, cut).numpy(), [params[i] for i in cut])))
    return p


def cuts(params: SamplingParams, vocabulary: int) -> bool:
    """Whether filters may leave tokens of the vocabulary out."""
    return 0 < params.top_k < vocabulary or params.top_p < 1 or params.min_p > 0


def softened(scores: Tensor, temperatures: list[float]) -> Tensor:
    """The softmax of scores (n, V) over temperatures (n), (n, V); 0 counts as the smallest there is."""
    values = np.array([within(value, 1e-30) for value in temperatures], np.float32)[:, None]
    # The highest score becomes 0 first: a tiny temperature then gives -inf to the others, never inf to the best.
    lowered = scores.numpy() - scores.numpy().max(1, keepdims=True)
    with np.errstate(over="ignore"):
        lowered /= values
    return torch.softmax(torch.from_numpy(lowered), dim=1)


def within(value: float, low: float) -> float:
    """`value` within bounds that float32 can divide and multiply by without giving NaN."""
    return min(max(value, low), 1e30)


def keep_head(p: np.ndarray, params: list[SamplingParams]) -> np.ndarray:
    """p (n, V) with zeros outside of top_k, then of top_p of what that leaves, then of min_p; each row's sum is 1."""
    vocabulary = p.shape[1]
    most = np.array([each.top_k if 0 < each.top_k < vocabulary else vocabulary for each in params])
    top_p = np.array([each.top_p for each in params])
    min_p = np.array([each.min_p for each in params], np.float32)[:, None]
    kept, rest = np.zeros_like(p), np.arange(len(p))
    # Rows that need no more than the head have it at the first turn, the others at the second.
    wanted = int(np.where(most < vocabulary, most, min(HEAD, vocabulary)).max())
    for size in (wanted, vocabulary):
        chances, ids = head(p if len(rest) == len(p) else p[rest], size)
        chances *= np.arange(size) < most[rest, None]
        mass = chances.cumsum(1, dtype=np.float64)
        # All tokens together have 1, what top_k leaves has less. top_p = 1 must not stop at a sum that rounding gave.
        border = np.where(most[rest] < vocabulary, mass[:, -1], 1.0) * np.where(top_p[rest] < 1, top_p[rest], np.inf)
        least = min_p[rest] * chances[:, :1]
        done = (most[rest] <= size) | (mass[:, -1] >= border) | (chances[:, -1] < least[:, 0])
        chances *= (mass - chances < border[:, None]) & (chances >= least)
        chances /= chances.cumsum(1, dtype=np.float64)[:, -1:].astype(np.float32)
        kept[rest[done, None], ids[done]] = chances[done]
        rest = rest[~done]
        if not len(rest):
            break
    return kept


def head(values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The `size` largest of each row of values (n, V) >= 0 in descending order, and their ids, both (n, size).

    Equals go by ascending id. The order is that of int64 keys, the bits of the value above those of the reversed id: no
    two are equal, so the head is the same whether the rest is sorted or not.
    """
    vocabulary = values.shape[1]
    best, key = np.empty((len(values), size), np.int64), np.empty(vocabulary, np.int64)
    high, low, reversed_ids = (
        key.view(np.int32)[HIGH::2],
        key.view(np.int32)[LOW::2],
        np.arange(vocabulary, dtype=np.int32)[::-1],
    )
    # Row by row, so that the keys stay in the cache.
    for row, bits in zip(best, values.view(np.int32), strict=True):
        high[:], low[:] = bits, reversed_ids
        if size < vocabulary:
            key.partition(vocabulary - size)
        row[:] = key[vocabulary - size :]
    best.sort(axis=1)
    best = best[:, ::-1]
    return (best >> 32).astype(np.int32).view(np.float32), vocabulary - 1 - (best & 0xFFFFFFFF)


def draw(p: Tensor, uniform: float) -> int:
    """The token whose interval of the cumulative distribution p (V,) holds `uniform` in [0, 1).

    p need not be normalised. A token of probability 0 is never drawn.
    """
    cumulative = p.numpy().cumsum(dtype=np.float64)
    total = float(cumulative[-1])
    assert total > 0, "there is no token to draw"
    token = int(cumulative.searchsorted(total * uniform, side="right"))
    # Rounding can put the target on the total itself: then the last token with any probability is meant.
    return token if token < len(cumulative) else int(cumulative.searchsorted(total))


def logprobs(logits: Tensor, tokens: list[int], top: list[int]) -> list[Logprob]:
    """Log-probabilities of tokens (n) in the model's own distributions, given logits (n, V), before any filter.

    top[i] is how many of the likeliest ones row i's has beside it; equals go by ascending id.
    """
    scores = torch.log_softmax(logits, dim=1)
    chosen = scores[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    most = min(max(top, default=0), logits.shape[1])
    if not most:
        return [Logprob(token, value, []) for token, value in zip(tokens, chosen, strict=True)]
    # exp keeps the order but not all differences, so what the head is of is the negative's reversed bits.
    ids = head(reversed_order(scores.numpy()), most)[1]
    values = np.take_along_axis(scores.numpy(), ids, 1).tolist()
    return [
        Logprob(token, value, list(zip(id_row[:count], value_row[:count], strict=True)))
        for token, value, count, id_row, value_row in zip(tokens, chosen, top, ids.tolist(), values, strict=True)
    ]


def reversed_order(values: np.ndarray) -> np.ndarray:
    """Numbers >= 0 that are ordered as `values` <= 0 are, both float32: the bits count down from those of inf."""
    infinity = np.array(np.inf, np.float32).view(np.int32)
    return (infinity - np.abs(values).view(np.int32)).view(np.float32)
