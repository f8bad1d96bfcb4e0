"""How many tokens each expert sees: in closed form where every expert is as likely, numerically for any shares, by
simulation, and as trained routers were seen to do it.

E experts, K experts per token, T tokens, R ranks that share the experts.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean

from moe_lm.config import ConfigError, require
from moe_lm.toml import load_config

TRAINED_ROUTER = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "trained_router.json"
"""What the router of a trained nano did, in windows of 128 tokens."""


def mean_tokens(experts: int, top_k: int, tokens: float) -> float:
    """Tokens that an expert sees on average, T K / E."""
    return tokens * top_k / experts


def expected_distinct(experts: int, top_k: int, tokens: float) -> float:
    """Experts that at least one of T tokens is sent to, E (1 - (1 - K / E)^T), if all are as likely."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def token_distribution(experts: int, top_k: int, tokens: int) -> list[float]:
    """Chances that an expert sees 0, 1, ... T tokens, if all are as likely: binomial of T tries at K / E."""
    if top_k == experts:
        return [0.0] * tokens + [1.0]
    chance = top_k / experts
    yes, no, total = math.log(chance), math.log1p(-chance), math.lgamma(tokens + 1)
    return [
        math.exp(total - math.lgamma(n + 1) - math.lgamma(tokens - n + 1) + n * yes + (tokens - n) * no)
        for n in range(tokens + 1)
    ]


def fullest_share(experts: int, top_k: int, tokens: float, ranks: int) -> float:
    """Load of the fullest of R ranks that hold E / R experts each, as a multiple of the mean, if all are as likely.

    A token's choices on a rank are hypergeometric, those of T tokens nearly normal; the largest of R such numbers lies
    at the quantile (R - 0.375) / (R + 0.25) (Blom 1958). Some rank has one token at least.
    """
    if ranks == 1 or top_k == experts:
        return 1.0
    mean = tokens * top_k / ranks
    variance = mean * (1 - 1 / ranks) * (experts - top_k) / (experts - 1)
    excess = math.sqrt(variance) * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    return max(1 + excess / mean, 1 / mean)


def inclusion(shares: list[float], top_k: int) -> list[float]:
    """Chance of each expert to be among a token's K, drawn one after another without replacement by `shares`.

    Drawing so is a race of exponential clocks whose rates are the shares (Plackett-Luce), so that an expert is in if
    fewer than K others ring before it: an integral over the time, by the trapezoid rule in its logarithm, good to 1e-9.
    Raises ConfigError where fewer than K experts have a share.
    """
    alive = [share for share in shares if share > 0]
    require(len(alive) >= top_k, f"{len(alive)} experts have a share, fewer than num_experts_per_tok = {top_k}.")
    if len(alive) == top_k:
        return [float(share > 0) for share in shares]
    total = sum(alive)
    rates = [share / total for share in alive]
    step, chances = 0.1, [0.0] * len(rates)
    first, last = math.floor(math.log(1e-10) / step), math.ceil(math.log(50 / min(rates)) / step)
    for node in range(first, last + 1):
        time = math.exp(node * step)
        rung = [-math.expm1(-rate * time) for rate in rates]
        for i, fewer in enumerate(fewer_than(rung, top_k)):
            chances[i] += step * rates[i] * time * (1 - rung[i]) * fewer
    found = iter(chances)
    return [next(found) if share > 0 else 0.0 for share in shares]


def fewer_than(chances: list[float], limit: int) -> list[float]:
    """For each of several independent events, the chance that fewer than `limit` of the others happen."""
    before, after = partial_counts(chances, limit), partial_counts(chances[::-1], limit)[::-1]
    fewer = []
    for left, right in zip(before[:-1], after[1:], strict=True):
        at_most = 0.0
        result = 0.0
        for count in range(limit):  # the right part has at most `count`, the left one exactly the rest
            at_most += right[count]
            result += left[limit - 1 - count] * at_most
        fewer.append(result)
    return fewer


def partial_counts(chances: list[float], limit: int) -> list[list[float]]:
    """Distributions, cut off at `limit`, of how many of the first 0, 1, ... all events happen."""
    counts = [1.0] + [0.0] * (limit - 1)
    found = [counts]
    for chance in chances:
        shifted = [0.0, *counts[:-1]]
        counts = [old * (1 - chance) + new * chance for old, new in zip(counts, shifted, strict=True)]
        found.append(counts)
    return found


def expected_distinct_by(shares: list[float], top_k: int, tokens: float) -> float:
    """Experts that at least one of T tokens is sent to, if tokens choose independently by `shares`."""
    return sum(1 - (1 - chance) ** tokens for chance in inclusion(shares, top_k))


def draw(shares: list[float], top_k: int, tokens: int, generator: random.Random) -> list[int]:
    """Tokens that each expert sees when each of T tokens picks K of E without replacement by `shares`."""
    counts = [0] * len(shares)
    rates = [(expert, share) for expert, share in enumerate(shares) if share > 0]
    require(len(rates) >= top_k, f"{len(rates)} experts have a share, fewer than num_experts_per_tok = {top_k}.")
    for _ in range(tokens):  # the K clocks that ring first
        rung = sorted((generator.expovariate(share), expert) for expert, share in rates)
        for _, expert in rung[:top_k]:
            counts[expert] += 1
    return counts


