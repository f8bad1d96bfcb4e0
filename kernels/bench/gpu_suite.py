"""Everything that only a GPU can show, in one run: tests with kernels compiled for real, the same bits a hundred times
over, CUDA-graph capture, and the benchmark beside its prediction.

Each part is a function of its own. What is wrong (a test, a bit, a graph, a result) fails the suite; what is slower
than predicted or than its target is reported.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import kernels
from kernels import use_backend
from kernels.bench import run
from kernels.bench.constants import GPUS, Gpu
from kernels.bench.distributions import router_logits
from kernels.bench.measure import Machine, as_tuple, machine
from kernels.bench.ops import BUILDERS, Result, build
from kernels.bench.predict import OPERATIONS as PREDICTED
from kernels.bench.predict import predict
from kernels.bench.shapes import SHAPES, Shape

ROOT = Path(__file__).resolve().parents[2]
PASSES = 100
PARTS = ("tests", "determinism", "graphs", "benchmark")
"""Keys of the report that hold what can fail."""
BACKEND = "gpu"

TEST_SHAPE = Shape(
    "suite", tokens=700, hidden=512, intermediate=384, experts=16, distribution="zipf", vocab=5000, sequence=350,
    heads=16, head_dim=64, batch=5, context=1500, queries=3, page=16,
)  # fmt: skip
"""For bits and graphs: several tiles and splits of everything, none of them full."""


class Target(NamedTuple):
    """A speed that the kernels were to reach."""

    op: str
    rate: str
    """Key of a record: flops_per_s, or bytes_per_s."""
    least: dict[str, float]
    """By name of the GPU's sheet."""


TARGETS = (
    Target("grouped_gemm", "flops_per_s", {"h100": 500e12, "a100": 230e12}),
    Target("paged_attention", "bytes_per_s", {name: 0.8 * gpu.bandwidth for name, gpu in GPUS.items()}),
)
"""On the shape `large`: 8,192 tokens, top 2 of 16 experts, 2,048 x 4,096; 16 sequences of 32k on one key-value head."""

Say = Callable[[str], None]


def run_tests(root: Path, say: Say) -> list[dict[str, Any]]:
    """The tests of the Triton backend and those marked `gpu`, each set in a pytest of its own from `root`."""
    files = sorted(str(path.relative_to(root)) for path in (root / "tests").glob("test_gpu_*.py"))
    sets = {
        "Triton backend": [*files, "-m", "not slow"] if files else None,
        "marked gpu": ["tests", "-m", "gpu", *(f"--ignore={name}" for name in files)],
    }
    return [run_pytest(name, root, args, say) for name, args in sets.items() if args]


def run_pytest(name: str, root: Path, args: Sequence[str], say: Say) -> dict[str, Any]:
    """Status and last line of one pytest; status 5, no such test, is no failure."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Compiling is what takes the time: 145 s with 14 processes for an H100, where one has some 30 minutes of it.
    spread = ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *spread, *args], cwd=root, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    ok = done.returncode in (0, 5)
    say(f"tests, {name}: {last}")
    if not ok:
        say(done.stdout[-4000:])
    return {"name": name, "status": done.returncode, "summary": last, "ok": ok}


def same_bits(first: Result, second: Result) -> bool:
    """Whether two results are equal in every bit; NaN equals itself here."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in zip(as_tuple(first), as_tuple(second), strict=True)
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def changed_passes(call: Callable[[], Result], passes: int = PASSES) -> int:
    """How many of `passes` calls give other bits than the first one."""
    first = tuple(part.clone() for part in as_tuple(call()))
    return sum(not same_bits(first, call()) for _ in range(passes))


