"""A whole forward step of the decoder in one call of a C++ library, for serving on a CPU.

The library is compiled on first use with the system's C++ compiler for the machine at hand and kept in a cache
directory of the user. It uses the model's weights in place and shares torch's pool of threads.

Every row has the same bits whatever its batch-mates, the division of a prompt into chunks and the number of threads:
each output is one chain of operations that depends on the model's shape and its position alone. bfloat16 products run
on AMX tiles where there are any, on fused multiply-adds of widened values elsewhere; the two differ in bits, so that
results are the same on one kind of machine only. The residual stream, softmax and routing are float32 in both dtypes,
where torch's bfloat16 model rounds the stream; bfloat16 is what enters a product, queries and probabilities among it
where attention runs on tiles.

N tokens, S sequences, R rows with logits, L layers, M of them with a router, D hidden width, H query heads, G key-value
heads, C channels of a head, E experts, K experts per token, F expert width, Fd that of a dense layer, V vocabulary, P
rows of a page.
"""

import ctypes
import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from ctypes import POINTER, addressof, c_double, c_float, c_int32, c_int64, c_void_p
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.cpu import FLOAT_DTYPES
from kernels.cpu.native import BuildError, build

REASONS = (
    "a token is outside of the vocabulary", "a slot is beyond the last page", "a wanted row is none of the step's",
    "query_offsets do not divide the rows", "a length is shorter than what is new or longer than its pages",
    "a page in use is none of the cache's",
)  # fmt: skip
"""What moe_lm_forward says it was given, by its return value - 1."""


class LayerArgs(ctypes.Structure):
    """`Layer` of interface.h."""

    _fields_ = [
        (name, c_void_p)
        for name in (
            "input_norm", "post_norm", "qkv", "attention_out", "router", "router_bias", "gate_up", "down",
            "shared_gate_up", "shared_down",
        )
    ]  # fmt: skip


