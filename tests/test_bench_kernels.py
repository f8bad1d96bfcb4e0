"""The benchmark and the predictions: counts by hand, the model against machine code and published figures, and every
part of the GPU suite that runs without a GPU."""

import json
import math
from pathlib import Path

import pytest
import torch

import kernels.reference
from kernels.bench import distributions, gpu_suite, measure, model, ops, predict, run
from kernels.bench.__main__ import main
from kernels.bench.constants import A100, GPUS, H100
from kernels.bench.cost import cost
from kernels.bench.shapes import SHAPES, SIZES, Shape

TINY = Shape(
    "tiny", tokens=40, hidden=32, intermediate=16, experts=4, vocab=50, sequence=20, heads=4, head_dim=8, batch=3,
    context=40, queries=2, page=8,
)  # fmt: skip
TINY_OPTIONS = [f"--{name.replace('_', '-')}={getattr(TINY, name)}" for name in SIZES]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_and_untuned(monkeypatch):
    """The command measures the machine with hundreds of megabytes and binds the process to its cores; no test does."""
    monkeypatch.setattr("kernels.cpu.process.tune_process", lambda: None)
    monkeypatch.setattr(measure, "GEMM_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)


def random(*sizes: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(sizes) * scale


@pytest.mark.parametrize("distribution", distributions.DISTRIBUTIONS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 4), (300, 16, 2), (77, 40, 3)])
def test_loads_hold_every_slot_and_repeat(distribution, tokens, experts, top_k):
    loads = distributions.loads(distribution, tokens, experts, top_k, seed=3)
    assert len(loads) == experts
    assert sum(loads) == tokens * top_k
    assert max(loads) <= tokens
    distributions.loads.cache_clear()
    assert distributions.loads(distribution, tokens, experts, top_k, seed=3) == loads


def test_loads_follow_their_distribution():
    zipf = distributions.loads("zipf", 20000, 8, 1)
    harmonic = sum(1 / (e + 1) for e in range(8))
    for e, load in enumerate(zipf):
        assert load / 20000 == pytest.approx(1 / (e + 1) / harmonic, rel=0.1)
    router = distributions.trained_router()
    counts = torch.tensor(router["windows"])
    assert (counts.sum(1) == router["window_tokens"] * router["top_k"]).all()
    drawn = distributions.loads("trained", len(counts) * router["window_tokens"], router["experts"], router["top_k"])
    share = counts.sum(0) / counts.sum()
    # Two different experts of few cannot be drawn quite in proportion.
    assert torch.tensor(drawn) / sum(drawn) == pytest.approx(share, rel=0.15)
    with pytest.raises(ValueError, match="'even' is unknown"):
        distributions.loads("even", 4, 4, 1)


def test_a_benchmark_runs_the_loads_that_a_prediction_counts():
    shape = TINY.replace(distribution="zipf", seed=5)
    routing = ops.expert_inputs(shape, random)[1]
    loads = distributions.loads("zipf", shape.tokens, shape.experts, shape.top_k, 5)
    assert tuple(routing.offsets.diff().tolist()) == loads


@pytest.mark.parametrize(
    ("gpu", "kind", "tile", "issue", "shared"),
    [
        (A100, "gemm", (128, 256, 64, 8, 3, 1), 0.25, 0.69),
        (A100, "gemm", (64, 128, 64, 4, 4, 1), 0.35, 1.12),
        (A100, "decode", (16, 128, 64, 4, 5, 2), 0.86, 2.62),
        (A100, "decode", (32, 128, 64, 4, 5, 2), 0.50, 1.62),
        (H100, "gemm", (128, 256, 64, 8, 3, 1), 0.19, 1.00),
        (H100, "gemm", (64, 256, 64, 4, 3, 1), 0.19, 1.25),
        (H100, "decode", (16, 128, 64, 4, 6, 2, True), 1.52, 4.75),
        (H100, "decode", (64, 128, 64, 4, 4, 2, True), 0.44, 1.75),
        (A100, "unlisted", (128, 128, 64, 4, 3, 2), 0.29, 0.75),
        (H100, "unlisted", (128, 128, 64, 8, 3, 1), None, 1.25),
    ],
)
def test_ratios_of_a_step_are_those_of_the_machine_code(gpu, kind, tile, issue, shared):
    """What kernels.check reads from the shipped kernels, and what two trial kernels had, against the closed forms."""
    tile = model.Tile(kind, *tile)
    cycles = model.step_cycles(gpu, tile)
    peak = 2 * tile.m * tile.n * tile.k / gpu.flop_per_clock
    assert cycles["shared"] / peak == pytest.approx(shared, abs=0.01)
    if issue is not None:
        assert cycles["issue"] / peak == pytest.approx(issue, abs=0.01)
    assert cycles["tensor"] >= peak


