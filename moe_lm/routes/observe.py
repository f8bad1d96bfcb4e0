"""A text through a mixture, and what its routers did with it, layer by layer. One forward for each row of tokens.

T tokens of a row, E experts, K experts per token, C kinds of token, P spans of position.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.model.moe import Routed
from moe_lm.routes import measures
from moe_lm.routes.classes import CLASSES
from moe_lm.routes.texts import Token

MIN_COUNT = 8
"""Times that a token must have gone to an expert to be called characteristic of it."""


def position_span(position: int) -> int:
    """The number of a position's span: 0, 1, 2-3, 4-7, 8-15 and so on."""
    return position.bit_length()


def span_name(span: int) -> str:
    return str(span) if span < 2 else f"{1 << span - 1}-{(1 << span) - 1}"


@dataclass(frozen=True)
class Characteristic:
    """A token that an expert gets more often than its share."""

    id: int
    count: int
    """Times that it went to this expert."""
    lift: float
    """How much oftener than tokens in general."""


@dataclass
class LayerRoutes:
    """What the router of one layer did with all tokens so far. Its size does not grow with their number, but for
    `by_token`, which grows with the tokens that differ."""

    experts: int
    top_k: int
    spans: int
    tokens: int = 0
    entropy_sum: float = 0.0
    confidence_sum: float = 0.0
    shared: int = 0
    """Choices that the next token of the row made again."""
    steps: int = 0
    """Pairs of consecutive tokens."""
    by_token: Counter = field(default_factory=Counter)
    """Times that each (token id, expert) came."""

    def __post_init__(self):
        self.by_class = np.zeros((len(CLASSES), self.experts), np.int64)
        """(C, E) choices of tokens of each kind."""
        self.by_position = np.zeros((self.spans, self.experts), np.int64)
        """(P, E) choices of tokens in each span of positions."""
        self.pairs = np.zeros((self.experts, self.experts), np.int64)
        """(E, E) tokens that chose both; on the diagonal, that chose one."""
        self.window_sums = np.zeros((len(measures.WINDOWS), 2), np.int64)
        """For windows of 1 to 8 tokens: distinct experts of all windows, and how many windows there were."""

    def add(self, row: list[Token], spans: np.ndarray, routed: Routed) -> None:
        """Count one row: spans (T,) int64, what the router did with its T tokens."""
        log_p = torch.log_softmax(routed.logits.float(), dim=-1)
        self.entropy_sum -= (log_p.exp() * log_p).sum().item()
        self.confidence_sum += log_p.max(-1).values.exp().sum().item()
        experts = routed.routing.experts.cpu().numpy()
        chosen = np.zeros((len(row), self.experts), bool)
        np.put_along_axis(chosen, experts, True, axis=1)
        ones = chosen.astype(np.float32)  # exact up to 2**24, and NumPy multiplies integers without BLAS

        def count(kinds: list[int] | np.ndarray, most: int) -> np.ndarray:
            return (np.eye(most, dtype=np.float32)[kinds].T @ ones).astype(np.int64)

        self.by_class += count([token.kind for token in row], len(CLASSES))
        self.by_position += count(spans, self.spans)
        self.pairs += (ones.T @ ones).astype(np.int64)
        self.tokens += len(row)
        self.shared += int((chosen[1:] & chosen[:-1]).sum())
        self.steps += len(row) - 1
        union = chosen
        for i in range(len(measures.WINDOWS)):
            if i:
                union = union[:-1] | chosen[i:]
            self.window_sums[i] += union.sum(), len(union)
        ids = np.array([token.id for token in row])
        places, counts = np.unique(ids[:, None] * self.experts + experts, return_counts=True)
        self.by_token.update(
            {divmod(place, self.experts): count for place, count in zip(places.tolist(), counts.tolist(), strict=True)}
        )

    # What follows is read once everything is counted.

    @cached_property
    def counts(self) -> np.ndarray:
        """(E,) tokens that chose each expert."""
        return self.pairs.diagonal().copy()

    @property
    def load(self) -> np.ndarray:
        """(E,) the same as a multiple of the mean."""
        return measures.relative_load(self.counts)

    @property
    def dead(self) -> list[int]:
        return np.flatnonzero(self.counts == 0).tolist()

    @property
    def entropy(self) -> float:
        """Mean entropy of the router's distribution over all experts, in nats."""
        return self.entropy_sum / self.tokens

    @property
    def confidence(self) -> float:
        """Mean over tokens of the largest probability in it."""
        return self.confidence_sum / self.tokens

    @property
    def again(self) -> float | None:
        """Share of a token's experts that the next one chooses again; None where no row has two tokens."""
        return self.shared / (self.steps * self.top_k) if self.steps else None

    @property
    def distinct(self) -> list[float | None]:
        """Mean distinct experts of windows of 1 to 8 tokens; None for windows that no row is long enough for."""
        return [float(total / windows) if windows else None for total, windows in self.window_sums]

    @cached_property
    def characteristic(self) -> list[list[Characteristic]]:
        """For each expert its tokens of MIN_COUNT times or more, the highest lift first."""
        totals = Counter()
        for (token, _), count in self.by_token.items():
            totals[token] += count  # K for each time that it came
        slots = self.tokens * self.top_k
        found: list[list[Characteristic]] = [[] for _ in range(self.experts)]
        for (token, expert), count in self.by_token.items():
            if count >= MIN_COUNT:
                lift = count / totals[token] / (self.counts[expert] / slots)
                if lift > 1:
                    found[expert].append(Characteristic(token, count, float(lift)))
        return [sorted(tokens, key=lambda each: (-each.lift, -each.count, each.id)) for tokens in found]


