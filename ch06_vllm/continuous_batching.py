"""Continuous batching against static batching, on requests that arrive over time and want answers of all lengths.

You learn   what a batch that is fixed until its longest answer ends does to throughput and latency; priorities; why a
            long prompt is computed in chunks
Laptop      python -m ch06_vllm.continuous_batching
            python -m ch06_vllm.continuous_batching --workload ch06_vllm/workloads/interactive.jsonl --max-num-seqs 4
            python -m ch06_vllm.continuous_batching --stall             (--engine vllm: the same on real vLLM)
GPU node    python -m ch06_vllm.continuous_batching --preset 1b --requests 256 --max-num-seqs 64
Cluster     nothing more: each replica batches by itself
You see     useful tokens/s, latency and time to first token of both, on the same arrivals, in turn; batching.png: who
            had which slot of the batch when. With --stall the time between tokens of running requests while a long
            prompt is computed, whole and in chunks, and stall.png

Both have the same number of slots and the same weights. Static batching is transformers' generate on left-padded
batches of what has arrived. Its answers count from when it returns; `streamed` counts each from its own last token, as
if it could be sent at once: what the wait for the next batch costs remains.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ch06_vllm import load, stall
from ch06_vllm.batching import Arrival, Served, Static, continuous, read
from ch06_vllm.batching_drawn import draw_slots
from ch06_vllm.engine import Config
from ch06_vllm.engine.engine import Engine
from ch06_vllm.started import folder_of
from common import lm, logs, script

log = logs.get_logger()
URGENT = 0.25  # of the drawn requests


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano", help="a model folder is made of it, once")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    parser.add_argument("--max-num-seqs", type=script.at_least(1), default=16, help="slots of a batch, of both")
    parser.add_argument("--max-model-len", type=script.at_least(64), default=2048)
    parser.add_argument("--workload", type=Path, help="JSONL with arrival_s, prompt, max_tokens and perhaps priority")
    group = parser.add_argument_group("without --workload: Poisson arrivals, a quarter of them urgent (priority 0)")
    group.add_argument("--requests", type=script.at_least(2), default=64)
    group.add_argument("--rate", type=script.positive, help="requests/s (default: 0.9 of what our engine can serve)")
    group.add_argument("--prompt-tokens", type=load.lengths, default="lognormal:48,0.7")
    group.add_argument("--output-tokens", type=load.lengths, default="lognormal:32,1.0")
    parser.add_argument("--rounds", type=script.at_least(1), default=3, help="of all ways in turn; medians are shown")
    stall.add_flags(parser)
    return parser.parse_args(argv)


def drawn(args: argparse.Namespace, ids: np.ndarray) -> list[Arrival]:
    """Lengths that fit into the context; all arrive at 0."""
    rng = np.random.default_rng(args.seed)
    prompts = np.minimum(args.prompt_tokens(rng, args.requests), args.max_model_len // 2)
    outputs = np.minimum(args.output_tokens(rng, args.requests), args.max_model_len // 2)
    urgent = rng.random(args.requests) < URGENT
    requests = load.workload(ids, prompts, outputs, rng)
    return [Arrival(0.0, r.prompt, r.max_tokens, 0 if u else 1) for r, u in zip(requests, urgent, strict=True)]


def at_rate(arrivals: Sequence[Arrival], rate: float, seed: int) -> list[Arrival]:
    times = load.arrivals(rate, len(arrivals), np.random.default_rng(seed))
    return [Arrival(float(t), a.prompt, a.max_tokens, a.priority) for t, a in zip(times, arrivals, strict=True)]


def figures(served: Sequence[Served], *, streamed: bool = False) -> dict[str, float]:
    """Useful tokens/s from the first arrival to the last answer; latency and TTFT from each arrival, milliseconds."""
    ends = [one.done_s if streamed else one.released_s for one in served]
    firsts = [one.first_s if streamed else one.released_s for one in served]
    seconds = max(ends) - min(one.arrived_s for one in served)
    latency = [end - one.arrived_s for end, one in zip(ends, served, strict=True)]
    ttft = [first - one.arrived_s for first, one in zip(firsts, served, strict=True)]
    found = {"tokens_per_s": sum(one.tokens for one in served) / seconds}
    found |= {f"latency_ms_{key}": value for key, value in spread(latency).items()}
    found |= {f"ttft_ms_{key}": value for key, value in spread(ttft).items()}
    for name, chosen in (("urgent", True), ("other", False)):
        own = [t for t, one in zip(ttft, served, strict=True) if (one.priority <= 0) == chosen]
        found[f"ttft_ms_p95_{name}"] = spread(own)["p95"] if own else float("nan")
    return found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    ms = np.asarray(seconds) * 1e3
    return {"mean": float(ms.mean()), **{f"p{p}": float(np.percentile(ms, p)) for p in (50, 95)}}


def busy(served: Sequence[Served], slots: int) -> float:
    """Share of the slots' time, over the run, in which a slot brings somebody tokens."""
    useful = sum(one.done_s - one.admitted_s for one in served)
    return useful / slots / (max(one.released_s for one in served) - min(one.admitted_s for one in served))