def test_a_product_by_hand():
    """16 experts of 1,024 rows, 2,048 x 4,096, on an H100: 16 x 8 x 16 tiles of 128 x 256 in 16 waves."""
    tile = model.Tile("gemm", 128, 256, 64, 8, 3, 1)
    kernel = predict.grouped(H100, "product", tile, (1024,) * 16, 4096, 2048)
    step = (128 + 256) * 64 * 2 / 32  # of L2, more than the 1,024 to 1,200 of tensor cores and shared memory
    clocks = 16 * (2048 / 64 * step + 1500 + 128 * 256 * 2 / 21)
    assert kernel.seconds == pytest.approx(1e-6 + clocks / 1.7e9)
    assert kernel.bound == "L2"
    assert kernel.flops == 2 * 16 * 1024 * 4096 * 2048
    one_more = predict.grouped(H100, "product", tile, (1025,) + (1024,) * 15, 4096, 2048)
    assert one_more.seconds == pytest.approx(1e-6 + clocks / 16 * math.ceil(129 * 16 / 132) / 1.7e9)


def test_memory_bounds_what_reads_more_than_it_computes():
    tokens = SHAPES["large"].replace(tokens=1)
    for gpu in (A100, H100):
        up = predict.expert_forward(gpu, tokens)[1]
        weights = 2 * 2 * 4096 * 2048 * 2
        assert up.bound == "HBM"
        assert up.seconds == pytest.approx(weights / (0.85 * gpu.bandwidth), rel=0.1)


def test_jobs_of_unequal_length():
    assert model.makespan([3, 3, 3, 3], 2) == 6
    assert model.makespan([1, 1, 5], 2) == 6
    assert model.makespan([5, 1, 1], 2) == 5


@pytest.mark.parametrize(("tiles", "waves"), [(132, 1), (198, 1.5), (199, 2), (66, 0.5), (67, 1), (264, 2)])
def test_half_tiles_shorten_a_last_wave_that_is_at_most_half_full(tiles, waves):
    """With a machine that fetches and stores at once, and whose tensor cores are all that is slow."""
    gpu = H100._replace(fill=0, l2_read=1e9, l2_write=1e9, bandwidth=1e18, best_gemm=H100.best_gemm / 8)
    tile = model.Tile("gemm", 128, 256, 64, 8, 3, 1, halves=True)
    one, some = (
        model.product(gpu, "", tile, n, 1024, flops=1, nbytes=1, stored=0).seconds - model.LAUNCH for n in (132, tiles)
    )
    assert some == pytest.approx(waves * one)


def test_a_weight_gradient_with_few_tiles_is_cut_into_chunks():
    even, partials = predict.gradient(H100, "d", (1024,) * 16, 4096, 2048)
    assert partials.bytes == 0
    assert "chunks" not in even.note
    heavy, partials = predict.gradient(H100, "d", (16384, *(0,) * 15), 256, 512)
    assert partials.bytes > 0
    assert "chunks" in heavy.note
    assert heavy.flops == 2 * 16384 * 256 * 512


def test_predictions_follow_the_tiles_that_are_chosen(monkeypatch):
    before = predict.predict(H100, "expert_mlp", SHAPES["large"]).seconds
    tile = predict.tiles.GemmTile(128, 128, 64, 8, 3, 1)
    monkeypatch.setattr(predict.tiles, "expert_gemm", lambda *_: tile)
    assert predict.predict(H100, "expert_mlp", SHAPES["large"]).seconds > 1.2 * before


def test_the_model_beside_published_figures():
    pairs = predict.published()
    for (point, value), tolerance in zip(pairs, (0.02, 0.02, 0.15, 0.15, 0.15), strict=True):
        assert value == pytest.approx(point.value, rel=tolerance), point.what


