"""What cleaning the data buys: models of one shape trained on as many tokens with and without each step.

    python -m moe_lm.bench data-ablation                     # about a minute for each of 17 models on two cores
    python -m moe_lm.bench data-ablation --config configs/nano.toml --steps 300 --seeds 3

Every model is evaluated on the same held-out files of the standard library, which no corpus contains, with the same
tokenizer. Two corpora: the library's other files as they are, and the same dirtied: copies, near-copies, boilerplate,
minified code, logs and base64, half of the bytes or more.
"""

import base64
import dataclasses
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from moe_lm.cli import Parser, run_main
from moe_lm.config import QUALITY_STEPS, QualityConfig, RunConfig, SourceConfig, require
from moe_lm.data import PreparedData, is_held_out, open_source, prepare_data
from moe_lm.data.quality import classifier as classifiers
from moe_lm.scaling.text import table
from moe_lm.toml import load_config
from moe_lm.train import Trainer
from moe_lm.train.evaluate import evaluate

BOILERPLATE = (
    "This site uses cookies to improve your experience; by continuing you agree.",
    "Subscribe to our newsletter and never miss an update again!",
    "Home | Products | Documentation | Downloads | Contact | Log in",
    "Share this page on your favourite network with one click.",
    "Copyright (c) Example Corporation. All rights reserved worldwide.",
)
CLEAN = SourceConfig("python:prose", epochs=2.0), SourceConfig("python:code", epochs=4.0)
CORPORA = ("library", "dirtied")
OWN_FRACTION = 0.01
"""Share of a corpus that is held out of it by the way: a run must hold something out, and nothing reads it here."""
COPIED, COPIES, NEAR_COPIES = 0.1, 8, 4
"""Share of the files that is copied, another one that is nearly copied, and how often each."""


def near_copy(text: str, random: random.Random) -> str:
    """`text` with a few names changed: a fiftieth of its lines."""
    lines = text.split("\n")
    for place in random.sample(range(len(lines)), max(1, len(lines) // 50)):
        lines[place] = re.sub(r"[a-z]{4,}", lambda word: f"{word[0]}{random.randrange(10)}", lines[place], count=2)
    return "\n".join(lines)


def dirt(part: str, documents: list[tuple[str, str]], random: random.Random) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents with dirt between them, `part` being prose or code."""
    total = sum(len(text) for _, text in documents)
    names = [name for name, _ in documents]
    random.shuffle(names)
    many = int(COPIED * len(names))
    copied, nearly = set(names[:many]), set(names[many : 2 * many])
    for name, text in documents:
        if part == "prose":
            text = "\n".join([BOILERPLATE[2], text, *random.sample(BOILERPLATE, 3)])
        yield name, text
        if name in copied:
            yield from ((f"{name}.copy{i}", text) for i in range(COPIES))
        if name in nearly:
            yield from ((f"{name}.near{i}", near_copy(text, random)) for i in range(NEAR_COPIES))
        if part == "code" and random.random() < 0.1:
            yield f"{name}.min", re.sub(r"\s+", " ", text)
    for number in range(total // 5 // 20_000):
        yield f"junk/{number}", junk(part, random)


def junk(part: str, random: random.Random) -> str:
    """A file of 20,000 characters: base64, or in prose every other time a log."""
    if part == "prose" and random.random() < 0.5:
        line = "2026-01-01 00:00:{:02} INFO worker: request handled, status ok, retrying the connection to the server"
        return "\n".join(line.format(random.randrange(60)) for _ in range(200))
    return base64.encodebytes(random.randbytes(15_000)).decode()


def write_corpora(root: Path, fraction: float) -> dict[str, tuple[SourceConfig, ...]]:
    """The library's training files below `root`, as they are and dirtied; the sources of each corpus."""
    corpora = {}
    for corpus in CORPORA:
        sources = []
        for clean in CLEAN:
            part = clean.path.removeprefix("python:")
            kept = [(d.key, d.text) for d in open_source(clean) if not is_held_out(d.key, fraction)]
            if corpus == "dirtied":
                kept = list(dirt(part, kept, random.Random(part)))
            for name, text in kept:
                # The name of the file decides whether it is held out of the corpus: its copies' names differ.
                file = root / corpus / part / f"{name.replace('#', '-')}.txt"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, "utf-8")
            sources.append(SourceConfig(str(root / corpus / part), epochs=clean.epochs, kind=part))
        corpora[corpus] = tuple(sources)
    return corpora


def arms(seeds: int, together: Sequence[str] = ()) -> Iterator[tuple[str, str, int]]:
    """(corpus, step, seed): the pairs with every step and none for each seed, then each step alone for the first, and
    the steps that are taken `together`."""
    for seed in range(seeds):
        yield from ((corpus, step, seed) for corpus in CORPORA for step in ("none", "all"))
    yield from ((corpus, step, 0) for corpus in CORPORA[::-1] for step in (*QUALITY_STEPS, *together))


def quality(step: str, directory: str) -> QualityConfig | None:
    """The settings of one step, of several with + between them, of `all` or of `none`."""
    on = QUALITY_STEPS if step == "all" else () if step == "none" else step.split("+")
    return QualityConfig(**{name: directory if name == "classifier" else True for name in on}) if on else None


def train_arm(config: RunConfig, tokenizer: Tokenizer, held_out: PreparedData, work: Path) -> dict[str, Any]:
    """Train one model and evaluate it on the held-out files."""
    begun = time.monotonic()
    data = prepare_data(config.data, config.model.vocab_size, tokenizer=tokenizer)
    prepared = time.monotonic() - begun
    with tempfile.TemporaryDirectory(dir=work) as run_dir:
        trainer = Trainer(config, Path(run_dir), data)
        trainer.model.train()
        while not trainer.finished:
            trainer.train_step()
    found = evaluate(trainer.model, held_out, config, config.train.eval_tokens)
    return {
        "bits_per_byte": found.bits_per_byte,
        **{name.removeprefix("python:"): value for name, value in found.by_source.items()},
        "train_tokens": sum(source.train.num_tokens for source in data.sources if source.train),
        "seconds_preparing": prepared,
        "seconds": time.monotonic() - begun,
    }


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/nano-dense.toml"), metavar="FILE",
                        help="shape and training of the models (default %(default)s)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the pairs all and none (default %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP",
                        help="some of none, all and the steps; exact+near takes two together")  # fmt: skip
    parser.add_argument("--corpora", nargs="+", default=CORPORA, metavar="NAME", choices=CORPORA,
                        help=f"some of {' and '.join(CORPORA)}")  # fmt: skip
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep corpora and caches there (default: a temporary "
                        "directory)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    require(args.steps > 0, f"--steps = {args.steps} must be greater than 0.")
    require(args.seeds > 0, f"--seeds = {args.seeds} must be greater than 0.")
    for name in (name for names in args.only for name in names.split("+")):
        known = ("none", "all", *QUALITY_STEPS)
        require(name in known, f"--only {name} is no step: it is one of {', '.join(known)}.")
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).absolute()
        work.mkdir(parents=True, exist_ok=True)
        rows = run(load_config(args.config), args, work)
    print(json.dumps(rows, indent=2) if args.json else results_table(rows))


