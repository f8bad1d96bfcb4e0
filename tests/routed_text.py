"""A mixture whose router a test writes down: what goes where depends on the token's id alone."""

from types import SimpleNamespace

import torch

from kernels import Routing
from moe_lm.model.moe import Routed
from moe_lm.routes.observe import Routes, observe
from moe_lm.routes.texts import Token


class StubModel:
    """`chosen(layer, id)` are the K experts of a token, first choice first; the weights halve from one to the next."""

    def __init__(self, chosen, layers: int, experts: int, top_k: int):
        self.chosen, self.embed_tokens = chosen, torch.zeros(1)
        self.config = SimpleNamespace(
            num_local_experts=experts, num_experts_per_tok=top_k, routing_layers=list(range(layers))
        )

    def hidden_states(self, ids, positions, attend):
        config, routings = self.config, []
        assert positions.tolist() == [list(range(ids.shape[1]))]
        for layer in config.routing_layers:
            experts = torch.tensor([self.chosen(layer, index) for index in ids[0].tolist()])
            logits = torch.zeros(len(experts), config.num_local_experts)
            rank = torch.arange(config.num_experts_per_tok, 0, -1).expand(experts.shape) * torch.log(torch.tensor(2.0))
            weights = torch.softmax(rank, dim=-1)
            routings.append(Routed(logits.scatter(1, experts, rank), Routing(weights, experts, None, None)))
        return None, routings


def tokens_of(words: list[str], kinds: list[int] | None = None) -> list[Token]:
    """A token for each word; equal words have equal ids."""
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return [Token(ids[word], word, kinds[i] if kinds else 1) for i, word in enumerate(words)]


def routes_of(rows: list[list[Token]], chosen, layers=2, experts=4, top_k=2, length=64, kept=1000) -> Routes:
    return observe(StubModel(chosen, layers, experts, top_k), rows, length, kept)