@pytest.mark.parametrize("gpu", ["a100", "h100"])
@pytest.mark.parametrize("distribution", distributions.DISTRIBUTIONS)
def test_no_cliff_is_predicted(gpu, distribution):
    shape = SHAPES["large"].replace(distribution=distribution)
    points = [
        (n, predict.predict(GPUS[gpu], "expert_mlp", shape.replace(tokens=n)).seconds) for n in run.SWEEP
    ]  # fmt: skip
    assert run.worst_fall(points)[0] < run.CLIFF


@pytest.mark.parametrize("op", [op for op in predict.OPERATIONS if op in predict.BY_LOADS])
def test_launches_do_the_work_of_their_operation(op):
    launches = predict.OPERATIONS[op](A100, SHAPES["nano"])
    assert sum(launch.flops for launch in launches) == cost(op, SHAPES["nano"]).flops
    assert all(launch.seconds > 0 for launch in launches)


def test_chunks_of_the_loss_are_those_of_the_kernel():
    pytest.importorskip("triton")
    import triton_device  # noqa: F401

    from kernels.gpu.cross_entropy import chunk_rows

    for sizes in ((8192, 2048, 100352), (1, 8, 2), (2048, 256, 4096), (65536, 4096, 32000)):
        assert predict.loss_chunk(*sizes) == chunk_rows(*sizes)


def test_costs_by_hand():
    assert cost("expert_mlp", TINY).flops == 40 * 2 * 2 * 3 * 32 * 16
    assert cost("expert_mlp", TINY).bytes == 2 * (2 * 40 * 32 + 4 * 3 * 32 * 16)
    assert cost("paged_attention", TINY).bytes == 2 * (2 * 3 * 40 * 8 + 2 * 6 * 4 * 8)
    assert cost("rms_norm", TINY, 4).bytes == 2 * 40 * 32 * 4
    assert cost("swiglu", TINY).bytes == 2 * 40 * 3 * 16
    assert cost("gate", TINY).flops == 2 * 40 * 32 * 4


def test_every_operation_is_measured():
    operations = {path.stem for path in Path(kernels.reference.__file__).parent.glob("*.py")} - {"__init__"}
    assert {op.removesuffix("_int8").removesuffix("_training") for op in ops.BUILDERS} == operations
    # What is torch's own there is not predicted.
    assert set(ops.BUILDERS) - set(predict.OPERATIONS) == {"attention", "gate", "router_statistics", "swiglu"}


def test_a_fall_in_tokens_per_second_is_found():
    assert run.worst_fall([(1, 1.0), (2, 1.5), (4, 2.0)]) == (0.0, 0, 0)
    assert run.worst_fall([(1, 1.0), (2, 1.0), (4, 4.0), (8, 4.1)]) == (0.5, 2, 4)
    assert "A CLIFF, of more than 25%; at worst 50% fewer" in run.cliff_sentence("x", [(2, 1.0), (4, 4.0)])
    assert "no cliff; at worst 20%" in run.cliff_sentence("x", [(4, 4.0), (8, 10.0)])


def test_contenders_take_turns_and_caches_are_emptied(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "Flush", lambda device: lambda: calls.append("flush"))
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.alternate(contenders, CPU, 0.0, quick=True)
    warm_up = ["a", "flush", "a", "b", "flush", "b"]
    forth, back = ["flush", "a", "a", "a"], ["flush", "b", "b", "b"]
    assert calls == [*warm_up, *forth, *back, *back, *forth, *forth, *back]
    assert {kind: len(seconds) for kind, seconds in times["a"].items()} == {"cold": 3, "warm": 3}


def test_a_sweep_goes_through_its_counts_several_times(monkeypatch):
    tokens, real = [], run.build
    monkeypatch.setattr(run, "build", lambda op, shape, *rest: tokens.append(shape.tokens) or real(op, shape, *rest))
    records = run.sweep(TINY, CPU, torch.float32, ["cpu"], 0.0, counts=(1, 3))
    assert tokens == [1, 3] * run.SWEEP_TURNS
    assert [(r["op"], r["shape"]["tokens"], r["contender"]) for r in records] == [
        ("sweep", n, name) for n in (1, 3) for name in ("cpu", "loop")
    ]
    assert {r["cold"]["calls"] for r in records} == {run.SWEEP_TURNS * measure.LEAST_ROUNDS}
    assert run.points(records, "cpu") == [(r["shape"]["tokens"], r["cold"]["least"]) for r in records if r["ours"]]


