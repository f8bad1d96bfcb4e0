"""A model with the cache of many sequences: pieces of them in, logits out.

On a CPU a step is one native call if there is a C++ compiler (kernels.cpu.decoder), which gives a row the same bits in
every batch. Else the model runs as it is written, on a GPU as CUDA graphs of that (moe_lm.engine.graphs). Its matrix
products then choose their kernels by the number of rows, and so a row's last bits depend on the batch; where that must
not be, steps are cut into passes of ROWS rows.

L layers, M of them with a router, N new tokens, R rows whose logits are wanted, G key-value heads, C channels of a
head, K experts per token.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import kernels
from moe_lm.config import ConfigError, ModelConfig, require
from moe_lm.engine.batch import Batch, Piece, Size, build, pages_of, passes
from moe_lm.engine.graphs import Graphs, common_size
from moe_lm.engine.native import make_decoder, why_not
from moe_lm.engine.sampler import draw, likeliest, softened, take, usable, within
from moe_lm.model import Transformer
from moe_lm.model.attention import Rotation
from moe_lm.model.layers import rotary_angles

ROWS = 8
"""Rows of a pass whose bits must not depend on the batch; short ones are filled up."""


class Step(NamedTuple):
    """What a step gives."""

    logits: Tensor
    """float32 (R, V)."""
    experts: Tensor
    """The experts that every token chose in every layer that routes, int (M, N, K); (0, N, 0) for a dense model."""


class Ahead(NamedTuple):
    """What is wanted of `Runner.guess` after one piece."""

    count: int
    """Tokens, at least one."""
    temperature: float = 0
    """That they are drawn at; 0 for the likeliest ones."""
    uniforms: tuple[float, ...] = ()
    """A number in [0, 1) for each token to draw."""


class Runner:
    """`native` says whether to take the native step; None takes it where it can run, and `why_eager` says why not.

    `deterministic` makes a row's bits independent of its batch where they would not be; in float32 on a CPU they always
    are. Raises ConfigError where `native` is demanded and cannot run, and for a model whose routing is more than a
    function of the token: with `uniform_routing`, or in training mode where that drops tokens or adds noise.
    """

    def __init__(
        self, model: Transformer, blocks: int, block_size: int, *, kv_dtype: torch.dtype | None = None,
        native: bool | None = None, deterministic: bool = False,
    ):  # fmt: skip
        require(
            not model.config.uniform_routing,
            "model.uniform_routing = True sends a token to experts by its place in the batch, so that what a request "
            "gets would depend on the others: it is for timing the training; leave it out to serve.",
        )
        training = {name: getattr(model.config, name) for name in ("expert_capacity_factor", "router_jitter_noise")}
        set_ones = " and ".join(f"{name} = {value}" for name, value in training.items() if value)
        require(
            not (model.training and set_ones),
            f"the model is in training mode, where {set_ones} changes its routing: call its eval() before serving it.",
        )
        self.model, self.device, self.block_size = model, model.embed_tokens.device, block_size
        shape, dtype = cache_shape(model.config, blocks, block_size), cache_dtype(model)
        self.keys, self.values = (torch.zeros(shape, dtype=kv_dtype or dtype, device=self.device) for _ in range(2))
        self.rows = ROWS if deterministic or (self.device.type == "cpu" and dtype == torch.float32) else None
        self.why_eager = "native = False" if native is False else why_not(model, self.keys.dtype)
        if native and self.why_eager:
            raise ConfigError(f"native = True is asked for and cannot be: {self.why_eager}")
        self.decoder = None if self.why_eager else make_decoder(model)
        self.graphs = Graphs(self.states) if self.device.type == "cuda" else None
        if native is None and self.why_eager and self.device.type == "cpu":
            warnings.warn(self.describe(), stacklevel=3)
        positions = torch.arange(min(blocks * block_size, model.config.max_position_embeddings) if self.decoder else 0)
        self.angles = rotary_angles(model.config, positions)
        """Of every position that there can be: computed anew they would take a tenth of a small model's step."""

    def describe(self) -> str:
        """How a step is computed, in a sentence."""
        if self.decoder is not None:
            return "A step is one native call, in which a token's bits are the same in every batch."
        how = (
            "whole batches" if self.rows is None else f"passes of {self.rows} rows, which keep a token's bits the same"
        )
        if self.graphs is not None:
            return f"A step is the model's PyTorch code in {how}, {self.graphs.describe()}."
        return f"A step is the model's PyTorch code in {how}; no native step: {self.why_eager}."

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the keys and values of whole blocks, source to destination, as if in turn."""
        if pairs:
            source, destination = torch.tensor(pairs, device=self.device).unbind(1)
            for cache in (self.keys, self.values):
                cache[:, destination] = cache[:, source]

    def forward(self, pieces: list[Piece]) -> Step:
        """Run new tokens of several sequences and write their keys and values; the logits wanted, in order."""
        if self.decoder is not None:
            return self.native(build(pieces, self.block_size, self.device))
        groups = [pieces] if self.rows is None else passes(pieces, self.rows)
        steps = [self.eager(group) for group in groups]
        if len(steps) > 1:
            steps = [Step(torch.cat([step.logits for step in steps]), torch.cat([step.experts for step in steps], 1))]
        return steps[0] if self.graphs is None else to_host(steps[0])

    def guess(self, pieces: list[Piece], wanted: list[Ahead]) -> list[tuple[list[int], Tensor | None]]:
        """For each piece the tokens after it that are wanted, each following the one before it, fewer from where logits
        are not finite; and what they were drawn from, float32 (tokens, V), None where they are the likeliest. Their
        keys and values are written but for the last one's: blocks must have room."""
        if self.decoder is None:
            return self.guess_in_turn(pieces, wanted)
        found, laws = self.decoder.guess(
            [piece.tokens for piece in pieces], [piece.start for piece in pieces], [piece.blocks for piece in pieces],
            *self.angles, self.keys, self.values, [ahead.count for ahead in wanted],
            [within(ahead.temperature, 1e-30) if ahead.temperature else 0 for ahead in wanted],
            [ahead.uniforms for ahead in wanted],
        )  # fmt: skip
        return [
            (tokens, laws[i, : len(tokens)] if ahead.temperature else None)
            for i, (tokens, ahead) in enumerate(zip(found, wanted, strict=True))
        ]

    def guess_in_turn(self, pieces: list[Piece], wanted: list[Ahead]) -> list[tuple[list[int], Tensor | None]]:
        """`guess` by one forward step after another."""
        found: list[list[int]] = [[] for _ in pieces]
        laws: list[list[Tensor]] = [[] for _ in pieces]
        going = list(range(len(pieces)))
        while going:
            logits = self.forward([pieces[i] for i in going]).logits.cpu()
            good = [row for row, finite in enumerate(usable(logits)) if finite]
            logits, going = take(logits, good), [going[row] for row in good]
            p = softened(logits, [wanted[i].temperature for i in going])
            for i, law, token in zip(going, p, likeliest(logits), strict=True):
                if wanted[i].temperature:
                    laws[i].append(law)
                    token = draw(law, wanted[i].uniforms[len(found[i])])
                found[i].append(token)
            going = [i for i in going if len(found[i]) < wanted[i].count]
            pieces = [
                Piece(found[i][-1:], piece.start + len(piece.tokens), piece.blocks, 1) if i in going else piece
                for i, piece in enumerate(pieces)
            ]
        none = torch.empty(0, self.model.config.vocab_size)
        return [
            (tokens, (torch.stack(own) if own else none) if ahead.temperature else None)
            for tokens, own, ahead in zip(found, laws, wanted, strict=True)
        ]

    def native(self, batch: Batch) -> Step:
        cos, sin = (table.index_select(0, batch.positions) for table in self.angles)
        logits, experts = self.decoder.forward(
            batch.tokens, cos, sin, batch.slots, batch.page_table, batch.query_offsets, batch.lengths, self.keys,
            self.values, batch.rows,
        )  # fmt: skip
        return Step(logits, experts)

    @torch.inference_mode()
    def eager(self, pieces: list[Piece]) -> Step:
        """One pass of the model's own code, whose launches a GPU may have as a graph."""
        new = sum(len(piece.tokens) for piece in pieces)
        pages = pages_of([piece.start + len(piece.tokens) for piece in pieces], self.block_size)
        size = None if self.rows is None else Size(self.rows, self.rows, pages)
        if self.graphs is not None:
            size = common_size(self.rows or new, len(pieces), pages)
        batch = build(pieces, self.block_size, self.device, size)
        run = self.states if self.graphs is None or size is None else self.graphs
        states, experts = run(batch)
        if self.rows is None:
            logits = self.model.logits(states[batch.rows])
        else:
            # All rows, wanted or not: the projection must not see a shape that depends on how many are.
            logits = (
                self.model.logits(states)[batch.rows]
                if len(batch.rows)
                else states.new_empty(0, self.model.config.vocab_size, dtype=torch.float32)
            )
        # A copy: a graph's own memory is written again by the next pass.
        return Step(logits, experts[:, :new].clone())

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normed states of every row before the projection (N, D), and `Step.experts` of all rows."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Tensor:
            keys, values = self.keys[layer], self.values[layer]
            q = kernels.rope_append(q, k, v, *rotation, keys, values, batch.slots)
            return kernels.paged_attention(q, keys, values, batch.page_table, batch.query_offsets, batch.lengths)

        states, routings = self.model.hidden_states(batch.tokens, batch.positions, attend)
        experts = [routed.routing.experts for routed in routings]
        return states, torch.stack(experts) if experts else batch.tokens.new_empty(0, len(states), 0)


def to_host(step: Step) -> Step:
    """The step in the host's memory: both copies, and one wait."""
    copied = Step(*(part.to("cpu", non_blocking=True) for part in step))
    torch.cuda.current_stream(step.logits.device).synchronize()
    return copied


def cache_shape(config: ModelConfig, blocks: int, block_size: int) -> tuple[int, ...]:
    """Of the keys, and of the values: (L, blocks, P, G, C)."""
    return config.num_hidden_layers, blocks, block_size, config.num_key_value_heads, config.head_dim


def cache_dtype(model: Transformer) -> torch.dtype:
    """Of the activations, which the cache has unless told otherwise."""
    return model.compute_dtype or model.embed_tokens.dtype


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block's keys and values in all layers."""
    return 2 * math.prod(cache_shape(config, 1, block_size)) * dtype.itemsize
