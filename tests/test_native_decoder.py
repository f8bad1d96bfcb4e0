"""The native decoder against the model's plain forward, and against itself: no row's bits depend on its step."""

import copy
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels.cpu import native
from kernels.cpu.decoder import Decoder, has_tiles, library, unavailable
from moe_lm.config import ModelConfig, RopeScaling
from moe_lm.engine.native import make_decoder as engine_decoder
from moe_lm.engine.sampler import draw, softened
from moe_lm.model import Transformer
from moe_lm.model.attention import whole_rows
from moe_lm.model.layers import rotary_angles

VOCABULARY, PAGE_SIZE, PAGES = 97, 16, 24
SHAPES = {
    "moe, one kv head": {},
    "moe, grouped, shared expert, top-3": {
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "n_shared_experts": 1,
        "num_experts_per_tok": 3, "num_local_experts": 5,
    },
    "dense, odd sizes": {
        "num_local_experts": 0, "hidden_size": 60, "num_attention_heads": 3, "head_dim": 22, "intermediate_size": 50,
    },
    "tied, stretched, whole tiles": {
        "tie_word_embeddings": True, "rope_scaling": RopeScaling("linear", 4.0), "hidden_size": 128,
        "intermediate_size": 96, "num_attention_heads": 9, "head_dim": 32, "num_hidden_layers": 3,
        "initializer_range": 0.1,
    },
    "first layer dense": {
        "first_k_dense_replace": 1, "num_hidden_layers": 3, "moe_intermediate_size": 32, "intermediate_size": 80,
        "n_shared_experts": 1,
    },
    "last layer dense": {"expert_layer_period": 2, "num_hidden_layers": 4, "moe_intermediate_size": 80},
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def make_model(shape: str, dtype: torch.dtype, **changes) -> Transformer:
    """A model in float32 whose matrices are of `dtype`'s values."""
    config = ModelConfig(**{
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_local_experts": 8, "initializer_range": 0.2,
    } | SHAPES[shape] | changes)  # fmt: skip
    model = Transformer(config).reset_parameters(torch.Generator().manual_seed(1)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


def make_decoder(model: Transformer, dtype: torch.dtype, generic: bool = False) -> Decoder:
    same = dtype == model.embed_tokens.dtype
    return engine_decoder(model if same else copy.deepcopy(model).to(dtype), generic)


class Cache:
    """Pages for several sequences, dealt in a random order; what holds no token is NaN, what has no page is page -1."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, sequences: int = 4):
        shape = (config.num_hidden_layers, PAGES, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        self.config = config
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
        self.table = torch.randperm(PAGES).view(sequences, -1)
        self.lengths = [0] * sequences

    def step(self, decoder: Decoder, parts: dict[int, list[int]]) -> dict[int, Tensor]:
        """Logits (n, V) of the new tokens of each sequence; the arguments and experts stay here."""
        tokens, positions, slots, offsets, lengths, table = [], [], [], [0], [], []
        for s, part in parts.items():
            at = torch.arange(self.lengths[s], self.lengths[s] + len(part))
            self.lengths[s] += len(part)
            tokens += part
            positions.append(at)
            slots.append(self.table[s, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE)
            offsets.append(len(tokens))
            lengths.append(self.lengths[s])
            used = -(-self.lengths[s] // PAGE_SIZE)
            table.append(torch.cat([self.table[s, :used], torch.full((self.table.shape[1] - used,), -1)]))
        cos, sin = rotary_angles(self.config, torch.cat(positions))
        self.args = {
            "tokens": torch.tensor(tokens), "cos": cos, "sin": sin, "slots": torch.cat(slots),
            "page_table": torch.stack(table), "query_offsets": torch.tensor(offsets),
            "lengths": torch.tensor(lengths), "keys": self.keys, "values": self.values,
            "rows": torch.arange(len(tokens)),
        }  # fmt: skip
        logits, self.experts = decoder.forward(**self.args)
        return dict(zip(parts, logits.split(torch.tensor(offsets).diff().tolist()), strict=True))


def random_tokens(count: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,)).tolist()


@pytest.fixture(params=[False, True], ids=["this machine's", "generic"])
def generic(request) -> bool:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_gives_the_plain_forward(shape, dtype, generic):
    model = make_model(shape, dtype)
    tokens = random_tokens(77)
    with kernels.use_backend("reference"):
        expected = model(torch.tensor([tokens]))[0]
    logits = Cache(model.config, dtype).step(make_decoder(model, dtype, generic), {0: tokens})[0]
    assert expected.std() > 0.5
    error = (logits - expected).abs()
    if dtype == torch.float32:
        assert error.max() < 1e-4
    else:
        # Medians: a near tie of the router may fall the other way in another rounding, which moves a whole row.
        torchs = model.to(dtype)(torch.tensor([tokens]))[0].sub(expected).abs()
        assert error.median() < min(0.02 * expected.std(), 1.1 * torchs.median())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_every_batch(shape, dtype, generic):
    """Whole prompts against random chunks of four sequences in ragged steps, token by token, and by one thread."""
    model = make_model(shape, dtype)
    decoder = make_decoder(model, dtype, generic)
    prompts = [random_tokens(n) for n in (75, 33, 17, 50)]
    whole = [Cache(model.config, dtype).step(decoder, {0: tokens})[0] for tokens in prompts]
    chance = random.Random(0)
    threads = torch.get_num_threads()
    for longest, number in ((40, 2), (9, 1), (20, 3), (1, 2)):
        torch.set_num_threads(number)
        cache, left, parts = Cache(model.config, dtype), [list(t) for t in prompts], [[] for _ in prompts]
        while any(left):
            waiting = [s for s in range(4) if left[s]]
            chosen = chance.sample(waiting, chance.randint(1, len(waiting)))
            step = {s: [left[s].pop(0) for _ in range(min(chance.randint(1, longest), len(left[s])))] for s in chosen}
            for s, logits in cache.step(decoder, step).items():
                parts[s].append(logits)
        torch.set_num_threads(threads)
        for expected, part in zip(whole, parts, strict=True):
            assert expected.isfinite().all()
            assert torch.equal(torch.cat(part), expected)


@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_a_bfloat16_model_takes_either_cache(cache_dtype, generic):
    model = make_model("moe, one kv head", torch.bfloat16)
    decoder = make_decoder(model, torch.bfloat16, generic)
    tokens = random_tokens(60)
    with kernels.use_backend("reference"):
        expected = model(torch.tensor([tokens]))[0]
    cache = Cache(model.config, cache_dtype)
    logits = cache.step(decoder, {2: tokens})[2]
    assert (logits - expected).abs().median() < 0.02 * expected.std()
    again = Cache(model.config, cache_dtype)
    parts = [again.step(decoder, {0: tokens[i : i + 7], 1: [i]})[0] for i in range(0, 60, 7)]
    assert torch.equal(torch.cat(parts), logits)


def test_the_experts_are_those_of_the_router():
    model = make_model("moe, grouped, shared expert, top-3", torch.float32)
    tokens = torch.tensor(random_tokens(50))
    cache = Cache(model.config, torch.float32)
    cache.step(make_decoder(model, torch.float32), {0: tokens.tolist()})
    _, routed = model.hidden_states(tokens[None], torch.arange(50)[None], whole_rows())
    assert torch.equal(cache.experts.long(), torch.stack([r.routing.experts for r in routed]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["moe, one kv head", "dense, odd sizes"])
def test_a_nan_stays_with_its_sequence_and_what_follows(shape, dtype, generic):
    model = make_model(shape, dtype)
    healthy = make_decoder(model, dtype, generic)
    prompts = {s: [t % (VOCABULARY - 1) for t in random_tokens(n)] for s, n in enumerate((40, 50, 1, 30))}
    expected = Cache(model.config, dtype).step(healthy, prompts)
    model.embed_tokens[VOCABULARY - 1] = torch.nan
    prompts[1][21] = VOCABULARY - 1
    cache = Cache(model.config, dtype)
    logits = cache.step(make_decoder(model, dtype, generic), prompts)
    for s in (0, 2, 3):
        assert torch.equal(logits[s], expected[s])
    assert torch.equal(logits[1][:21], expected[1][:21])
    assert logits[1][21:].isnan().all()
    if model.config.is_moe:
        chosen = cache.experts.sort(dim=-1).values
        assert chosen.min() >= 0
        assert chosen.max() < model.config.num_local_experts
        assert (chosen.diff(dim=-1) > 0).all()


def test_rows_that_are_not_wanted_change_nothing():
    model = make_model("moe, one kv head", torch.bfloat16)
    decoder = make_decoder(model, torch.bfloat16)
    cache = Cache(model.config, torch.bfloat16)
    whole = torch.cat(list(cache.step(decoder, {0: random_tokens(20), 1: random_tokens(3)}).values()))
    for rows in ([], [22], [19, 22, 0]):
        logits, experts = decoder.forward(**cache.args | {"rows": torch.tensor(rows, dtype=torch.int64)})
        assert torch.equal(logits, whole[rows])
        assert torch.equal(experts, cache.experts)


def test_a_negative_slot_is_not_written():
    model = make_model("moe, one kv head", torch.float32)
    decoder = make_decoder(model, torch.float32)
    cache = Cache(model.config, torch.float32)
    cache.step(decoder, {0: random_tokens(20)})
    before = cache.keys.clone(), cache.values.clone()
    decoder.forward(**cache.args | {"slots": torch.full((20,), -1), "tokens": torch.tensor(random_tokens(20))})
    for kept, pages in zip(before, (cache.keys, cache.values), strict=True):
        assert torch.equal(kept.nan_to_num(7), pages.nan_to_num(7))


def test_the_weights_are_used_in_place():
    model = make_model("moe, one kv head", torch.float32)
    decoder = make_decoder(model, torch.float32)
    assert Cache(model.config, torch.float32).step(decoder, {0: [1, 2]})[0].abs().max() > 0
    model.lm_head.weight.zero_()
    assert Cache(model.config, torch.float32).step(decoder, {0: [1, 2]})[0].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": [0, 1, VOCABULARY]}, "a token is outside"),
        ({"tokens": [0, -1, 5]}, "a token is outside"),
        ({"slots": [0, 1, PAGES * PAGE_SIZE]}, "a slot is beyond"),
        ({"rows": [3]}, "a wanted row"),
        ({"rows": [0, 1, 2, 2]}, "a wanted row"),
        ({"query_offsets": [0, 2]}, "query_offsets"),
        ({"lengths": [2]}, "a length is shorter"),
        ({"lengths": [PAGES * PAGE_SIZE + 1]}, "a length is shorter"),
        ({"page_table": [[PAGES]]}, "a page in use"),
        ({"page_table": [[-1]]}, "a page in use"),
    ],
)
def test_what_points_outside_is_refused(changes, reason):
    model = make_model("moe, one kv head", torch.float32)
    decoder = make_decoder(model, torch.float32)
    cache = Cache(model.config, torch.float32)
    cache.step(decoder, {0: [1, 2, 3]})
    with pytest.raises(IndexError, match=reason):
        decoder.forward(**cache.args | {name: torch.tensor(value) for name, value in changes.items()})


def test_weights_of_another_kind_are_refused():
    model = make_model("moe, one kv head", torch.float32)
    with pytest.raises(ValueError, match=r"float32 and bfloat16 weights only, not torch\.float16"):
        make_decoder(model, torch.float16)
    model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros(64, 64).t()[:, :63])
    with pytest.raises(ValueError, match=r"contiguous CPU tensor \(64, 64\) of torch.float32"):
        make_decoder(model, torch.float32)


def test_this_machine_can():
    assert unavailable(torch.float32) is None
    assert unavailable(torch.bfloat16) is None
    assert not has_tiles(generic=True)


def test_torchs_threads_are_the_only_ones():
    """Loading the library loads no second OpenMP, and a step starts no thread beside torch's."""
    test = Path(__file__)
    program = f"""
import os, sys, torch
sys.path[:0] = [{str(test.parent)!r}, {str(test.parents[1])!r}]
from test_native_decoder import *
def loaded():
    return {{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}}
torch.set_num_threads(2)
torch.ones(1 << 20).add_(1)
before, threads = loaded(), len(os.listdir("/proc/self/task"))
model = make_model("moe, one kv head", torch.float32)
Cache(model.config, torch.float32).step(make_decoder(model, torch.float32), {{0: [1, 2, 3]}})
assert loaded() == before, (loaded(), before)
assert len(os.listdir("/proc/self/task")) == threads
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A stand-in that is quick: writes what it is asked for, and counts in `calls` how often it compiles."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    command = tmp_path / "compiler"
    command.write_text(
        "#!/bin/sh\ncase \"$*\" in *--version*) echo version 1; exit;; *' -c '*) echo >> $0.calls;; esac\n"
        'while [ $# -gt 1 ]; do shift; done; echo made > "$1"\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("CXX", str(command))
    return command


def test_a_library_is_compiled_once_for_each_version(compiler):
    calls = compiler.with_name("compiler.calls")
    first = native.build()
    assert native.build() == first
    assert len(calls.read_text().splitlines()) == 1
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert native.build("decoder", ("-DMOE_LM_GENERIC",)) != first
    assert native.build("training") != first
    compiler.write_text(compiler.read_text().replace("version 1", "version 2"))
    assert native.build() != first
    assert len(calls.read_text().splitlines()) == 4


def test_a_directory_that_others_can_write_is_refused(compiler, monkeypatch):
    directory = native.build().parent
    directory.chmod(0o770)
    with pytest.raises(native.BuildError, match="other users can write"):
        native.build()
    directory.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: directory.stat().st_uid + 1)
    with pytest.raises(native.BuildError, match="other users can write"):
        native.build()


def test_why_there_is_no_library(compiler, monkeypatch):
    library.cache_clear()
    try:
        compiler.write_text(
            "#!/bin/sh\ncase $1 in --version) exit;; esac\necho 'x.h:3: error: no such thing' >&2; exit 1"
        )
        assert unavailable().endswith("compiler: x.h:3: error: no such thing")
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert unavailable() == "Native code needs a C++ compiler, and there is no no-such-compiler, which CXX names."
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", "")
        assert unavailable() == (
            "Native code needs a C++ compiler: none of c++, g++, clang++ is on the path; install one or set CXX."
        )
        assert "not torch.float16" in unavailable(torch.float16)
    finally:
        library.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [5, 97, 4096])
def test_guesses_are_those_that_the_sampler_draws_from_a_forward_step(vocabulary, dtype, generic):
    """Tokens exactly, their laws to rounding; and the same bits for a sequence alone."""
    model = make_model("moe, one kv head", dtype, vocab_size=vocabulary)
    decoder, angles = make_decoder(model, dtype, generic), rotary_angles(model.config, torch.arange(64))
    prompts, counts, temperatures = [[1, 2, 3], [4], [0] * 15, [2, 2]], [5, 3, 4, 2], [0.7, 0.0, 1.5, 1e-30]
    uniforms = [tuple(torch.rand(count, dtype=torch.float64).tolist()) for count in counts]

    def guess(chosen: list[int]) -> tuple[list[list[int]], Tensor | None, Cache]:
        cache = Cache(model.config, dtype)
        pages = [cache.table[s].tolist() for s in chosen]
        wanted = [[each[s] for s in chosen] for each in (counts, temperatures, uniforms)]
        starts = [0] * len(chosen)
        return *decoder.guess(
            [prompts[s] for s in chosen], starts, pages, *angles, cache.keys, cache.values, *wanted
        ), cache  # fmt: skip

    found, laws, cache = guess([0, 1, 2, 3])
    assert list(map(len, found)) == counts
    for s, (prompt, tokens, temperature) in enumerate(zip(prompts, found, temperatures, strict=True)):
        plain = Cache(model.config, dtype)
        logits = plain.step(decoder, {s: prompt + tokens})[s][len(prompt) - 1 :]
        alone, own, _ = guess([s])
        assert alone == [tokens]
        if temperature:
            law = laws[s, : len(tokens)]
            assert torch.equal(own[0], law)
            torch.testing.assert_close(law, softened(logits[:-1], [temperature] * len(tokens)), atol=1e-7, rtol=2e-5)
            assert tokens == [draw(p, u) for p, u in zip(law, uniforms[s], strict=True)]
        else:
            assert tokens == logits[:-1].argmax(1).tolist()
        # What was guessed is in the cache: the next step goes on from there.
        cache.lengths[s] = len(prompt) + len(tokens) - 1
        assert torch.equal(cache.step(decoder, {s: tokens[-1:]})[s][0], logits[-1])


def test_drawn_guesses_have_the_law_of_the_model():
    """Chi-square of 4,000 pairs of tokens: what the second is drawn from depends on the first."""
    model = make_model("dense, odd sizes", torch.float32, vocab_size=4)
    decoder, cache = make_decoder(model, torch.float32), Cache(model.config, torch.float32)
    angles, table, batch = rotary_angles(model.config, torch.arange(16)), cache.table[:, 0].tolist(), 4
    generator, counts = torch.Generator().manual_seed(3), torch.zeros(4, 4)
    for _ in range(1000):
        uniforms = [tuple(row) for row in torch.rand(batch, 2, dtype=torch.float64, generator=generator).tolist()]
        found, _ = decoder.guess(
            [[1]] * batch, [0] * batch, [[page] for page in table], *angles, cache.keys, cache.values, [2] * batch,
            [0.8] * batch, uniforms,
        )  # fmt: skip
        for first, second in found:
            counts[first, second] += 1
    logits = Cache(model.config, torch.float32).step(decoder, {s: [1, s] for s in range(4)})
    first = torch.softmax(logits[0][0] / 0.8, 0)
    expected = 4000 * torch.stack([first[s] * torch.softmax(logits[s][1] / 0.8, 0) for s in range(4)])
    # 15 degrees of freedom: more than 44.3 comes once in ten thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 44.3


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_guess_without_finite_logits_is_none(bad, temperature):
    model = make_model("moe, one kv head", torch.float32)
    decoder, cache = make_decoder(model, torch.float32), Cache(model.config, torch.float32)
    model.lm_head.weight[:, 0] = bad
    found, _ = decoder.guess(
        [[1, 2]], [0], [cache.table[0].tolist()], *rotary_angles(model.config, torch.arange(16)), cache.keys,
        cache.values, [3], [temperature], [(0.1, 0.5, 0.9)],
    )  # fmt: skip
    assert found == [[]]
