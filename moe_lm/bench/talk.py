"""The end of a run: the trained model writes, with its draft and without, and the report is made."""

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from moe_lm import __version__, load
from moe_lm.bench import machine
from moe_lm.bench.speculation import as_table, compare
from moe_lm.config import RunConfig
from moe_lm.data.tokenizer import end_of_text_id
from moe_lm.engine import Engine, SamplingParams
from moe_lm.scaling.counts import parameters
from moe_lm.train.report import ModelFacts, RunFacts, Sample, SpeculationRow, write_report
from moe_lm.train.run import TrainedModel


def talk(run_dir: Path, config: RunConfig, trained: list[TrainedModel], command: str, say: Callable) -> None:
    """Print samples and what the draft is worth, both computed as in training, and write report.md and report.html into
    the run directory."""
    device, tokenizer = trained[0].trainer.device, trained[0].tokenizer
    model, *drafts = (load(each.run_dir, device=device, dtype=each.trainer.dtype) for each in trained)
    draft = drafts[0] if drafts else None
    sample = config.sample
    engine = Engine(
        model, tokenizer, draft, draft_tokens=sample.draft_tokens, stop_ids=(end_of_text_id(tokenizer),),
        max_sequences=len(sample.prompts),
    )  # fmt: skip
    params = SamplingParams(sample.max_tokens, temperature=sample.temperature, seed=config.train.seed)
    samples = []
    for prompt, result in zip(sample.prompts, engine.generate(list(sample.prompts), params), strict=True):
        samples.append(Sample(prompt, tokenizer.decode(result.tokens), result.samples[0].finish_reason))
        print(f"\n--- {prompt!r}\n{prompt}{samples[-1].text}")
    rows: list[SpeculationRow] = []
    if draft is not None:
        temperatures = dict.fromkeys((0.0, sample.temperature))
        rows = [
            compare(
                model, draft, tokenizer, sample.prompts, SamplingParams(sample.max_tokens, temperature=temperature),
                sample.draft_tokens,
            )
            for temperature in temperatures
        ]  # fmt: skip
        print(f"\nspeculative decoding, drafts of {sample.draft_tokens} tokens\n{as_table(rows)}")
    facts = RunFacts(
        command=command,
        commit=commit(),
        hardware=machine.describe(device),
        versions=f"moe-lm {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        dtype=str(trained[0].trainer.dtype).removeprefix("torch."),
        gemm_gflops=machine.gemm_rate(device, trained[0].trainer.dtype) / 1e9,
        models=tuple(map(model_facts, ("model", "draft"), trained)),
        samples=tuple(samples),
        speculation=tuple(rows),
        warnings=warnings(trained),
    )
    markdown, page = write_report(run_dir, config, facts)
    say(f"\nreport: {markdown} and {page}\ntalk to it: python -m moe_lm.generate {run_dir} --prompt 'def main('")


def model_facts(name: str, trained: TrainedModel) -> ModelFacts:
    counts, trainer = parameters(trained.config.model), trained.trainer
    return ModelFacts(
        name=name,
        total_parameters=counts.total,
        active_parameters=counts.active,
        steps=trainer.step,
        tokens=trainer.tokens,
        seconds=trained.seconds,
        bits_per_byte=trainer.evaluation.bits_per_byte,
        by_source=trainer.evaluation.by_source,
    )


def warnings(trained: list[TrainedModel]) -> tuple[str, ...]:
    dead = trained[0].trainer.evaluation.dead_experts
    return (f"{dead} experts got none of the held-out tokens.",) if dead else ()


def commit() -> str | None:
    """The commit of the source tree that runs, with `+` if it has changes; None outside a repository."""
    folder = Path(__file__).parent
    try:
        run = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return run[0].strip() + ("+" if run[1].strip() else "")