def simulate(shares: list[float], top_k: int, tokens: int, trials: int = 200, seed: int = 0) -> list[list[int]]:
    """Tokens per expert in each of `trials` batches of T tokens, the same for a seed on every machine."""
    generator = random.Random(seed)
    return [draw(shares, top_k, tokens, generator) for _ in range(trials)]


@dataclass(frozen=True)
class RouterLoads:
    """What a trained router did: tokens that it sent to each expert, in windows of text."""

    counts: tuple[tuple[int, ...], ...]
    """Tokens of each expert, one row for each window."""
    tokens: int
    """Tokens of a window, each sent to `top_k` experts."""
    top_k: int

    @property
    def shares(self) -> list[float]:
        """Share of each expert over all windows."""
        totals = [sum(column) for column in zip(*self.counts, strict=True)]
        return [total / sum(totals) for total in totals]


def load_counts(path: str | Path) -> RouterLoads:
    """What a trained router did, from a file of windows or from a run.

    A JSON file has `windows` (rows of counts), `window_tokens` and `top_k`. Of a run directory each layer of the last
    logged step is a window: its metrics hold the shares of that step's tokens, and its config the rest. Raises
    ConfigError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        return run_counts(path)
    try:
        table = json.loads(path.read_text("utf-8"))
        loads = RouterLoads(tuple(map(tuple, table["windows"])), table["window_tokens"], table["top_k"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} holds no counts of a router (windows, window_tokens, top_k): {error!r}.") from None
    slots = loads.tokens * loads.top_k
    wrong = [sum(row) for row in loads.counts if sum(row) != slots]
    require(bool(loads.counts), f"{path} has no windows.")
    require(not wrong, f"{path}: a window of {loads.tokens} tokens has {slots} slots, not {wrong[:1]}.")
    return loads


def run_counts(run: Path) -> RouterLoads:
    """The counts of the last step that a run logged, a window for each layer that routes."""
    config = load_config(run / "config.toml")
    require(config.model.is_moe, f"{run} trained a dense model: model.num_local_experts = 0.")
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run}/metrics.jsonl cannot be read: {error!r}.") from None
    require(bool(lines), f"{run}/metrics.jsonl holds no step yet.")
    tokens = lines[-1]["tokens"] - (lines[-2]["tokens"] if len(lines) > 1 else 0)
    slots = tokens * config.model.num_experts_per_tok
    counts = tuple(tuple(round(share * slots) for share in layer) for layer in lines[-1]["expert_load"])
    return RouterLoads(counts, tokens, config.model.num_experts_per_tok)


@dataclass(frozen=True)
class RoutingRow:
    """One figure of T tokens' choices, by every way to know it."""

    name: str
    uniform: float
    """Closed form, every expert as likely."""
    expected: float
    """Numerically from the shares, tokens independent."""
    simulated: float
    """Mean of drawn batches with these shares."""
    real: float | None
    """Mean of a trained router's windows; None where there are none of this size."""


def routing_rows(shares: list[float], top_k: int, tokens: int, *, real: RouterLoads | None = None, trials: int = 200,
                 seed: int = 0) -> list[RoutingRow]:  # fmt: skip
    """Distinct experts, tokens of an expert, and of the fullest one, for T tokens by closed form, shares and chance.

    `real` adds what the windows of a trained router show, whose tokens are not independent: one text likes some
    experts. Only windows of T tokens are compared.
    """
    experts, chances = len(shares), inclusion(shares, top_k)
    drawn = simulate(shares, top_k, tokens, trials, seed)
    windows = [list(row) for row in real.counts] if real is not None and real.tokens == tokens else []
    equal = [top_k / experts] * experts

    def row(name: str, uniform: float, expected: float, measure) -> RoutingRow:
        return RoutingRow(
            name, uniform, expected, fmean(map(measure, drawn)), fmean(map(measure, windows)) if windows else None
        )

    def distinct(counts: list[int]) -> int:
        return sum(count > 0 for count in counts)

    spread = expected_distinct_by(shares, top_k, tokens)
    mean = mean_tokens(experts, top_k, tokens)
    return [
        row("distinct experts", expected_distinct(experts, top_k, tokens), spread, distinct),
        row("tokens of an expert", mean, mean, fmean),
        row("tokens of the fullest", expected_most(equal, tokens), expected_most(chances, tokens), max),
    ]


def expected_most(chances: list[float], tokens: int) -> float:
    """Expected tokens of the fullest expert when a token is sent to each with its own chance.

    As if experts were independent: they are not (a token takes K), which lowers the result by under 2 % from 8 on.
    """
    below = [0.0] * len(chances)
    logs = [(math.log(c), math.log1p(-c)) if 0 < c < 1 else None for c in chances]
    total, result = math.lgamma(tokens + 1), 0.0
    for n in range(tokens):
        ways = total - math.lgamma(n + 1) - math.lgamma(tokens - n + 1)
        for i, pair in enumerate(logs):
            if pair is not None:
                below[i] += math.exp(ways + n * pair[0] + (tokens - n) * pair[1])
            elif chances[i] <= 0:
                below[i] = 1.0
        result += 1 - math.prod(min(1.0, b) for b in below)
    return result
