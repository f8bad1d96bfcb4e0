"""A step's launches as CUDA graphs: one replay where Python would start some twenty kernels per layer, each for longer
than a small one runs.

A graph has one size, so steps are filled up to a few common sizes. The first step of a size runs as it is, which
compiles what it needs; the second is captured, and from then on it is replayed. What does not depend on a step's size
but on what is wanted of it, the projection to the vocabulary, stays outside.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from moe_lm.engine.batch import Batch, Size, parts

MOST_TOKENS = 512
"""Steps of more new tokens are not captured: their kernels run for longer than they take to start."""
MOST_GRAPHS = 128
"""Kept; beyond these the one that was not used for longest goes. Each takes about a megabyte."""
LEAST_PAGES = 16

Run = Callable[[Batch], tuple[Tensor, Tensor]]
Capture = Callable[[Callable[[], tuple[Tensor, Tensor]]], tuple[Callable[[], None], tuple[Tensor, Tensor]]]


def common_size(tokens: int, sequences: int, pages: int) -> Size | None:
    """The size that a step is filled up to, at most an eighth more tokens; None for one that is not captured."""
    if tokens > MOST_TOKENS:
        return None
    grain = max(1, power_of_two(tokens) // 16)
    filled = -(-tokens // grain) * grain
    # Not as many as there are: a size for each number of them would seldom come twice.
    rows = min(filled, max(64, power_of_two(sequences + filled - tokens)))
    return Size(filled, rows, max(LEAST_PAGES, power_of_two(pages)))


def power_of_two(n: int) -> int:
    """The lowest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


class Graphs:
    """`run` as graphs, given batches of common sizes. What it returns holds until the next call."""

    def __init__(self, run: Run, capture: Capture | None = None):
        self.run = run
        self.capture = capture or CudaGraphs()
        self.captured: OrderedDict[tuple[int, ...], tuple[Batch, Callable[[], None], tuple[Tensor, Tensor]]]
        self.captured = OrderedDict()
        self.met: set[tuple[int, ...]] = set()
        self.failure: str | None = None
        """Why nothing more is captured."""

    def describe(self) -> str:
        if self.failure:
            return f"without CUDA graphs: {self.failure}"
        return "replayed as a CUDA graph once a size has come twice"

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        size = (len(batch.tokens), *batch.page_table.shape)
        if size in self.captured:
            self.captured.move_to_end(size)
        elif size not in self.met or self.failure:
            self.met.add(size)
            return self.run(batch)
        elif not self.add(size, batch):
            return self.run(batch)
        held, replay, result = self.captured[size]
        held.whole.copy_(batch.inputs)
        replay()
        return result

    def add(self, size: tuple[int, ...], batch: Batch) -> bool:
        """Capture a size; whether that could be done."""
        held = parts(batch.inputs.clone(), *size)
        try:
            self.captured[size] = held, *self.capture(lambda: self.run(held))
        except RuntimeError as error:
            self.failure = (str(error).strip() or "no message").splitlines()[0]
            warnings.warn(f"Steps stay as they are, {self.describe()}.", stacklevel=2)
            return False
        if len(self.captured) > MOST_GRAPHS:
            self.captured.popitem(last=False)
        return True


class CudaGraphs:
    """Captures calls that have run before, so that nothing is compiled any more, all with one pool of memory."""

    def __init__(self) -> None:
        self.pool: tuple[int, int] | None = None

    def __call__(self, call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Callable[[], None], tuple[Tensor, Tensor]]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = call()
        return graph.replay, result
