"""The benchmark of generation from its arguments to its figures: who competes, in which cases, against which limit."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from moe_lm import load, load_tokenizer
from moe_lm.bench import machine, throughput_table
from moe_lm.bench.limits import decode_limit, prefill_limit, trace_limit
from moe_lm.bench.peers import TransformersPeer
from moe_lm.bench.throughput import (
    CannotMeasure,
    Contender,
    EngineContender,
    Record,
    alternate,
    distinct_experts,
    phase_shares,
    ratio,
    record,
    speculation_facts,
    with_peer,
)
from moe_lm.bench.workload import CASES, QUICK_CASES, SHAPES, Case, Workload, random_text, stdlib_text
from moe_lm.config import require
from moe_lm.engine import Engine
from moe_lm.model import Transformer

ROUTER_DEVIATION = 2.0
"""Standard deviation of a random model's router logits: wide enough that tokens differ in their choice of experts."""


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model of a shape of SHAPES with random weights, the same ones every time."""
    model = Transformer(SHAPES[shape]).reset_parameters(torch.Generator().manual_seed(0))
    config = model.config
    with torch.no_grad():
        for block in model.layers:
            # Its input is normed: a logit is a sum of hidden_size products of unit variance and initializer_range.
            block.mlp.gate.weight.mul_(ROUTER_DEVIATION / (config.initializer_range * config.hidden_size**0.5))
    return model.to(device, dtype).eval()


class Contest:
    """All that is measured in one run. `say` takes the lines of the table as they come.

    Raises ConfigError for arguments that cannot work, before anything is measured but the machine.
    """

    def __init__(self, args: Namespace, device: torch.device, say: Callable[[str], None]):
        self.args, self.device, self.say = args, device, say
        self.dtype = getattr(torch, args.dtype) if args.dtype else machine.fastest_dtype(device)
        self.tokenizer = None
        if args.shape:
            self.model = random_model(args.shape, device, self.dtype)
            self.text = random_text(self.model.config.vocab_size)
        else:
            self.model = load(args.model, dtype=self.dtype, device=device)
            self.tokenizer = load_tokenizer(args.model)
            self.text = stdlib_text(self.tokenizer)
        self.draft = load(args.draft, dtype=self.dtype, device=device) if args.draft else None
        if self.draft is not None and self.tokenizer is not None:
            same = load_tokenizer(args.draft).to_str() == self.tokenizer.to_str()
            require(same, f"the draft {args.draft} has another tokenizer than {args.model}: train it with this one.")
        self.warm_up: dict[str, float] = {}
        """Seconds of getting ready, by contender: opening, compiling, the first pass of every case, the trials."""
        self.notes: list[str] = []
        """A sentence for each thing that could not be measured."""
        kind = args.speculation or ("draft" if args.draft else None)
        self.engines = {name: self.timed(name, self.engine, name) for name in ("none", kind) if name}
        self.peer = self.timed("transformers", TransformersPeer, self.model, self.tokenizer) if args.against else None
        self.columns = throughput_table.columns(kind is not None, self.peer is not None)
        self.gemm, self.bandwidth = [machine.gemm_rate(device, self.dtype)], [machine.read_bandwidth(device)]
        """FLOP/s and bytes read per second, every time that they were measured."""

    def timed(self, contender: str, run: Callable, *arguments: Any) -> Any:
        """The result of `run(*arguments)`; its time is part of the contender's warm-up."""
        start = time.perf_counter()
        result = run(*arguments)
        self.warm_up[contender] = self.warm_up.get(contender, 0.0) + time.perf_counter() - start
        return result

    def engine(self, speculation: str) -> EngineContender:
        engine = Engine(
            self.model, draft=self.draft if speculation in ("draft", "staged") else None, speculation=speculation,
            kv_memory=self.args.kv_memory, draft_tokens=4 if self.args.draft_tokens is None else self.args.draft_tokens,
        )  # fmt: skip
        return EngineContender(engine, speculation)

    def run(self) -> dict[str, Any]:
        """All figures, as they go into the JSON."""
        here = {
            "device": machine.describe(self.device), "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__, "engine": self.engines["none"].engine.describe(),
            "transformers": self.peer.version if self.peer else None,
        }  # fmt: skip
        self.say(
            f"{here['device']}\n{self.gemm[0] / 1e9:,.0f} GFLOP/s in a {here['dtype']} product, "
            f"{self.bandwidth[0] / 1e9:.1f} GB/s read\n{here['engine']}\n\n{throughput_table.header(self.columns)}"
        )
        lines: list[Record] = []
        for case in self.cases():
            try:
                lines += self.measure(case)
            except CannotMeasure as error:
                self.notes.append(f"{case.name} at batch {case.batch} is not measured: {error}")
        here["gemm_flops_per_s"], here["read_bytes_per_s"] = map(statistics.median, (self.gemm, self.bandwidth))
        peer = ("transformers", self.peer.version) if self.peer else None
        self.say(f"\n{throughput_table.legend(len(self.engines) > 1, peer)}")
        self.say("warm-up: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.warm_up_names().items()))
        if self.peer:
            self.notes += [f"transformers with {name} cannot run: {why}" for name, why in self.peer.failures.items()]
        for note in self.notes:
            self.say(note)
        return {"cases": lines, "machine": here, "warm_up_s": self.warm_up_names(), "not_measured": self.notes}

    def warm_up_names(self) -> dict[str, float]:
        ours = {"none": "engine"} | {name: f"engine, {name}" for name in self.engines if name != "none"}
        return {ours.get(name, name): seconds for name, seconds in self.warm_up.items()}

    def cases(self) -> list[Case]:
        """The cases that the model's context holds."""
        models = [self.model] + ([self.draft] if self.draft else [])
        limit = min(model.config.max_position_embeddings for model in models)
        fitting = []
        for case in QUICK_CASES if self.args.quick else CASES:
            if case.context <= limit:
                fitting.append(case)
            else:
                self.notes.append(
                    f"{case.name} at batch {case.batch} is not measured: its longest request takes {case.context} "
                    f"positions, and the context holds {limit}."
                )
        return fitting

    def measure(self, case: Case) -> list[Record]:
        """The lines of one case: plain, then with speculation. Raises CannotMeasure where a request fails."""
        warm = case.workload(self.text, -1)
        peers: dict[str, Contender] = {}
        if self.peer:
            try:
                peers = self.timed("transformers", self.peer.contenders, case, warm)
            except CannotMeasure as error:
                self.notes.append(f"{case.name} at batch {case.batch} has no peer: {error}")
        for name, engine in self.engines.items():
            self.timed(name, engine, warm)
            engine.stats.clear()
        contenders = self.engines | {f"peer {name}": run for name, run in peers.items()}
        runs = {name: rate_of(case, contender) for name, contender in contenders.items()}
        rates = alternate(case, runs | {"machine": lambda _: self.probe(case)}, self.text, self.args.turns)
        limits = [self.limit(case, *probed) for probed in rates["machine"]]
        theirs = {name: rates[f"peer {name}"] for name in peers}
        lines = []
        for name, engine in self.engines.items():
            line = record(case, self.args.shape or self.args.model, name, rates[name], limits)
            if theirs:
                line = with_peer(line, rates[name], theirs)
            if case.name == "decode":
                shares = phase_shares(engine.stats)
                line |= {"phases": shares, "overhead": shares["schedule"] + shares["sample"]}
                line["distinct_experts"] = self.experts(name)
            if name != "none":
                line |= {"ratio_to_plain": ratio(rates[name], rates["none"]), **speculation_facts(engine.stats)}
            lines.append(line)
            self.say(throughput_table.row(self.columns, line))
        return lines

    def experts(self, name: str) -> float:
        """Distinct experts of a layer that an engine's steps read."""
        return distinct_experts(self.engines[name].stats, len(self.model.config.routing_layers))

    def probe(self, case: Case) -> tuple[float, float]:
        """What the machine can do now: FLOP/s and bytes read per second; of these only what the case's limit takes."""
        if case.name != "decode":
            self.gemm.append(measured_now(machine.gemm_rate, self.device, self.dtype))
        if case.name != "prefill":
            self.bandwidth.append(measured_now(machine.read_bandwidth, self.device))
        return self.gemm[-1], self.bandwidth[-1]

    def limit(self, case: Case, gemm: float, bandwidth: float) -> float:
        """The most tokens per second of plain decoding, or of the prompt, with the experts that the engine counted."""
        config, itemsize = self.model.config, self.dtype.itemsize
        if case.name == "prefill":
            return prefill_limit(config, case.prompt[1], gemm)
        if case.name == "decode":
            return decode_limit(config, itemsize, case.batch, self.experts("none"), bandwidth)
        return trace_limit(config, itemsize, case.workload(self.text, 0), bandwidth, gemm)


def rate_of(case: Case, contender: Contender) -> Callable[[Workload], float]:
    """The contender as a function from requests to tokens per second."""
    return lambda work: contender(work).rate(case.name)


def measured_now(rate: Callable[..., float], *arguments: Any) -> float:
    """A rate of moe_lm.bench.machine, which keeps it for the whole process, measured again.

    The machine takes its turn as the contenders do: where other work slows them, it slows the limit too.
    """
    return rate.__wrapped__(*arguments)
