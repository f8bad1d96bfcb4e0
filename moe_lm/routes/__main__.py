"""See which experts of a mixture take which tokens of a text.

    python -m moe_lm.routes runs/nano --text train.py
    python -m moe_lm.routes runs/nano --text a.py b.txt --html routes.html
    git show | python -m moe_lm.routes Mixtral-8x7B-v0.1 --text - --layer 0 15 31

MODEL is a run directory (its newest checkpoint), a checkpoint, or a Hugging Face model directory.
"""

import json
import sys
from pathlib import Path

from moe_lm.cli import Parser, run_main
from moe_lm.config import ConfigError, require

LONGEST_ROW = 1024
"""Tokens of a row at most, whatever the model could take: attention in a row is not paged."""


def make_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m moe_lm.routes")
    parser.add_argument("model", metavar="MODEL", help="the model's directory")
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", default=["python:code"],
        help="files, - for standard input, or python:code or python:prose for held-out documents of the interpreter's "
        "own library (default python:code)",
    )  # fmt: skip
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page to look at, in one file")
    parser.add_argument("--json", action="store_true", help="print everything as JSON in place of tables")
    parser.add_argument(
        "--max-tokens", type=int, default=8192, metavar="N", help="read no more than that (default %(default)s)"
    )
    parser.add_argument(
        "--layer", type=int, nargs="+", metavar="L",
        help="layers to tell everything of, counted from 0 among those that route; by default the one whose choices "
        "the class of a token tells most about, and all in JSON",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, metavar="N",
        help="tokens of a row, which sees nothing of the row before it (default 256, or all that the model takes)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the computation; the model's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    require(args.max_tokens > 0, f"--max-tokens {args.max_tokens} must be greater than 0.")
    import torch

    from moe_lm import load, load_tokenizer
    from moe_lm.checkpoint import resolve_model_dir
    from moe_lm.checkpoint.hf import read_config
    from moe_lm.model.device import choose_device
    from moe_lm.routes.observe import observe
    from moe_lm.routes.page import shown_tokens, write_page
    from moe_lm.routes.tables import as_json, text, told_best
    from moe_lm.routes.texts import rows

    directory = resolve_model_dir(args.model)
    config = read_config(directory)
    require(config.is_moe, f"{args.model} is a dense model, which routes nothing: name a mixture of experts.")
    layers = len(config.routing_layers)
    asked = list(dict.fromkeys(args.layer or ()))
    for layer in asked:
        require(0 <= layer < layers, f"--layer {layer} must be between 0 and {layers - 1}: {layers} layers route.")
    most = min(config.max_position_embeddings, LONGEST_ROW)
    length = min(256, most) if args.context is None else args.context
    require(2 <= length <= most, f"--context {length} must be between 2 and {most}, the rows that are read at once.")
    tokenizer = load_tokenizer(directory)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    device = choose_device(args.device)
    model = load(directory, device=device, dtype=getattr(torch, args.dtype) if args.dtype else None)
    routes = observe(
        model, rows(args.text, tokenizer, length, args.max_tokens), length,
        shown_tokens(layers, config.num_experts_per_tok),
    )  # fmt: skip
    for token, shown in routes.texts.items():
        routes.texts[token] = shown or tokenizer.id_to_token(token) or ""
    names = list(dict.fromkeys("standard input" if name == "-" else name for name in args.text))
    title = (
        f"{args.model}: {layers} layers of {routes.experts} experts, {routes.top_k} per token; "
        f"{routes.tokens:,} tokens of {', '.join(names)} in rows of {length}"
    )
    if args.html is not None:
        try:
            write_page(args.html, args.model, title, routes, asked or range(layers))
        except OSError as error:
            raise ConfigError(f"--html {args.html} cannot be written: {error.strerror}.") from None
    if args.json:
        print(json.dumps(as_json(args.model, names, length, routes, asked or range(layers)), allow_nan=False))
    else:
        print(text(title, routes, asked or [told_best(routes)]))
    if args.html is not None:
        print(f"\npage: {args.html}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