def median(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}


COLUMNS = ("tokens_per_s", "latency_ms_mean", "latency_ms_p50", "latency_ms_p95", "ttft_ms_p50", "ttft_ms_p95_urgent",
           "ttft_ms_p95_other")  # fmt: skip


def table(ways: dict[str, dict[str, float]]) -> str:
    heads = [
        column.replace("latency", "lat").replace("_ms", "").replace("_per_", "/").replace("_", " ")
        for column in COLUMNS
    ]
    lines = [f"{'ms':<26}" + "".join(f"{head:>17}" for head in heads)]
    lines += [f"{name:<26}" + "".join(f"{found[key]:>17,.0f}" for key in COLUMNS) for name, found in ways.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    model = args.model or folder_of(args.preset)
    ids = load.usable_ids(model)
    arrivals = drawn(args, ids)
    if args.workload:
        arrivals = read(args.workload, lm.load_tokenizer(str(model)).encode, args.max_model_len)
    run = script.start(__file__, args)
    if args.stall:
        return stall.measure(args, model, ids, run)
    config = Config(str(model), device=args.device, max_num_seqs=args.max_num_seqs, max_model_len=args.max_model_len)
    engine = Engine(config)
    device, dtype = engine.runner.model.device, engine.runner.model.dtype
    static = Static(lm.load(str(model), device, dtype), args.max_num_seqs)
    log.info("warming up")
    static(at_rate(arrivals[: args.max_num_seqs], float("inf"), 0)[:4])
    engine.pool.forget_all()
    rate = args.rate
    if not args.workload:
        calibrated = continuous(engine, arrivals)
        rate = rate or 0.9 * len(arrivals) / max(one.done_s for one in calibrated)
        arrivals = at_rate(arrivals, rate, args.seed)
    ways: dict[str, list[list[Served]]] = {"continuous": [], "static": [], "without priorities": []}
    for number in range(args.rounds):
        log.info("round", number=number + 1, of=args.rounds)
        for name, served in ways.items():
            engine.pool.forget_all()  # a prompt seen in the last round would be found in the prefix cache
            served.append(
                static(arrivals) if name == "static" else continuous(engine, arrivals, priorities=name == "continuous")
            )
    found = {
        name: median([figures(served, streamed=name != "static") for served in rounds]) for name, rounds in ways.items()
    }
    found["static, streamed"] = median([figures(served, streamed=True) for served in ways["static"]])
    print(table(found))
    draw_slots({name: ways[name][-1] for name in ("continuous", "static")}, args.max_num_seqs, run.path("batching.png"))
    ours, theirs, streamed = found["continuous"], found["static"], found["static, streamed"]
    return {
        "requests": len(arrivals), "rate": rate, "max_num_seqs": args.max_num_seqs, "rounds": args.rounds,
        "useful_tokens": sum(arrival.max_tokens for arrival in arrivals),
        **{f"continuous_{key}": value for key, value in ours.items()},
        **{f"static_{key}": value for key, value in theirs.items()},
        "static_streamed_latency_ms_mean": streamed["latency_ms_mean"],
        "throughput_times": ours["tokens_per_s"] / theirs["tokens_per_s"],
        "latency_times": theirs["latency_ms_mean"] / ours["latency_ms_mean"],
        "latency_times_streamed": streamed["latency_ms_mean"] / ours["latency_ms_mean"],
        "slots_busy_continuous": statistics.median(busy(served, args.max_num_seqs) for served in ways["continuous"]),
        "slots_busy_static": statistics.median(busy(served, args.max_num_seqs) for served in ways["static"]),
        "ttft_ms_p95_urgent_without_priorities": found["without priorities"]["ttft_ms_p95_urgent"],
    }  # fmt: skip


if __name__ == "__main__":
    script.run(main)