@dataclass
class Routes:
    """Everything that is known of a text in a model, and the tokens at its head with their experts."""

    experts: int
    top_k: int
    layers: list[LayerRoutes]
    """Of the layers that route, in order."""
    kinds: Counter = field(default_factory=Counter)
    """Tokens of each class, by number."""
    spans: Counter = field(default_factory=Counter)
    """Tokens in each span of positions."""
    texts: dict[int, str] = field(default_factory=dict)
    """The text of every token that came, as it was the first time."""
    head: list[Token] = field(default_factory=list)
    """The first tokens, those that a page shows."""
    head_choices: list[np.ndarray] = field(default_factory=list)
    """For each of their rows the experts (layers, T, K), first choice first."""
    head_weights: list[np.ndarray] = field(default_factory=list)
    """And their weights, alike."""

    @property
    def tokens(self) -> int:
        return self.layers[0].tokens


def observe(model: Transformer, texts: Iterable[list[Token]], length: int, kept: int) -> Routes:
    """Send rows of at most `length` tokens through a mixture and count; the first `kept` tokens are kept as they were.

    `model` is in evaluation mode. Each row begins at position 0 and sees nothing of the row before it.
    """
    config, device = model.config, model.embed_tokens.device
    experts, top_k = config.num_local_experts, config.num_experts_per_tok
    spans = position_span(length - 1) + 1
    routes = Routes(experts, top_k, [LayerRoutes(experts, top_k, spans) for _ in config.routing_layers])
    for row, routings in forwards(model, texts, device):
        span = np.array([position_span(place) for place in range(len(row))])
        for layer, routed in zip(routes.layers, routings, strict=True):
            layer.add(row, span, routed)
        routes.kinds.update(token.kind for token in row)
        routes.spans.update(span.tolist())
        for token in row:
            routes.texts.setdefault(token.id, token.text)
        if room := kept - len(routes.head):
            shown = row[:room]
            routes.head += shown
            choices = [routed.routing.experts[: len(shown)].cpu().numpy() for routed in routings]
            weights = [routed.routing.weights[: len(shown)].float().cpu().numpy() for routed in routings]
            routes.head_choices.append(np.stack(choices))
            routes.head_weights.append(np.stack(weights))
    return routes


def forwards(
    model: Transformer, texts: Iterable[list[Token]], device: torch.device
) -> Iterator[tuple[list[Token], list[Routed]]]:
    """Each row with the routing of its tokens in every layer that routes."""
    attend = whole_rows()
    with torch.no_grad():
        for row in texts:
            ids = torch.tensor([[token.id for token in row]], device=device)
            positions = torch.arange(len(row), device=device)[None]
            yield row, model.hidden_states(ids, positions, attend)[1]