def test_quartiles_and_errors():
    assert measure.Times.of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 1.5, 4.5, 1.0, 5)
    true = torch.tensor([1.0, -4.0])
    assert measure.error(true + 1, true) == 0.25
    assert measure.error((true, true * 1.5), (true, true)) == 0.5
    assert measure.error(true[:1], true) == math.inf
    assert measure.error(torch.tensor([math.nan, -4.0]), true) == math.inf


def test_other_work_is_told(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("os.getloadavg", lambda: (3.7, 0.0, 0.0), raising=False)
    assert measure.busy().startswith("This machine has other work, a load of 3.7 on 2 cores")
    monkeypatch.setattr("os.getloadavg", lambda: (0.9, 9.0, 9.0), raising=False)
    assert measure.busy() is None


@pytest.mark.parametrize("op", ops.BUILDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contender_gets_the_reference_s_result(op, dtype):
    case = ops.build(op, TINY, CPU, dtype, ["cpu"])
    assert not case.missing
    for name, error in measure.errors(case).items():
        assert error < measure.TOLERANCE[dtype], name


def test_the_command_measures_checks_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "out.json", tmp_path / "roofline.png"]
    names = ["expert_mlp", "rms_norm"]
    written = ["--json", str(files[0]), "--plot", str(files[1])]
    assert main([*names, "--quick", "--device=cpu", *TINY_OPTIONS, *written]) == 0
    found = json.loads(files[0].read_text())
    assert {(r["op"], r["contender"]) for r in found["records"]} == {
        ("expert_mlp", "cpu"), ("expert_mlp", "loop"), ("expert_mlp", "grouped_mm"), ("expert_mlp", "dense"),
        ("rms_norm", "cpu"), ("rms_norm", "torch"), ("rms_norm", "copy"),
    }  # fmt: skip
    for r in found["records"]:
        assert r["shape"]["hidden"] == 32
        assert r["cold"]["low"] <= r["cold"]["median"] <= r["cold"]["high"]
        assert r["warm"]["flops_per_s"] == pytest.approx(r["flops"] / r["warm"]["median"])
    assert found["machine"]["gemm"] > 0 < found["machine"]["copy"]
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "* cpu" in capsys.readouterr().out


def test_a_wrong_result_ends_the_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(kernels.registry.module("cpu", "rope"), "rope", lambda x, cos, sin: x)
    assert main(["rope", "--quick", "--device=cpu", "--dtype=float32", *TINY_OPTIONS]) == 1
    assert "head_dim 8, batch 3, context 40, queries 2, page 8: cpu is wrong by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["warp"], "operation 'warp' is unknown; choose among expert_mlp,"),
        (["--predict", "attention"], "operation 'attention' is unknown"),
        (["--shapes", "huge"], "shape 'huge' is unknown; choose among large, mixtral, fine, nano."),
        (["--top-k", "17"], "--top-k is 17, more than --experts 16."),
        (["--predict", "--plot", "x.png"], "--plot means nothing with --predict."),
        (["--gpu", "h100"], "--gpu means nothing without --predict."),
        (["--gpu-suite", "rope"], "naming operations means nothing with --gpu-suite."),
        (["--tokens", "0"], "--tokens is 0; it must be at least 1."),
        (["--distribution", "even"], "--distribution is 'even'; choose one of uniform, zipf, trained."),
        (["--backend", "tpu", "--device", "cpu"], "--backend 'tpu' is unknown; choose among cpu, gpu, reference."),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(argv, sentence, capsys):
    assert main(argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_named(monkeypatch):
    monkeypatch.setattr(kernels.registry, "reason_against", lambda *_: "is out of order")
    with pytest.raises(ValueError, match="rope: the backend cpu is out of order"):
        ops.build("rope", TINY, CPU, torch.float32, ["cpu"])


def test_the_command_predicts(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["--predict", "--gpu", "h100", "expert_mlp", "paged_attention", "sweep", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    for text in ("up and SwiGLU", "expert_mlp, trained", "no cliff", "not fitted to", "128x256x64"):
        assert text in out
    found = json.loads(file.read_text())["predictions"]
    assert {p["op"] for p in found} == {"expert_mlp", "paged_attention", "sweep"}
    assert all(0 < p["of_peak_flops"] < 0.9 and 0 < p["of_peak_bandwidth"] < 0.9 for p in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_suite_needs_a_gpu(capsys):
    assert main(["--gpu-suite"]) == 2
    assert capsys.readouterr().err == "--gpu-suite needs a CUDA GPU, and torch sees none here.\n"


def test_other_bits_are_noticed():
    nan = torch.tensor([math.nan, 1.0])
    assert gpu_suite.changed_passes(lambda: nan, 5) == 0
    assert gpu_suite.changed_passes(lambda: torch.rand(3), 5) == 5
    assert not gpu_suite.same_bits(torch.zeros(2), -torch.zeros(2))
    said = []
    found = gpu_suite.determinism(["rope", "route"], "cpu", CPU, 3, said.append)
    assert [part["ok"] for part in found] == [True, True]
    found = gpu_suite.determinism(["no such operation"], "cpu", CPU, 3, said.append)
    assert found[0]["fault"].startswith("KeyError")
    assert len(said) == 3


def test_a_graph_must_follow_its_inputs():
    def eager(call):
        out = call().clone()
        return lambda: out.copy_(call()), out

    def stale(call):
        return lambda: None, call().clone()

    def wrong(call):
        return lambda: None, call() + 1

    def call(x, flag):
        return x * 2

    def fault(capture):
        return gpu_suite.capture_fault(call, (torch.arange(4.0), True), capture)

    assert fault(eager) is None
    assert fault(stale) == "a replay with new inputs differs from the eager call"
    assert fault(wrong) == "a replay differs from the eager call"


def test_captured_calls_run_on_the_cpu_too(monkeypatch):
    def eager(call):
        out = call().clone()
        return lambda: out.copy_(call()), out

    monkeypatch.setattr(gpu_suite, "TEST_SHAPE", TINY)
    said = []
    found = gpu_suite.graphs("cpu", CPU, eager, said.append)
    assert [part["fault"] for part in found] == [None] * 3, said


def test_tests_run_from_the_root(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu_x.py").write_text("def test_one(): pass\ndef test_two(): assert False\n")
    said, asked = [], []
    with monkeypatch.context() as patched:
        patched.setattr(gpu_suite, "run_pytest", lambda name, root, args, say: asked.append((name, args)))
        gpu_suite.run_tests(tmp_path, said.append)
    assert asked == [
        ("Triton backend", ["tests/test_gpu_x.py", "-m", "not slow"]),
        ("marked gpu", ["tests", "-m", "gpu", "--ignore=tests/test_gpu_x.py"]),
    ]
    found = gpu_suite.run_pytest(*asked[0][:1], tmp_path, asked[0][1], said.append)
    assert (found["status"], found["ok"]) == (1, False)
    assert "1 failed, 1 passed" in found["summary"]
    assert said[0] == f"tests, Triton backend: {found['summary']}"


def fake_record(op: str, seconds: float, shape: Shape = SHAPES["large"]) -> dict:
    samples = {"cold": [seconds] * 3, "warm": [seconds] * 3}
    return run.record(op, shape, torch.bfloat16, "gpu", samples, ours=True, rival=True, error=0.0)


def test_measurements_are_set_beside_predictions_and_targets():
    seconds = predict.predict(H100, "grouped_gemm", SHAPES["large"]).seconds
    records = [
        fake_record("grouped_gemm", 2 * seconds), fake_record("attention", 1.0),
        fake_record("paged_attention", 95e-6), fake_record("expert_mlp", 1.0) | {"op": "sweep"},
    ]  # fmt: skip
    gpu = gpu_suite.sheet("NVIDIA H100 80GB HBM3")
    assert gpu == H100
    assert gpu_suite.sheet("NVIDIA GeForce RTX 4090") is None
    compared = gpu_suite.compare(records, gpu, 0.0)
    assert [c["op"] for c in compared] == ["grouped_gemm", "paged_attention", "sweep"]
    assert compared[0]["ratio"] == pytest.approx(2)
    assert gpu_suite.compare(records, gpu, seconds)[0]["ratio"] == pytest.approx(1)
    assert "2.00" in gpu_suite.comparison_table(compared)
    assert {t["op"]: t["reached"] for t in gpu_suite.targets(records, gpu)} == {
        "grouped_gemm": False, "paged_attention": True,
    }  # fmt: skip
