"""What the server does under load, whether it answers everybody, and what HTTP costs beside the bare engine.

    python -m moe_lm.bench serve runs/nano --draft runs/nano/draft
    python -m moe_lm.bench serve runs/nano --url http://127.0.0.1:8000    a server that runs already

First both serve the same requests in turns, each in a process of its own: ratios are medians of the turns' ratios. The
rate that the server reached there is its saturation. Then requests arrive at random moments at 0.25, 0.5 and 0.9 times
that rate, and at 10 times, where a fifth of the clients leave and others read slowly. In the end the server is told to
end while it works. Prompts are source text, as in the benchmark of generation. Figures of latency come from the client,
beside them the server's own from /metrics; client and server share the machine. A server with --url is only loaded.
The tables come first, then all figures as one line of JSON; with --json the tables go to stderr. The exit status is 1
if a request was not answered as it must be, a block of the cache is not free in the end, or the like.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM
from typing import Any

from moe_lm.bench import load
from moe_lm.bench.client import Ask, Server
from moe_lm.bench.contenders import BareEngine, ServerProcess, bare_engine, server_at
from moe_lm.bench.load import Phase
from moe_lm.bench.throughput import Record, alternate, ratio, spread
from moe_lm.bench.throughput_table import OURS, Column, header, rate, row, times
from moe_lm.bench.workload import Case, Workload, stdlib_text
from moe_lm.cli import Parser, run_main
from moe_lm.config import require


@dataclass(frozen=True)
class Scale:
    """How much is asked for."""

    batch: Case
    saturation: Case
    """Its lengths are those of all requests that arrive one by one."""
    seconds: float
    """Of arrivals, in each phase."""
    max_waiting: int
    in_flight: int
    """Requests as long as the context allows that run when the server is told to end."""


FULL = Scale(Case("decode", 16, (32, 32), (128, 128)), Case("saturation", 64, (16, 256), (16, 128)), 20, 256, 8)
QUICK = Scale(Case("decode", 4, (6, 6), (16, 16)), Case("saturation", 16, (4, 24), (4, 16)), 0.7, 12, 4)
SWEEP = (0.25, 0.5, 0.9)
OVERLOAD = 10

COST = (
    *OURS[:4],
    Column("engine", 9, rate("engine_tokens_per_s")),
    Column("ratio", 6, times("ratio")),
)
LATENCIES = {"first": "first token", "between": "between tokens", "whole": "whole answer"}


def seconds(key: str) -> Callable[[Record], str]:
    """Milliseconds, or nothing."""
    return lambda line: "" if line.get(key) is None else f"{1000 * line[key]:,.1f}"


LATENCY = (
    Column("ms", -16, lambda line: line["name"]),
    *(Column(f"{whose}{name}", 9 + len(whose), seconds(f"{whose}{name}"))
      for whose in ("", "server ") for name in (*load.QUANTILES, "mean")),
)  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m moe_lm.bench serve")
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", type=Path, help="the model's directory (default: the newest run)")
    add("--draft", default="none", help="a draft model with the same tokenizer (default %(default)s)")
    add("--speculation", help="how to guess ahead: none, ngram, draft or staged (draft with a draft model, else none)")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of the computation; the model's own")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    add("--url", help="a server of MODEL on this machine, without keys, to be loaded instead of one's own")
    add("--seconds", type=float, help="of arrivals at each rate (default 20)")
    add("--turns", type=int, default=5, help="measurements beside the bare engine (default %(default)s)")
    add("--quick", action="store_true", help="short phases, to see that everything runs")
    add("--json", action="store_true", help="one line of JSON on stdout, the tables on stderr")
    return parser


class LoadTest:
    """All phases of one run. `say` takes the lines of the tables as they come. Raises ConfigError."""

    def __init__(self, args: Namespace, model: Path, say: Callable[[str], None]):
        from moe_lm.checkpoint import load_tokenizer

        self.args, self.model, self.say = args, model, say
        self.scale = QUICK if args.quick else FULL
        self.seconds = self.scale.seconds if args.seconds is None else args.seconds
        self.text = stdlib_text(load_tokenizer(model))
        self.failures: list[str] = []
        self.phases: list[Record] = []
        self.cost: list[Record] = []

    def run(self) -> dict[str, Any]:
        """All figures, as they go into the JSON."""
        drain = None
        if self.args.url:
            self.look(self.args.url)
            self.saturate()
            self.rates()
        else:
            # Both start at once: most of that is importing torch.
            with bare_engine(self.opening()) as engine:
                process = ServerProcess(self.words())
                try:
                    self.look(process.url)
                    self.compare(engine)
                    self.rates()
                    drain = self.drain(process)
                finally:
                    process.end()
        for failure in self.failures:
            self.say(failure)
        return {"model": str(self.model), "server": self.about, "cost": self.cost, "phases": self.phases,
                "drain": drain, "failures": self.failures}  # fmt: skip

    def words(self) -> list[str]:
        """What our server is started with."""
        args = self.args
        words = [str(self.model), "--draft", args.draft, "--device", args.device, "--name", "model",
                 "--max-waiting", str(self.scale.max_waiting)]  # fmt: skip
        for name in ("speculation", "dtype"):
            if getattr(args, name):
                words += [f"--{name}", getattr(args, name)]
        return words

    def opening(self) -> dict[str, Any]:
        """The same for the engine alone."""
        args = self.args
        return {"model": self.model, "draft": None if args.draft == "none" else args.draft, "dtype": args.dtype,
                "device": args.device, "speculation": args.speculation}  # fmt: skip

    def look(self, url: str) -> None:
        """Learn what a server says of itself."""
        server = server_at(url)

        async def ask() -> tuple[Any, Any]:
            return await server.json("/v1/models"), await server.json("/status")

        try:
            models, status = asyncio.run(ask())
        except OSError as error:
            require(False, f"nobody answers at {url}: {error}.")
        require("error" not in status, f"the server at {url} refuses: {status.get('error', {}).get('message')}")
        card = models["data"][0]
        self.server, self.context = Server(server.host, server.port, card["id"]), card["max_model_len"]
        kept = ("speculation", "draft", "max_sequences", "max_waiting", "num_hidden_layers", "num_experts")
        self.about = {name: status[name] for name in kept} | {"max_model_len": self.context}
        need = max(case.context for case in (self.scale.batch, self.scale.saturation))
        require(need <= self.context, f"the longest request takes {need} positions, and the context holds "
                                      f"{self.context}: try --quick.")  # fmt: skip

    def over_http(self, case: Case, work: Workload) -> float:
        """Tokens per second of a workload through the server."""
        asks = [Ask(prompt, n, counted=False) for prompt, n in zip(work.prompts, work.outputs, strict=True)]
        begin = time.perf_counter()
        phase = Phase(case.name, answers=asyncio.run(load.at_once(self.server, asks)))
        elapsed = time.perf_counter() - begin
        self.failures += load.complaints(phase)
        return work.tokens / elapsed

    def saturate(self) -> None:
        """Measure the rate at which a server is saturated."""
        case = self.scale.saturation
        self.over_http(case, case.workload(self.text, -1))
        rates = [self.over_http(case, case.workload(self.text, turn)) for turn in range(self.args.turns)]
        self.saturated = statistics.median(rates) * case.batch / sum(n for _, n in case.lengths())

    def compare(self, engine: BareEngine) -> None:
        """Measure the same through the server and without it."""
        engine.answer()
        self.say(header(COST))
        for case in (self.scale.batch, self.scale.saturation):
            runs = {
                "http": lambda work, case=case: self.over_http(case, work),
                "engine": lambda work: work.tokens / engine(work),
            }
            warm = case.workload(self.text, -1)
            for run in runs.values():
                run(warm)
            rates = alternate(case, runs, self.text, self.args.turns)
            line = {
                "name": case.name, "batch": case.batch, "turns": self.args.turns, "spread": spread(rates["http"]),
                "tokens_per_s": statistics.median(rates["http"]),
                "engine_tokens_per_s": statistics.median(rates["engine"]),
                "ratio": ratio(rates["http"], rates["engine"]),
            }  # fmt: skip
            self.cost.append(line)
            self.say(row(COST, line))
        self.saturated = line["tokens_per_s"] * case.batch / sum(n for _, n in case.lengths())
        self.say("engine: the same requests without HTTP; ratio: tokens/s as a multiple of it")

    def rates(self) -> None:
        """Requests that arrive one by one, at several rates."""
        case = self.scale.saturation
        usual_wait = self.about["max_waiting"] / self.saturated / 2
        for share in (*SWEEP, OVERLOAD):
            draw = random.Random(f"arrivals {share}")
            asks = (load.mixed(draw, self.text, case.prompt, case.output) for _ in range(load.MOST_REQUESTS))
            if share == OVERLOAD:
                asks = (load.unruly(draw, ask, usual_wait) for ask in asks)
            phase = Phase(f"{share:g}x", rate=share * self.saturated)
            work = load.arrive(self.server, asks, phase.rate, self.seconds, random.Random(f"moments {share}"))
            asyncio.run(load.measured(self.server, phase, work))
            self.report(phase, ordinary=share != OVERLOAD)

    def report(self, phase: Phase, ordinary: bool) -> None:
        """Keep and show what came of a phase; `ordinary` clients see the latencies that the server sees."""
        line = load.record(phase)
        self.phases.append(line)
        self.failures += load.complaints(phase) + (load.disagreements(line) if ordinary else [])
        self.say(f"\n{line['name']} of saturation: {line['rate']:.1f} requests/s\n{summary(line)}\n{header(LATENCY)}")
        for name, title in LATENCIES.items():
            ours, theirs = line[name] or {}, line["server"][name] or {}
            shown = {"name": title, **ours, **{f"server {key}": value for key, value in theirs.items()}}
            self.say(row(LATENCY, shown))

    def drain(self, process: ServerProcess) -> Record:
        """Tell our server to end while it works."""
        case, draw = self.scale.saturation, random.Random("drain")
        long = [Ask(self.text[start : start + 8], self.context - 8) for start in range(self.scale.in_flight)]
        short = [load.mixed(draw, self.text, case.prompt, case.output) for _ in range(case.batch)]
        work = load.drained(self.server, long + short, short[0], lambda: process.process.send_signal(SIGTERM))
        flying, later = asyncio.run(work)
        status = process.wait(load.ENDING_SECONDS)
        self.failures += load.drain_complaints(flying, later, status)
        line = {"in_flight": load.outcomes(flying), "late": load.outcomes(later), "exit_status": status}
        told = "; ".join(f"{title}: {counts(line[key])}" for key, title in
                         (("in_flight", "in flight"), ("late", "afterwards")))  # fmt: skip
        self.say(f"\nSIGTERM under load\n{told}; exit status {status}")
        return line


def counts(line: Record) -> str:
    """Outcomes that there were."""
    return ", ".join(f"{line[name]:,} {name}" for name in ("sent", *load.OUTCOMES) if line[name])


def summary(line: Record) -> str:
    """What a phase came to, in a line."""
    return f"{counts(line)}; {line['requests_per_s']:.1f} answers/s, {line['tokens_per_s']:,.0f} tokens/s"


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    require(args.turns >= 1, f"--turns {args.turns} must be at least 1.")
    require(args.seconds is None or args.seconds > 0, f"--seconds {args.seconds} must be above 0.")
    from kernels.bench.measure import busy
    from moe_lm.checkpoint import newest_run

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    other_work = busy()
    if other_work:
        say(other_work)
    found = LoadTest(args, args.model or newest_run(Path("runs")), say).run()
    found["other_work"] = other_work
    print(json.dumps(found, allow_nan=False))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    run_main(main)