def attempt(part: Callable[[], str | None]) -> str | None:
    """What is wrong by `part`'s own account, or the error that it raises: one broken operation must not cost the rest
    of the time on a GPU."""
    try:
        return part()
    except Exception as error:  # whatever a compiler, a driver or a kernel may throw
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def determinism(ops: Iterable[str], backend: str, device: torch.device, passes: int, say: Say) -> list[dict[str, Any]]:
    """Every operation, with its gradients where it has any, `passes` times on the same inputs."""

    def fault(op: str) -> str | None:
        case = build(op, TEST_SHAPE, device, torch.bfloat16, [backend])
        changed = changed_passes(case.contenders[backend].run, passes)
        return f"{changed} of {passes} passes give other bits" if changed else None

    found = []
    for op in ops:
        reason = attempt(lambda op=op: fault(op))
        found.append({"op": op, "passes": passes, "fault": reason, "ok": reason is None})
        say(f"same bits, {op}: {reason or f'in all of {passes} passes'}")
    return found


def cuda_graph(call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """What replays `call` from a CUDA graph, and the result that a replay writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Compiles, and fills the allocator's pools.
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def capture_fault(
    call: Callable[..., Result], args: Sequence[Any], capture: Callable[..., tuple[Callable[[], None], Result]]
) -> str | None:
    """What is wrong with a captured `call(*args)`: it must give the eager bits, also once its inputs have changed."""
    replay, result = capture(lambda: call(*args))
    replay()
    if not same_bits(result, call(*args)):
        return "a replay differs from the eager call"
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point():
            arg.copy_(arg.flip(-1).clone())
    replay()
    if not same_bits(result, call(*args)):
        return "a replay with new inputs differs from the eager call"
    return None


def mixture(logits: Tensor, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Routing and experts together: other logits are other loads, in the same graph."""
    return kernels.expert_mlp(x, kernels.route(logits, TEST_SHAPE.top_k), gate_up, down)


def graphs(backend: str, device: torch.device, capture: Callable, say: Say) -> list[dict[str, Any]]:
    """Capture and replay of a mixture, in training size and in decoding, and of paged attention."""
    found = []
    for name, call, args in graph_calls(device):
        with use_backend(backend), torch.no_grad():
            fault = attempt(lambda call=call, args=args: capture_fault(call, args, capture))
        found.append({"call": name, "fault": fault, "ok": fault is None})
        say(f"CUDA graph, {name}: {fault or 'replays with the eager bits'}")
    return found


def graph_calls(device: torch.device) -> list[tuple[str, Callable[..., Result], tuple]]:
    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, device=device).mul_(scale).bfloat16()

    shape, calls = TEST_SHAPE, []
    D, F, E = shape.hidden, shape.intermediate, shape.experts
    for name, tokens in (("mixture of many tokens", shape.tokens), ("mixture of one token", 1)):
        # Turned round, Zipf's logits make the last experts the busy ones: other tiles, in the same graph.
        logits = router_logits(shape.distribution, tokens, E, shape.seed).to(device)
        args = (logits, random(tokens, D), random(E, 2 * F, D, scale=D**-0.5), random(E, D, F, scale=F**-0.5))
        calls.append((name, mixture, args))
    built = BUILDERS["paged_attention"](shape, random)
    return [*calls, ("paged attention", built.call, built.args)]


def sheet(name: str) -> Gpu | None:
    """The data sheet for a device's name, if there is one."""
    return next((gpu for key, gpu in GPUS.items() if key in name.lower()), None)


def compare(records: Iterable[dict[str, Any]], gpu: Gpu, launch: float) -> list[dict[str, Any]]:
    """Our measured times beside the model's, to which `launch` is added, the time that measuring nothing takes."""
    found = []
    for r in records:
        op = "expert_mlp" if r["op"] == "sweep" else r["op"]
        if r["ours"] and op in PREDICTED:
            shape = Shape(**r["shape"])
            seconds = predict(gpu, op, shape).seconds + launch
            measured = r["cold"]["median"]
            found.append({
                "op": r["op"], "shape": shape.name, "tokens": shape.tokens, "distribution": shape.distribution,
                "measured": measured, "predicted": seconds, "ratio": measured / seconds,
            })  # fmt: skip
    return found


