"""Many requests at once on one model: continuous batching, a paged cache, speculation. In-process, without HTTP.

    engine = Engine(model, tokenizer, draft=draft)
    [result] = engine.generate(["def main("], SamplingParams(max_tokens=64, temperature=0))
    print(result.text)

What a request gets does not depend on who shares its batch, on chunks, on the prefix cache, on preemption or on
speculation (docs/engine.md says how, and where it holds bit for bit).
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from tokenizers import Tokenizer

from moe_lm.config import ConfigError
from moe_lm.engine.batch import Piece
from moe_lm.engine.block_pool import BlockPool
from moe_lm.engine.budget import count_blocks
from moe_lm.engine.checks import MODEL_KINDS, check_pair, check_request, check_speculation
from moe_lm.engine.controller import Report
from moe_lm.engine.drafting import Drafter
from moe_lm.engine.lengths import DraftLengths
from moe_lm.engine.request import Output, Result, SamplingParams
from moe_lm.engine.runner import Runner, block_bytes, cache_dtype
from moe_lm.engine.sample import Sample
from moe_lm.engine.scheduler import Scheduler, Work
from moe_lm.engine.sequence import Sequence, Status
from moe_lm.engine.snapshot import Snapshot, take_snapshot
from moe_lm.engine.speculative import Draft
from moe_lm.engine.stats import Stats
from moe_lm.engine.verdict import Verdict, judge, note_experts
from moe_lm.model import Transformer

T = TypeVar("T")
USUAL_LAG = 2
"""Tokens that the draft model has not read when all of its guesses stood: the last of them, and the one after it."""


class Engine:
    """A model, with or without its tokenizer and a draft model of the same vocabulary, and its requests.

    `kv_memory` is the most that the caches of model and draft take, as 2GiB; `max_step_tokens` the most new tokens in a
    step, of which a long prompt brings a chunk; `speculation` the default way of SPECULATIONS (`draft` if there is a
    draft model, else `none`), guessing up to `draft_tokens` at a time, fewer or none where that measures faster, unless
    `adaptive` is off. `stop_ids` end an output. `native` demands or forbids the native step of a CPU. `deterministic`
    makes bits independent of the batch also where that costs speed, and what a seed draws independent of speculation,
    where fewer guesses then stand. Raises ConfigError on what does not fit together.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer | None = None, draft: Transformer | None = None, *,
        kv_memory: int | str = "1GiB", kv_dtype: torch.dtype | None = None, block_size: int = 16,
        max_step_tokens: int = 512, max_sequences: int = 64, prefix_cache: bool = True, speculation: str | None = None,
        draft_tokens: int = 4, adaptive: bool = True, stop_ids: tuple[int, ...] = (), native: bool | None = None,
        deterministic: bool = False,
    ):  # fmt: skip
        check_pair(model, draft)
        models = [model] if draft is None else [model, draft]
        self.tokenizer, self.draft, self.deterministic = tokenizer, draft, deterministic
        self.num_experts = model.config.num_local_experts
        self.vocab_size, self.stop_ids = model.config.vocab_size, frozenset(stop_ids)
        self.speculation = check_speculation(speculation or ("draft" if draft else "none"), draft)
        self.lengths = DraftLengths(SamplingParams(draft_tokens=draft_tokens).draft_tokens, adaptive)
        context = min(each.config.max_position_embeddings for each in models)
        per_block = sum(block_bytes(each.config, block_size, kv_dtype or cache_dtype(each)) for each in models)
        blocks = count_blocks(kv_memory, per_block, max(1, max_sequences) * -(-context // block_size))
        self.scheduler = Scheduler(
            BlockPool(blocks, block_size, prefix_cache), max_step_tokens=max_step_tokens, max_sequences=max_sequences,
            context=context,
        )  # fmt: skip
        self.context = min(context, blocks * block_size)
        """Tokens of prompt and output together that a request may always have."""
        start = time.perf_counter()
        self.runners = [
            Runner(each, blocks, block_size, kv_dtype=kv_dtype, native=native, deterministic=deterministic)
            for each in models
        ]
        self.warm_up_seconds = time.perf_counter() - start
        """To make the cache, and to compile the native step where it is not there yet."""
        self.target, self.drafter = self.runners[0], Drafter(self.runners[1] if draft else None)
        self.samples: dict[Sequence, Sample] = {}
        self.requests: dict[str, set[int]] = {}
        """Of every request that has not finished, the samples that have not, those yet to be forked among them."""
        self.reports: list[Output] = []
        """For the next step to return."""
        self.made = 0
        self.stats = Stats()

    def add(self, prompt: str | list[int], params: SamplingParams | None = None, request_id: str | None = None) -> str:
        """Queue a request, and return its id. Raises ConfigError if it can never be served, with the numbers, and one
        that its mask's maker raises; anything else that the request's own code raises ends it with an error."""
        params = params or SamplingParams()
        tokens = self.check(prompt, params)
        if request_id is None:
            request_id, self.made = f"request-{self.made}", self.made + 1
        if request_id in self.requests:
            raise ConfigError(f"request_id = {request_id!r} is taken by a request that has not finished.")
        sequence = Sequence(request_id, params, tokens)
        sample = self.sample(sequence)
        if isinstance(sample.cause, ConfigError):
            raise sample.cause
        self.scheduler.add([sequence])
        self.samples[sequence] = sample
        self.requests[request_id] = set(range(params.n))
        return request_id

    def check(self, prompt: str | list[int], params: SamplingParams) -> list[int]:
        """The prompt's tokens. Raises ConfigError for what `add` would refuse, ContextError where it is too long.

        Changes nothing, and may be called in another thread while a step runs.
        """
        tokens = self.encode(prompt)
        check_request(tokens, params, self.vocab_size, self.tokenizer is not None, self.draft)
        self.scheduler.require_fit(len(tokens), params.max_tokens)
        return tokens

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; the next step reports it. Nothing happens if it has finished."""
        if request_id in self.requests:
            self.end(request_id, "abort")

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self.requests or self.reports)

    def step(self) -> list[Output]:
        """Compute one step, and return what it gave to every sample that got anything."""
        outputs, self.reports = self.reports, []
        start = time.perf_counter()
        with self.stats.timed("schedule"):
            self.lengths.choose(self.scheduler.running, self.samples)
            plan = self.scheduler.schedule(self.lengths)
        self.stats.count_plan(plan)
        for sequence in plan.started:
            self.samples[sequence].cached = sequence.cached
        if not plan.work:
            return outputs
        with self.stats.timed("draft"):
            for runner in self.runners:
                runner.copy_blocks(plan.copies)
            caught_up = seconds_of(self.catch_up, plan.work)[1]
            drafts, drafting = seconds_of(self.guess, plan.work)
        with self.stats.timed("forward"):
            pieces = [self.piece(work, draft) for work, draft in zip(plan.work, drafts, strict=True)]
            step = self.target.forward(pieces)
            logits = step.logits.cpu()
        with self.stats.timed("sample"):
            samples = [self.samples[work.sequence] for work in plan.work]
            verdicts = judge(plan.work, samples, drafts, [piece.wanted for piece in pieces], logits)
            if any(work.sequence.params.experts for work in plan.work):
                note_experts(plan.work, verdicts, step.experts)
        with self.stats.timed("output"):
            self.stats.count(pieces, plan.work, samples, verdicts, step.experts, self.num_experts)
            seconds = time.perf_counter() - start - caught_up
            self.lengths.record(plan.work, samples, verdicts, seconds, drafting)
            for work, sample, verdict in zip(plan.work, samples, verdicts, strict=True):
                # A sample whose sibling has just failed is over.
                if work.sequence.status is Status.RUNNING:
                    outputs += self.settle(work, sample, verdict)
            outputs += self.reports
            self.reports = []
        return outputs

    def generate(
        self, prompts: list[str] | list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Result]:
        """Serve all prompts to their ends, with params for all or for each. Raises ConfigError as `add` does, and then
        serves none."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        results: dict[str, Result] = {}
        try:
            for prompt, own in zip(prompts, each, strict=True):
                request_id = self.add(prompt, own)
                samples = [Output(request_id, index) for index in range(own.n)]
                results[request_id] = Result(request_id, self.encode(prompt), samples)
        except ConfigError:
            for request_id in results:
                self.abort(request_id)
            raise
        while any(request_id in self.requests for request_id in results):
            outputs = self.step()
            self.reports += [output for output in outputs if output.request_id not in results]
            for output in outputs:
                if output.request_id in results:
                    results[output.request_id].samples[output.index].extend(output)
        return list(results.values())

    def stream(self, prompt: str | list[int], params: SamplingParams | None = None) -> Iterator[Output]:
        """What one request gets, step by step, while others that were added go on beside it. Closing the iterator
        ends the request."""
        request_id = self.add(prompt, params)
        try:
            while request_id in self.requests:
                outputs = self.step()
                # Kept before the first of ours is given: the caller may not come back.
                self.reports += [output for output in outputs if output.request_id != request_id]
                yield from (output for output in outputs if output.request_id == request_id)
        finally:
            self.abort(request_id)

    def describe(self) -> str:
        """How the steps are computed, in a sentence."""
        return self.target.describe()

    def unstarted(self) -> set[str]:
        """Requests of which nothing has started. Its cost is that of going through those that wait."""
        return self.scheduler.unstarted()

    def snapshot(self) -> Snapshot:
        """What runs and waits, and how full the cache is, between two steps."""
        return take_snapshot(self.scheduler, self.samples)

    def speculation_reports(self) -> dict[str, Report]:
        """By kind of speculation: acceptance by place, tokens per step, what verifying costs beside plain steps."""
        return self.lengths.reports()

    def reset_stats(self) -> None:
        """Count from 0 again; what was learned about speculation stays."""
        self.stats = Stats()

    def encode(self, prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ConfigError("the prompt is text and the engine has no tokenizer; give token ids or a tokenizer.")
        return self.tokenizer.encode(prompt).ids

    def sample(self, sequence: Sequence) -> Sample:
        kind = sequence.params.speculation or self.speculation
        coupled = self.deterministic or sequence.params.reproducible
        return Sample(sequence, kind, self.vocab_size, self.tokenizer, coupled)

    def catch_up(self, works: list[Work]) -> None:
        """Have the draft model read what came while it was not asked. Not a cost of the guess that wants it: it comes
        once, and if it counted, guessing would look dear for ever to who has just tried it again."""
        samples = [self.samples[work.sequence] for work in works if work.drafts]
        self.drafter.read([
            (sample, len(sample.sequence.tokens) - 1) for sample in samples
            if sample.kind in MODEL_KINDS and len(sample.sequence.tokens) - sample.sequence.draft_computed > USUAL_LAG
        ])  # fmt: skip

    def guess(self, works: list[Work]) -> list[Draft]:
        """A draft for each work, empty where there is no room for one; and the draft model reads what is prefilled."""
        samples = [self.samples[work.sequence] for work in works]
        pairs = list(zip(works, samples, strict=True))
        drafts = iter(self.drafter.propose([(sample, work.drafts) for work, sample in pairs if work.drafts]))
        self.drafter.read([
            (sample, work.start + work.count) for work, sample in pairs
            if work.count > 1 and sample.kind in MODEL_KINDS
        ])  # fmt: skip
        return [next(drafts) if work.drafts else Draft() for work in works]

    def piece(self, work: Work, draft: Draft) -> Piece:
        sequence, end = work.sequence, work.start + work.count
        wanted = len(draft.tokens) + 1 if work.samples else 0
        if self.samples[sequence].wants_prompt_logprobs(end):
            wanted = work.count + len(draft.tokens)
        return Piece(sequence.tokens[work.start : end] + draft.tokens, work.start, sequence.blocks, wanted)

    def settle(self, work: Work, sample: Sample, verdict: Verdict) -> list[Output]:
        """Book what one work brought; what there is to report of it."""
        sequence, params = work.sequence, work.sequence.params
        sample.verified = bool(verdict.draft.tokens)
        if not work.samples:
            self.scheduler.advance(work, [])
            if sequence.computed < len(sequence.tokens):
                return []
        output = Output(sequence.request_id, sequence.index)
        sample.push(verdict.tokens, self.stop_ids, output)
        verdict.report(output, params.logprobs)
        output.prompt_logprobs = sample.take_prompt_logprobs()
        output.cached, sample.cached = sample.cached, None
        if output.tokens:
            self.scheduler.advance(work, output.tokens)
            if sequence.index == 0 and len(sequence.tokens) == sequence.prompt_length + len(output.tokens):
                for child in self.scheduler.fork(sequence, params.n - 1):
                    self.samples[child] = self.sample(child)
        if not params.max_tokens:
            output.finish_reason = "length"
        output.error = sample.error or self.failure(sequence, verdict, output)
        if output.error:
            output.finish_reason, output.stop_reason = "error", None
        if output.finish_reason:
            self.finish(sequence, output.finish_reason)
        if output.error:
            self.end(sequence.request_id, "error", output.error)
        return [output]

    def failure(self, sequence: Sequence, verdict: Verdict, output: Output) -> str | None:
        """What is wrong with the logits that an output came from."""
        failed = verdict.failed and output.finish_reason is None
        if not sequence.params.max_tokens:
            failed = any(each and math.isnan(each.logprob) for each in output.prompt_logprobs or ())
        if failed:
            return f"the model's logits after token {len(sequence.tokens)} of this request are not finite."
        return None

    def finish(self, sequence: Sequence, reason: str) -> None:
        """Forget one sample."""
        self.scheduler.finish(sequence, reason)
        self.forget(sequence)
        left = self.requests[sequence.request_id]
        left.remove(sequence.index)
        if not left:
            del self.requests[sequence.request_id]

    def end(self, request_id: str, reason: str, error: str | None = None) -> None:
        """End what is left of a request, and report it with the next outputs."""
        left = self.requests.pop(request_id, ())
        self.reports += [Output(request_id, index, finish_reason=reason, error=error) for index in sorted(left)]
        for sequence in self.scheduler.abort(request_id):
            self.forget(sequence)

    def forget(self, sequence: Sequence) -> None:
        del self.samples[sequence]
        self.lengths.forget(sequence)


def seconds_of(run: Callable[[list[Work]], T], works: list[Work]) -> tuple[T, float]:
    """What `run` returns, and its seconds."""
    start = time.perf_counter()
    found = run(works)
    return found, time.perf_counter() - start