def run(config: RunConfig, args: Any, work: Path) -> list[dict[str, Any]]:
    """Train every arm, telling each result on stderr as it comes."""
    data = dataclasses.replace(config.data, sources=CLEAN, cache_dir=str(work / "cache"), tokenizer=None, quality=None)
    held_out = prepare_data(data, config.model.vocab_size)
    corpora = write_corpora(work / "corpora", data.validation_fraction)
    directory = work / "classifier"
    if not (directory / "classifier.json").exists():
        made = classifiers.train_classifier(*classifiers.labels_of_library(), "code", "standard library")
        classifiers.save_classifier(made, directory)
    rows = []
    for corpus, step, seed in arms(args.seeds, [step for step in args.only if "+" in step]):
        if corpus not in args.corpora or (args.only and step not in args.only):
            continue
        arm = dataclasses.replace(
            config,
            draft=None,
            data=dataclasses.replace(
                data,
                sources=corpora[corpus],
                validation_fraction=OWN_FRACTION,
                quality=quality(step, str(directory)),
            ),
            train=dataclasses.replace(config.train, steps=args.steps, seed=seed),
        )
        rows.append({"corpus": corpus, "step": step, "seed": seed}
                    | train_arm(arm, held_out.tokenizer, held_out, work))  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def results_table(rows: list[dict[str, Any]]) -> str:
    """Mean over the seeds, and the spread between them, beside the same corpus without any step."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["corpus"], row["step"]), []).append(row)
    first = {corpus: found[0] for (corpus, step), found in groups.items() if step == "none"}
    lines = []
    for (corpus, step), found in groups.items():
        values = [row["bits_per_byte"] for row in found]
        base = [row["bits_per_byte"] for row in groups.get((corpus, "none"), ())]
        # Against the same seeds: order of the data and initial weights are theirs.
        gain = f"{statistics.mean(values) - statistics.mean(base[: len(values)]):+.3f}" if base else ""
        spread = f"{max(values) - min(values):.3f}" if len(values) > 1 else ""
        kept = f"{100 * found[0]['train_tokens'] / first[corpus]['train_tokens']:.0f}%" if corpus in first else ""
        code, prose = (statistics.mean(row[name] for row in found) for name in ("code", "prose"))
        lines.append([f"{corpus}, {step}", kept, f"{statistics.mean(values):.3f}", gain, spread,
                      f"{prose:.3f}", f"{code:.3f}"])  # fmt: skip
    return table(lines, ("corpus, steps", "tokens kept", "bits per byte", "gain", "spread", "prose", "code"))


if __name__ == "__main__":
    run_main(main)
