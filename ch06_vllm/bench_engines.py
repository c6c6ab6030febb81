"""Many ragged requests at once: our engine, real vLLM and transformers' batched generate, in turns on one machine.

You learn   what continuous batching is worth when lengths differ, and how near some 1,200 lines come to vLLM
Laptop      python ch06_vllm/bench_engines.py                      (--preset small for the larger model)
GPU node    python ch06_vllm/bench_engines.py --preset 1b --requests 128
Cluster     the same on one of its GPUs
You see     useful tokens/s of each (those that were asked for: padding and what goes on after a request's end does not
            count), and ratios of the rounds, the median with quartiles

All are loaded at once and take turns in an order drawn anew each round; who waits stands still. `ours-again` is ours
once more: how far its ratio is from 1 is noise. The first round warms up and is not counted. All have the same bfloat16
weights and the same prompts, new ones each round, so that no prefix cache helps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
from pathlib import Path
from typing import Any

from ch06_vllm import offline, servers, turns
from ch06_vllm.started import folder_of
from common import script
from common.bootstrap import gpus_visible
from common.logs import Progress, get_logger

log = get_logger()
OURS, AGAIN = "ours", "ours-again"


def contestant(name: str, model: Path, options: dict[str, Any]) -> turns.Process:
    engine = OURS if name == AGAIN else name
    call = "ch06_vllm.offline:wait_for_turns"
    return turns.Process(name, call, engine, str(model), json.dumps(options), engine=engine)


def workload(args: argparse.Namespace, vocabulary: int, round_number: int) -> offline.Requests:
    """Prompts and answers of very different lengths."""
    draw = random.Random(f"{args.seed} {round_number}")
    lengths = [(draw.randint(*args.prompt), draw.randint(*args.output)) for _ in range(args.requests)]
    return [{"prompt": [draw.randrange(vocabulary) for _ in range(p)], "max_tokens": n} for p, n in lengths]


def options_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each is started with: the same limits, and for vLLM what starts fast on a CPU."""
    limits = {"max_model_len": args.prompt[1] + args.output[1], "max_num_batched_tokens": args.batched_tokens}
    limits |= {"max_num_seqs": min(args.requests, args.batched_tokens)}
    eager = {} if gpus_visible() or args.compile_vllm else {"enforce_eager": True}
    cpu = {} if gpus_visible() else {"kv_cache_memory_bytes": servers.GIB}
    return {OURS: limits, AGAIN: limits, "vllm": limits | eager | cpu, "transformers": {}}


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    run = script.start(__file__, args)
    model = args.model or folder_of(args.preset)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    seconds: dict[str, list[float]] = {name: [] for name in args.engines}
    agreed: list[float] = []
    with contextlib.ExitStack() as stack:
        contestants = []
        for name in args.engines:  # one after another: start-up is not what is measured
            contestants.append(stack.enter_context(contestant(name, model, options_of(args)[name])))
            log.info("started", engine=name, seconds=round(contestants[-1].ready(), 1))
        order = random.Random(args.seed)
        progress = Progress(args.rounds, "rounds")
        for number in range(args.rounds + 1):
            requests = workload(args, vocabulary, number)
            replies = {c.name: c.ask(requests) for c in order.sample(contestants, len(contestants))}
            for name, reply in replies.items():
                check(name, reply["tokens"], requests)
            if number == 0:
                continue
            for name, reply in replies.items():
                seconds[name].append(reply["seconds"])
            agreed.append(agreement(replies))
            useful = sum(r["max_tokens"] for r in requests)
            run.log(round=number, **{f"{name}_tokens_per_s": useful / seconds[name][-1] for name in seconds})
            progress.update(number)
    return summary(args, vocabulary, seconds, agreed)


def check(name: str, tokens: list[list[int]], requests: offline.Requests) -> None:
    for row, request in zip(tokens, requests, strict=True):
        if len(row) != request["max_tokens"]:
            raise script.CheckFailed(f"{name} gave {len(row)} tokens of {request['max_tokens']}", {"engine": name})


def agreement(replies: dict[str, dict[str, Any]]) -> float:
    """Share of the requests whose first tokens are those of the first engine: in bfloat16 rounding decides near ties,
    and one that fell differently changes all that follows."""
    first, *others = ([row[0] for row in reply["tokens"]] for reply in replies.values())
    equal = [a == b for other in others for a, b in zip(first, other, strict=True)]
    return sum(equal) / len(equal) if equal else 1.0


def summary(args: argparse.Namespace, vocabulary: int, seconds: dict[str, list[float]], agreed: list[float]) -> dict:
    useful = [sum(r["max_tokens"] for r in workload(args, vocabulary, n)) for n in range(1, args.rounds + 1)]
    result: dict = {"rounds": args.rounds, "requests": args.requests, "first_tokens_equal": statistics.mean(agreed)}
    print(f"{'engine':<14} {'useful tokens/s':>16}  {'ours / it':>10}")
    for name, spent in seconds.items():
        rate = statistics.median(u / s for u, s in zip(useful, spent, strict=True))
        ratios = sorted(s / own for s, own in zip(spent, seconds[OURS], strict=True))
        key = name.replace("-", "_")
        result[f"{key}_tokens_per_s"] = rate
        if name != OURS:
            result[f"ours_over_{key}"] = statistics.median(ratios)
            result[f"ours_over_{key}_range"] = [ratios[0], ratios[-1]]
        print(f"{name:<14} {rate:>16,.0f}  {statistics.median(ratios):>10.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", choices=("nano", "small", "1b", "8b"), default="nano")
    parser.add_argument("--model", type=Path, help="a model folder instead")
    parser.add_argument("--requests", type=script.at_least(1), default=32)
    parser.add_argument("--prompt", type=span, default=(16, 256), help="tokens of a prompt, LEAST-MOST")
    parser.add_argument("--output", type=span, default=(16, 128), help="tokens of an answer, LEAST-MOST")
    parser.add_argument("--batched-tokens", type=script.at_least(1), default=2048)
    parser.add_argument("--rounds", type=script.at_least(1), default=7)
    parser.add_argument("--compile-vllm", action="store_true", help="let vLLM compile on a CPU too: starts in minutes")
    parser.add_argument(
        "--engines", type=script.comma_list(str), default=[OURS, AGAIN, "vllm", "transformers"],
        help="of ours, ours-again, vllm, transformers",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.engines[0] != OURS or set(args.engines) - {OURS, AGAIN, *offline.CONTESTANTS}:
        raise script.UserError(f"--engines begins with ours, and knows {AGAIN}, {', '.join(offline.CONTESTANTS)}")
    if "vllm" in args.engines:
        servers.vllm_program()  # said before a model is made
    if args.model is not None and not (args.model / "config.json").is_file():
        raise script.UserError(f"--model {args.model} has no config.json; give a Hugging Face folder")
    return args


def span(text: str) -> tuple[int, int]:
    """argparse type: LEAST-MOST."""
    least, _, most = text.partition("-")
    try:
        found = int(least), int(most or least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 16-256") from None
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: the least must be at least 1, and not above the most")
    return found


if __name__ == "__main__":
    script.run(main)
