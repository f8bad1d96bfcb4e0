"""Serve a model over HTTP, with OpenAI's API and a page to look at it.

    python serve.py                                    the newest run under runs/, with its draft if it has one
    python serve.py runs/nano --draft none --port 8001
    python serve.py Mixtral-8x7B-v0.1 --host 0.0.0.0 --api-key-file keys.txt

MODEL and DRAFT are run directories (their newest checkpoint), checkpoints, or Hugging Face model directories.
"""

import sys
from pathlib import Path

from moe_lm.cli import Parser, run_main
from moe_lm.config import require

LIMITS = ("max_waiting", "max_waiting_tokens", "max_body", "request_timeout", "stream_events", "drain_seconds")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", type=Path, help="the model's directory (default: the newest run)")
    add("--draft", help="a draft model with the same tokenizer, or none (default: the run's own, if there is one)")
    add("--speculation", help="how to guess ahead: none, ngram, draft or staged (draft with a draft model, else none)")
    add("--draft-tokens", type=int, default=4, help="most tokens guessed at a time (default %(default)s)")
    add("--name", help="what the API calls the model (default: the name of its directory)")
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--port", type=int, default=8000, help="0 for any that is free (default %(default)s)")
    add("--api-key-file", type=Path, help="a file with the keys that requests may carry, one on a line")
    add("--no-auth", action="store_true", help="let all in who reach --host, where that is not this machine alone")
    add("--cors-origin", action="append", default=[], help="a site whose pages may use this server; several times")
    add("--max-sequences", type=int, default=64, help="samples computed at once (default %(default)s)")
    add("--max-step-tokens", type=int, default=512, help="most tokens of a step (default %(default)s)")
    add("--kv-memory", default="1GiB", help="most memory of the cache (default %(default)s)")
    add("--max-waiting", type=int, default=256, help="requests that may wait (default %(default)s)")
    add("--max-waiting-tokens", type=int, default=262144, help="tokens of those that wait (default %(default)s)")
    add("--max-body", type=int, default=4194304, help="bytes of a request (default %(default)s)")
    add("--request-timeout", type=float, default=600, help="seconds of a request (default %(default)s)")
    add("--stream-events", type=int, default=500, help="events per second of all streams (default %(default)s)")
    add("--drain-seconds", type=float, default=30, help="for requests in flight at the end (default %(default)s)")
    add("--deterministic", action="store_true", help="same bits in every batch also where that costs speed")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of the computation; the model's own")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    from moe_lm.server import Limits, access, make_app, open_socket, serve

    limits = Limits(**{name: getattr(args, name) for name in LIMITS})
    who = access(args.host, args.api_key_file, args.no_auth)
    listening = open_socket(args.host, args.port)

    import torch

    from kernels.cpu.process import tune_process
    from moe_lm.checkpoint import newest_run, resolve_model_dir
    from moe_lm.engine import open_engine
    from moe_lm.model.device import choose_device
    from moe_lm.server import Service

    model, device = args.model or newest_run(Path("runs")), choose_device(args.device)
    own = model / "draft" if (model / "draft" / "checkpoints").is_dir() else None
    draft = own if args.draft is None else None if args.draft == "none" else args.draft
    require(args.draft != "", "--draft is empty: name a model, or none.")
    engine = open_engine(
        model, draft, dtype=getattr(torch, args.dtype) if args.dtype else None, device=device,
        kv_memory=args.kv_memory, max_sequences=args.max_sequences, max_step_tokens=args.max_step_tokens,
        speculation=args.speculation, draft_tokens=args.draft_tokens, deterministic=args.deterministic,
    )  # fmt: skip
    prepare = tune_process if device.type == "cpu" else None
    service = Service(engine, args.name or model.resolve().name, resolve_model_dir(model), limits, prepare)
    print(f"{model}, {f'draft {draft}' if draft else 'no draft'}. {engine.describe()}", file=sys.stderr)
    return serve(make_app(service, keys=who.keys, hosts=who.hosts, origins=args.cors_origin), service, listening)


if __name__ == "__main__":
    run_main(main)
