"""The data of a run, looked at before it is trained on.

    python -m moe_lm.data report python:code python:prose    # what every step of the cleaning removes, and why
    python -m moe_lm.data report my.jsonl --html report.html --samples 5
    python -m moe_lm.data report --config configs/mine.toml  # its data.sources, with the steps of its data.quality
    python -m moe_lm.data classifier runs/quality --labels labels.jsonl   # train a classifier for data.quality

A source is what `path` of data.sources may be. Without --config every step is on but the classifier, which --classifier
switches on.
"""

import dataclasses
import json
import sys
from pathlib import Path

from moe_lm.cli import Parser, run_main
from moe_lm.config import ConfigError, QualityConfig, RunConfig, SourceConfig, require


def main(argv: list[str]) -> None:
    """Run the command that `argv` names."""
    parser = Parser(__doc__, prog="python -m moe_lm.data", usage="%(prog)s report|classifier ...")
    parser.add_argument("command", choices=COMMANDS, help="`COMMAND --help` tells its options")
    COMMANDS[parser.parse_args(argv[:1]).command](argv[1:])


def report(argv: list[str]) -> None:
    """Print what the cleaning removes."""
    parser = Parser("What each step of the cleaning removes and why.", prog="python -m moe_lm.data report")
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="a path, hub name or python:code (default: those "
                        "of the config)")  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE", help="the config of a run, for its data and tokenizer")
    parser.add_argument("--classifier", metavar="DIR", help="also ask this classifier, at data.quality.min_score")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="documents shown of each rule and source "
                        "(default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    require(args.samples >= 0, f"--samples = {args.samples} must be 0 or more.")
    config = chosen_config(args.config, args.sources, args.classifier)
    from moe_lm.data.report import report as account_of
    from moe_lm.data.report import report_text

    account = account_of(config, args.samples, progress)
    if args.html:
        from moe_lm.data.report_page import page

        write(args.html, page(account, {"min_score": config.data.quality.min_score}))
    print(json.dumps(account, indent=2) if args.json else report_text(account))


def chosen_config(path: Path | None, names: list[str], classifier: str | None) -> RunConfig:
    """The run whose data are reported on. Raises ConfigError where nothing says which, or no step is on."""
    from moe_lm.toml import load_config

    config = load_config(path) if path else RunConfig()
    require(bool(path or names), "name a SOURCE, such as python:code, or a config with --config FILE.")
    quality = config.data.quality
    if path is None:
        quality = QualityConfig(exact=True, lines=True, heuristics=True, near=True, outliers=True)
    if classifier:
        quality = dataclasses.replace(quality or QualityConfig(), classifier=classifier)
    require(
        quality is not None and bool(quality.steps),
        f"{path} switches no step on: set data.quality.heuristics = true or another one, or leave --config out.",
    )
    # A source that the config knows keeps its settings.
    known = {source.path: source for source in config.data.sources} if path else {}
    sources = tuple(known.get(name, SourceConfig(name)) for name in names) or config.data.sources
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources, quality=quality))


def classifier(argv: list[str]) -> None:
    """Train a classifier and print what it is worth on documents that it was not trained on."""
    parser = Parser("Train a classifier of quality.", prog="python -m moe_lm.data classifier")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where classifier.json and weights.safetensors go")
    parser.add_argument("--labels", type=Path, metavar="FILE", help='lines of {"text": ..., "label": "good" or "bad"}; '
                        "by default this interpreter's library against its tests and tables")  # fmt: skip
    parser.add_argument("--kind", choices=("prose", "code", "any"), help="documents that it may judge (default: any "
                        "with --labels, else code)")  # fmt: skip
    args = parser.parse_args(argv)
    from moe_lm.data.quality import classifier as made

    made.sklearn()
    if args.labels:
        texts, labels = made.read_labels(args.labels)
        origin, kind = args.labels.name, args.kind or "any"
    else:
        progress("reading the standard library")
        texts, labels = made.labels_of_library()
        origin, kind = "standard library (good), its tests, codecs and tables (bad)", args.kind or "code"
    progress(f"training on {len(texts):,} documents")
    trained = made.train_classifier(texts, labels, kind, origin)
    made.save_classifier(trained, args.directory)
    facts = trained.facts
    print(f"{args.directory}: for {facts.kind}; labels: {facts.labels}")
    print(f"trained on {facts.trained_on[1]:,} good and {facts.trained_on[0]:,} bad documents")
    print(f"held out: {facts.held_out[1]:,} good and {facts.held_out[0]:,} bad; {facts.accuracy:.1%} right at 0.5, "
          f"AUC {facts.auc:.3f}")  # fmt: skip


def progress(message: str) -> None:
    print(message, file=sys.stderr)


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"--html {path} cannot be written ({error.strerror}): name another file.") from error


COMMANDS = {"report": report, "classifier": classifier}

if __name__ == "__main__":
    run_main(main)