class ModelArgs(ctypes.Structure):
    """`Model` of interface.h."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in (
                "layers", "hidden", "heads", "kv_heads", "head_dim", "width", "dense_width", "experts", "top",
                "shared_width", "vocabulary", "normalize", "half_weights", "half_cache",
            )
        ),
        ("eps", c_double),
        ("embedding", c_void_p),
        ("head", c_void_p),
        ("norm", c_void_p),
        ("layer", POINTER(LayerArgs)),
    ]  # fmt: skip


class StepArgs(ctypes.Structure):
    """`Step` of interface.h."""

    _fields_ = [
        *(
            (name, c_int64)
            for name in ("tokens_count", "sequences", "table_width", "page_size", "pages", "rows_count", "threads")
        ),
        *(
            (name, c_void_p)
            for name in (
                "tokens", "slots", "page_table", "query_offsets", "lengths", "rows", "cos", "sin", "keys", "values",
                "logits", "experts", "workspace",
            )
        ),
    ]  # fmt: skip


class GuessArgs(ctypes.Structure):
    """`Guess` of interface.h."""

    _fields_ = [
        ("width", c_int64),
        *(
            (name, c_void_p)
            for name in (
                "tokens", "offsets", "starts", "counts", "cos_table", "sin_table", "temperatures", "uniforms", "found",
                "laws",
            )
        ),
    ]  # fmt: skip


@functools.cache
def library(generic: bool = False) -> ctypes.CDLL:
    """The compiled library; `generic` uses no instructions of AVX2, AVX-512 or AMX by name.

    Raises BuildError if it cannot be compiled.
    """
    loaded = ctypes.CDLL(str(build("decoder", ("-DMOE_LM_GENERIC",) if generic else ())))
    for name, result in (("moe_lm_workspace_bytes", c_int64), ("moe_lm_forward", c_int32)):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, [POINTER(ModelArgs), POINTER(StepArgs)]
    loaded.moe_lm_guess.restype = c_int32
    loaded.moe_lm_guess.argtypes = [POINTER(ModelArgs), POINTER(StepArgs), POINTER(GuessArgs)]
    loaded.moe_lm_has_tiles.restype, loaded.moe_lm_has_tiles.argtypes = c_int32, []
    return loaded


def unavailable(dtype: torch.dtype = torch.float32) -> str | None:
    """Why a model with weights of `dtype` cannot be run, in a sentence; None if it can. May compile the library."""
    if dtype not in FLOAT_DTYPES:
        return f"The native decoder has float32 and bfloat16 weights only, not {dtype}."
    try:
        library()
    except (BuildError, OSError) as error:
        return str(error)
    return None


def has_tiles(generic: bool = False) -> bool:
    """Whether bfloat16 products run on AMX tiles."""
    return bool(library(generic).moe_lm_has_tiles())


class Decoder:
    """The model's weights, by reference, and the room that a step works in.

    `layers` holds for each layer: input_layernorm and post_attention_layernorm (D,), qkv_proj ((H + 2 G) C, D), o_proj
    (D, H C); in a layer with a router gate (E, D), gate_up_proj (E, 2 F, D) and down_proj (E, D, F), with gate rows
    before up rows, bias (E,) if experts are chosen by their probability and that, as kernels.route chooses them, and,
    if there are shared experts, shared_gate_up_proj (2 Fs, D) and shared_down_proj (D, Fs); in a
    dense layer gate_up_proj (2 Fd, D) and down_proj (D, Fd). Layers of a kind are of one shape. embed_tokens and
    lm_head (V, D), norm (D,). Matrices are contiguous, of one dtype, float32 or bfloat16, and used in place: a later
    change of them is seen. Norms, gates and biases are copied as float32. `normalize` is kernels.route's.

    One step at a time: concurrent calls of `forward` wait for each other. Raises ValueError for weights that it cannot
    use, kernels.cpu.native.BuildError if the library cannot be compiled.
    """

    def __init__(
        self, layers: Sequence[Mapping[str, Tensor]], embed_tokens: Tensor, norm: Tensor, lm_head: Tensor, *,
        heads: int, kv_heads: int, head_dim: int, top_k: int, eps: float, normalize: bool = True,
        generic: bool = False,
    ):  # fmt: skip
        self.dtype = embed_tokens.dtype
        if self.dtype not in FLOAT_DTYPES:
            raise ValueError(unavailable(self.dtype))
        vocabulary, hidden = embed_tokens.shape
        self._kept: list[Tensor] = []
        self._library = library(generic)
        self._lock = threading.Lock()
        self._workspace = torch.empty(0, dtype=torch.uint8)
        mixtures = [weights for weights in layers if "gate" in weights]
        experts = len(mixtures[0]["gate"]) if mixtures else 0
        self.num_layers, self.vocabulary, self.head_dim, self.kv_heads = len(layers), vocabulary, head_dim, kv_heads
        self.num_mixtures, self.top_k = len(mixtures), top_k if experts else 0
        width = mixtures[0]["down_proj"].shape[-1] if mixtures else 0
        dense_width = next((weights["down_proj"].shape[-1] for weights in layers if "gate" not in weights), 0)
        shared = mixtures[0]["shared_down_proj"].shape[-1] if mixtures and "shared_down_proj" in mixtures[0] else 0
        qkv = (heads + 2 * kv_heads) * head_dim
        args = (LayerArgs * len(layers))()
        for layer, weights in zip(args, layers, strict=True):
            layer.input_norm = self._as_float32(weights["input_layernorm"], hidden)
            layer.post_norm = self._as_float32(weights["post_attention_layernorm"], hidden)
            layer.qkv = self._in_place(weights["qkv_proj"], qkv, hidden)
            layer.attention_out = self._in_place(weights["o_proj"], hidden, heads * head_dim)
            routes = "gate" in weights
            inner, of_experts = (width, (experts,)) if routes else (dense_width, ())
            layer.gate_up = self._in_place(weights["gate_up_proj"], *of_experts, 2 * inner, hidden)
            layer.down = self._in_place(weights["down_proj"], *of_experts, hidden, inner)
            if routes:
                layer.router = self._as_float32(weights["gate"], experts, hidden)
                if "bias" in weights:
                    layer.router_bias = self._as_float32(weights["bias"], experts)
            if routes and shared:
                layer.shared_gate_up = self._in_place(weights["shared_gate_up_proj"], 2 * shared, hidden)
                layer.shared_down = self._in_place(weights["shared_down_proj"], hidden, shared)
        self._model = ModelArgs(
            len(layers), hidden, heads, kv_heads, head_dim, width, dense_width, experts, self.top_k, shared, vocabulary,
            normalize, self.dtype == torch.bfloat16, False, eps, self._in_place(embed_tokens, vocabulary, hidden),
            self._in_place(lm_head, vocabulary, hidden), self._as_float32(norm, hidden), args,
        )  # fmt: skip

    def _in_place(self, weight: Tensor, *shape: int) -> int:
        if weight.shape != shape or weight.dtype != self.dtype or not weight.is_contiguous() or not weight.is_cpu:
            raise ValueError(
                f"The native decoder takes a contiguous CPU tensor {shape} of {self.dtype} here, not "
                f"{tuple(weight.shape)} of {weight.dtype} with strides {weight.stride()} on {weight.device}."
            )
        self._kept.append(weight.detach())
        return weight.data_ptr()

    def _as_float32(self, weight: Tensor, *shape: int) -> int:
        if weight.shape != shape or not weight.is_cpu:
            raise ValueError(
                f"The native decoder takes a CPU tensor {shape} here, not {tuple(weight.shape)} on {weight.device}."
            )
        padded = pad(weight.detach().float(), (0, -weight.shape[-1] % 32)).contiguous()
        self._kept.append(padded)
        return padded.data_ptr()

    def forward(
        self, tokens: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, page_table: Tensor, query_offsets: Tensor,
        lengths: Tensor, keys: Tensor, values: Tensor, rows: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Logits float32 (R, V) of the wanted rows, and the chosen experts int32 (M, N, K), largest weight first.

        tokens and slots (N,), page_table (S, pages per sequence), query_offsets (S + 1,), lengths (S,) and rows (R,)
        with R <= N, all int64; cos and sin (N, C / 2) float32; keys and values (L, pages, P, G, C), of the weights'
        dtype or float32, to which the new tokens' are added where their slot is not negative. The layout is that of
        kernels.rope_append and kernels.paged_attention. M and K are 0 in a dense model.

        Raises IndexError for a token, slot, row or page that is outside of what it indexes.
        """
        N, S, R = tokens.shape[0], lengths.shape[0], rows.shape[0]
        assert tokens.shape == slots.shape == (N,), (tokens.shape, slots.shape)
        assert cos.shape == sin.shape == (N, self.head_dim // 2), (cos.shape, sin.shape)
        assert (page_table.shape[0], *query_offsets.shape) == (S, S + 1), (page_table.shape, query_offsets.shape)
        assert cos.dtype == sin.dtype == torch.float32, (cos.dtype, sin.dtype)
        self._check_cache(keys, values)
        inputs = [x.contiguous() for x in (tokens, slots, page_table, query_offsets, lengths, rows, cos, sin)]
        for x in inputs[:6]:
            assert x.dtype == torch.int64, x.dtype
        logits = torch.empty(R, self.vocabulary)
        experts = torch.empty(self.num_mixtures, N, self.top_k, dtype=torch.int32)
        step = StepArgs(
            N, S, page_table.shape[1], keys.shape[2], keys.shape[1], R, torch.get_num_threads(),
            *[x.data_ptr() for x in (*inputs, keys, values, logits, experts)],
        )  # fmt: skip
        self._call(step, keys.dtype)
        return logits, experts

    def guess(
        self, tokens: list[list[int]], starts: list[int], pages: list[list[int]], cos_table: Tensor, sin_table: Tensor,
        keys: Tensor, values: Tensor, counts: list[int], temperatures: list[float], uniforms: list[tuple[float, ...]],
    ) -> tuple[list[list[int]], Tensor | None]:  # fmt: skip
        """For each sequence its counts[s] >= 1 next tokens, each following the one before it, with what they were drawn
        from, float32 (S, most counts, V), None if all temperatures are 0.

        tokens[s], one or more, are not read yet, the first of them at position starts[s]; pages[s] are the sequence's
        in order, with room for all tokens but the last one guessed, which are added to the cache. cos_table and
        sin_table (positions, C / 2) float32 are of all positions. temperatures[s] is 0 for the likeliest tokens; else
        each is drawn from the softmax of logits over temperature by its number in uniforms[s], in [0, 1). A sequence
        with a NaN among its logits, or no finite largest one, gets no more tokens. Raises IndexError as `forward`.
        """
        S, width, table_width = len(tokens), max(counts), max(map(len, pages))
        assert min(counts) >= 1, counts
        assert all(tokens), tokens
        assert all(len(own) in (0, count) for own, count in zip(uniforms, counts, strict=True)), (uniforms, counts)
        ends = [start + len(own) + count - 1 for start, own, count in zip(starts, tokens, counts, strict=True)]
        for table in (cos_table, sin_table):
            assert table.is_contiguous(), table.stride()
            assert table.dtype == torch.float32, table.dtype
            assert table.shape[0] >= max(ends), (table.shape, ends)
        self._check_cache(keys, values)
        offsets = list(accumulate(map(len, tokens), initial=0))
        padded = [(*own, *[0] * (table_width - len(own))) for own in pages]
        numbers = [(*own, *[0.0] * (width - len(own))) for own in uniforms]
        laws = torch.empty(S, width, self.vocabulary) if any(temperatures) else None
        logits = torch.empty(S, self.vocabulary)
        experts = torch.empty(self.num_layers, offsets[-1], self.top_k, dtype=torch.int32)
        # Arrays of ctypes take a microsecond to make, small tensors five. They live as long as these names.
        whole = [as_array(c_int64, each) for each in (chain(*tokens), offsets, starts, counts, chain(*padded))]
        heat, draws = as_array(c_float, temperatures), as_array(c_double, chain(*numbers))
        found = (c_int64 * (S * width))()
        guess = GuessArgs(
            width, *map(addressof, whole[:4]), cos_table.data_ptr(), sin_table.data_ptr(),
            *map(addressof, (heat, draws, found)), None if laws is None else laws.data_ptr(),
        )  # fmt: skip
        step = StepArgs(
            offsets[-1], S, table_width, keys.shape[2], keys.shape[1], S, torch.get_num_threads(),
            page_table=addressof(whole[4]), keys=keys.data_ptr(), values=values.data_ptr(), logits=logits.data_ptr(),
            experts=experts.data_ptr(),
        )  # fmt: skip
        self._call(step, keys.dtype, guess)
        return [
            [token for token in found[s * width : s * width + count] if token >= 0] for s, count in enumerate(counts)
        ], laws

    def _call(self, step: StepArgs, cache_dtype: torch.dtype, guess: GuessArgs | None = None) -> None:
        with self._lock:
            self._model.half_cache = cache_dtype == torch.bfloat16
            step.workspace = self._room(self._library.moe_lm_workspace_bytes(self._model, step))
            if guess is None:
                reason = self._library.moe_lm_forward(self._model, step)
            else:
                reason = self._library.moe_lm_guess(self._model, step, guess)
        if reason:
            raise IndexError(f"Decoder: {REASONS[reason - 1]}.")

    def _check_cache(self, keys: Tensor, values: Tensor) -> None:
        assert (keys.shape[0], *keys.shape[3:]) == (self.num_layers, self.kv_heads, self.head_dim), keys.shape
        for cached in (keys, values):
            assert cached.shape == keys.shape, (keys.shape, values.shape)
            assert cached.dtype == keys.dtype, (keys.dtype, values.dtype)
            assert cached.dtype in (self.dtype, torch.float32), cached.dtype
            assert cached.is_contiguous(), cached.stride()

    def _room(self, size: int) -> int:
        if len(self._workspace) < size:
            self._workspace = torch.empty(size, dtype=torch.uint8)
        return self._workspace.data_ptr()


def as_array(kind: type, values: Iterable[float]) -> ctypes.Array:
    values = list(values)
    return (kind * len(values))(*values)