def targets(records: Iterable[dict[str, Any]], gpu: Gpu) -> list[dict[str, Any]]:
    """Which targets of this GPU our records on the shape `large` reach."""
    key = next(name for name, known in GPUS.items() if known == gpu)
    ours = [r for r in records if r["ours"] and r["shape"]["name"] == "large"]
    return [
        {"op": target.op, "rate": target.rate, "least": least, "measured": r["cold"][target.rate],
         "reached": r["cold"][target.rate] >= least}
        for target in TARGETS if (least := target.least.get(key)) is not None
        for r in ours if r["op"] == target.op
    ]  # fmt: skip


def comparison_table(found: Sequence[dict[str, Any]]) -> str:
    header = ("operation", "shape", "tokens", "loads", "measured", "predicted", "ratio")
    lines = [
        (
            c["op"], c["shape"], f"{c['tokens']}", c["distribution"], run.duration(c["measured"]),
            run.duration(c["predicted"]), f"{c['ratio']:.2f}",
        )
        for c in found
    ]  # fmt: skip
    return run.table(header, lines)


def measured(
    shapes: Sequence[Shape], device: torch.device, here: Machine, seconds: float, quick: bool, say: Say
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of every operation on the first shape, and on the others of those that depend on the experts' loads; and
    for each whether it ran and was right."""
    records, parts = [], []
    by_loads = ("grouped_gemm", "expert_mlp", "expert_mlp_training")
    for shape in shapes:
        for op in run.OPERATIONS if shape is shapes[0] else by_loads:

            def part(op: str = op, shape: Shape = shape) -> None:
                records.extend(
                    run.benchmark([op], [shape], device, torch.bfloat16, [BACKEND], here, seconds, quick, say)
                )

            fault = attempt(part)
            parts.append({"op": op, "distribution": shape.distribution, "fault": fault, "ok": fault is None})
            if fault:
                say(f"\n{op}, {shape.distribution}: {fault}")
    return records, parts


def suite(device: torch.device, seconds: float, quick: bool, say: Say) -> tuple[dict[str, Any], Machine]:
    """The whole report; its `ok` says whether everything is right, and `records` what was measured."""
    here = machine(device, torch.bfloat16)
    say(
        f"{here.name}: {run.flops_text(here.gemm)} in a GEMM, {run.bytes_text(here.copy)} in a copy, "
        f"{run.duration(here.launch)} for a launch"
    )
    report: dict[str, Any] = {
        "machine": here._asdict(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "tests": run_tests(ROOT, say), "determinism": determinism(BUILDERS, BACKEND, device, PASSES, say),
        "graphs": graphs(BACKEND, device, cuda_graph, say),
    }  # fmt: skip
    shapes = [SHAPES["large"].replace(distribution=d) for d in ("uniform", "zipf", "trained")]
    records, report["benchmark"] = measured(shapes, device, here, seconds, quick, say)
    report["records"] = records
    gpu = sheet(here.name)
    if gpu is None:
        say(f"\nThere is no data sheet of {here.name} in kernels/bench/constants.py: nothing to compare with.")
    else:
        report |= {
            "sheet": gpu._asdict(),
            "comparison": compare(records, gpu, here.launch),
            "targets": targets(records, gpu),
        }
        say(f"\nMeasured, with cold caches, beside the prediction and {run.duration(here.launch)} for a launch")
        say(comparison_table(report["comparison"]))
        for t in report["targets"]:
            verdict = "reached" if t["reached"] else "MISSED"
            text = run.flops_text if t["rate"] == "flops_per_s" else run.bytes_text
            say(f"target, {t['op']}: {text(t['measured'])} of {text(t['least'])}, {verdict}")
    report["ok"] = all(part["ok"] for key in PARTS for part in report[key])
    return report, here
