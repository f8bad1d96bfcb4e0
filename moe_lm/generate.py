"""Continue a prompt on the terminal, with or without a draft model.

    python -m moe_lm.generate runs/nano --prompt "def main("
    python -m moe_lm.generate runs/nano --draft runs/nano/draft --prompt "def main(" --temperature 0

MODEL and DRAFT are run directories (their newest checkpoint), checkpoints, or Hugging Face model directories.
"""

import sys
import time

from moe_lm.cli import Parser, run_main
from moe_lm.config import ConfigError

SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="the model's directory")
    parser.add_argument("--prompt", default="", help="text to continue; nothing starts a document")
    parser.add_argument("--draft", help="a draft model with the same tokenizer, for speculative decoding")
    parser.add_argument(
        "--speculation", help="how to guess ahead: none, ngram, draft or staged (draft with --draft, else none)"
    )
    parser.add_argument(
        "--draft-tokens", type=int, default=4, help="most tokens guessed at a time (default %(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=128, help="most new tokens (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default %(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the likeliest tokens up to this probability")
    parser.add_argument("--min-p", type=float, default=0.0, help="keep tokens of this share of the likeliest one's")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 avoids tokens seen before")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default %(default)s)")
    parser.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    parser.add_argument("--kv-memory", default="1GiB", help="most memory of the cache (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the computation; the model's own")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default %(default)s)")
    return parser


def main(argv: list[str]) -> None:
    args = make_parser().parse_args(argv)
    import torch

    from kernels.cpu.process import tune_process
    from moe_lm.data.tokenizer import end_of_text_id
    from moe_lm.engine import SamplingParams, open_engine
    from moe_lm.model.device import choose_device

    params = SamplingParams(**{name: getattr(args, name) for name in SAMPLING}, stop=tuple(filter(None, args.stop)))
    device, dtype = choose_device(args.device), getattr(torch, args.dtype) if args.dtype else None
    if device.type == "cpu":
        tune_process()
    engine = open_engine(
        args.model, args.draft, dtype=dtype, device=device, kv_memory=args.kv_memory, max_sequences=1,
        speculation=args.speculation, draft_tokens=args.draft_tokens,
    )  # fmt: skip
    if engine.warm_up_seconds > 1:
        print(f"prepared in {engine.warm_up_seconds:.0f} s. {engine.describe()}", file=sys.stderr)
    prompt = engine.tokenizer.encode(args.prompt).ids or [end_of_text_id(engine.tokenizer)]
    stream = engine.stream(prompt, params)
    print(args.prompt, end="", flush=True)
    start, first = time.perf_counter(), None
    try:
        for output in stream:
            first = first or (time.perf_counter() if output.tokens else None)
            print(output.text, end="", flush=True)
            if output.error:
                raise ConfigError(output.error)
    except KeyboardInterrupt:
        stream.close()
    print()
    print(summary(engine, first and first - start, time.perf_counter() - start), file=sys.stderr)


def summary(engine, first: float | None, total: float) -> str:
    """What a continuation took, given the seconds to its first token (None if there was none) and to its end."""
    stats = engine.stats
    if first is None:
        return "no token"
    rate = (stats.tokens - 1) / (total - first) if stats.tokens > 1 else 0.0
    line = f"{stats.tokens} tokens, {rate:.0f} tokens/s, first after {first:.2f} s"
    if stats.proposed:
        line += f", {stats.acceptance:.0%} of guesses accepted, {stats.tokens_per_step:.2f} tokens per step"
    elif engine.speculation != "none":
        line += ", nothing guessed ahead"
    return line


if __name__ == "__main__":
    run_main(main)
