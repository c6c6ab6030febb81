"""Two judges, one server: `vllm bench serve` and bench_serve.py in turn on the same load, and on the same records.

You learn   when two benchmarks may be compared at all: same definitions, same arrivals, same lengths, same warm-up, and
            the difference between rounds known before the difference between tools is believed
Laptop      python -m ch06_vllm.agree --rate 6 --requests 60 --rounds 6
GPU node    python -m ch06_vllm.agree --model DIR --rate 20 --requests 400 --prompt-tokens 512 --output-tokens 128
Cluster     python -m ch06_vllm.agree --model DIR --url http://node1:8000 --rate 20 --requests 400
You see     ours / theirs for TTFT, TPOT, ITL, E2E and throughput: the median of the rounds and their range, beside the
            range of theirs alone; and what vLLM's own calculate_metrics makes of our records: the same, to rounding

Both send the same texts at the same moments (vLLM's generators, from its seed), for the same number of answered tokens.
What remains different: vLLM notes a chunk's time after parsing it, ours when its bytes are there; vLLM warms up with
copies of its first prompt, ours with its first prompts. The server that is started here has no prefix cache, which
would find them. On a CPU the engine has half of the cores and all others the rest: no client takes the engine's time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ch06_vllm import bench_serve, load, turns
from ch06_vllm.servers import Server, cores_of_ranks, own_cores, vllm_program
from ch06_vllm.started import folder_of
from common import script
from common.bootstrap import gpus_visible
from common.script import CheckFailed

# ours: theirs, as `vllm bench serve` names them
INSTANT_MS = 1e-3
METRICS = {
    "ttft_ms_p50": "median_ttft_ms",
    "tpot_ms_p50": "median_tpot_ms",
    "itl_ms_p50": "median_itl_ms",
    "e2e_ms_p50": "median_e2el_ms",
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
}
# Also compared on our own records, where nothing but the definition can make a difference.
TAILS = {f"{name}_ms_p{p}": f"p{p}_{theirs}_ms" for name, theirs in
         {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e": "e2el"}.items() for p in (90, 99)}  # fmt: skip


def their_arrivals(rate: float, n: int, seed: int) -> np.ndarray:
    """The arrivals of `vllm bench serve --seed`: numpy's global generator, exponential gaps, scaled to n / rate."""
    times = np.cumsum(np.random.RandomState(seed).gamma(1.0, 1.0 / rate, n))
    return times * (n / rate / times[-1])


async def our_round(
    url: str, args: argparse.Namespace, prompts: list[str], seed: int
) -> tuple[list[load.Record], dict]:
    requests = [load.Request(prompt, args.output_tokens) for prompt in prompts]
    sent = bench_serve.Load(
        requests, requests[: args.warmup], their_arrivals(args.rate, args.requests, seed), args.requests
    )
    return await bench_serve.measure(url, sent, model=args.served_model, label=f"ours, seed {seed}")


def their_words(url: str, args: argparse.Namespace, seed: int) -> list[str]:
    """The command line of `vllm bench serve` for the same round."""
    return [
        "--backend", "openai", "--base-url", url, "--model", str(args.model), "--served-model-name", args.served_model,
        "--dataset-name", "random", "--random-input-len", str(args.prompt_tokens),
        "--random-output-len", str(args.output_tokens), "--num-prompts", str(args.requests),
        "--request-rate", str(args.rate), "--num-warmups", str(args.warmup), "--seed", str(seed), "--ignore-eos",
        "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm", "--save-detailed",
    ]  # fmt: skip


def ratio(ours: float, theirs: float) -> float | None:
    """Of two times in ms, or two rates; None where one is no time at all, as between tokens that one read brought."""
    return ours / theirs if min(ours, theirs) > INSTANT_MS else None


async def compare(url: str, args: argparse.Namespace, judge: turns.Process) -> dict[str, Any]:
    limit_s = 120 + 4 * args.requests / args.rate
    rounds: list[tuple[dict, dict]] = []
    differ, apart_s = 0.0, []
    for number in range(args.rounds):
        seed = args.seed + number
        words = their_words(url, args, seed)
        prompts = await asyncio.to_thread(judge.ask, {"prompts": words}, 60)
        pair: dict[str, dict] = {}
        for who in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            if who == "ours":
                records, pair["ours"] = await our_round(url, args, prompts, seed)
                differ = max(differ, await definitions(judge, records, pair["ours"]))
            else:
                pair["theirs"] = await asyncio.to_thread(judge.ask, {"bench": words}, limit_s)
        rounds.append((pair["ours"], pair["theirs"]))
        sent = np.array([sorted(record.called_s for record in records), sorted(pair["theirs"]["start_times"])])
        apart_s += abs(np.diff(sent - sent[:, :1], axis=0)).ravel().tolist()
        found = {ours: ratio(pair["ours"][ours], pair["theirs"][their]) for ours, their in METRICS.items()}
        show = [f"{name} {'no time' if value is None else f'{value:.3f}'}" for name, value in found.items()]
        print(f"round {number + 1}, ours / theirs: {'  '.join(show)}", flush=True)
    return summarise(rounds) | {"definitions_differ": differ, "arrivals_apart_ms_p50": float(np.median(apart_s)) * 1e3}


async def definitions(judge: turns.Process, records: Sequence[load.Record], figures: dict[str, Any]) -> float:
    """The largest relative difference between our figures and those that vLLM's code makes of our records."""
    done = [record.as_json() for record in records if not record.error]
    question = {"rows": done, "duration_s": figures["duration_s"], "percentiles": [90, 99]}
    found = await asyncio.to_thread(judge.ask, {"judge": question}, 60)
    pairs = [(figures[ours], found[their]) for ours, their in (METRICS | TAILS).items()]
    return max(abs(ours - theirs) / max(theirs, INSTANT_MS) for ours, theirs in pairs)


def summarise(rounds: Sequence[tuple[dict, dict]]) -> dict[str, Any]:
    """For each metric the median of ours / theirs over the rounds, its range, and the range of theirs by itself."""
    result: dict[str, Any] = {"rounds": len(rounds), "failed": sum(a["failed"] + b["failed"] for a, b in rounds)}
    for ours, their in METRICS.items():
        ratios = [found for a, b in rounds if (found := ratio(a[ours], b[their])) is not None]
        alone = np.array([b[their] for _, b in rounds])
        name = ours.removesuffix("_p50").removesuffix("_ms")
        result[f"{name}_ratio"] = float(np.median(ratios)) if ratios else None
        result[f"{name}_ratio_range"] = [min(ratios), max(ratios)] if ratios else None
        result[f"{name}_ours"] = float(np.median([a[ours] for a, _ in rounds]))
        result[f"{name}_theirs"] = float(np.median(alone))
        result[f"{name}_theirs_range"] = (alone / max(np.median(alone), INSTANT_MS))[
            [alone.argmin(), alone.argmax()]
        ].tolist()
    result["largest_difference"] = max(
        abs(value - 1) for key, value in result.items() if key.endswith("_ratio") and value is not None
    )
    return result


def engine_apart() -> dict[str, str]:
    """Without a GPU: this process and all that it starts on half of the cores, and vLLM's variable for the others."""
    cores = own_cores()
    if gpus_visible() or len(cores) < 2:
        return {}
    os.sched_setaffinity(0, cores[len(cores) // 2 :])
    return {"VLLM_CPU_OMP_THREADS_BIND": cores_of_ranks(cores[: len(cores) // 2], 1)}


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--url", help="a running vLLM (default: one is started, without prefix cache)")
    parser.add_argument("--model", type=Path, help="the model's folder (default: nano with random weights)")
    parser.add_argument("--served-model", default="model", help="the name that the server knows it by")
    parser.add_argument("--rate", type=script.positive, default=6.0, help="requests/s, Poisson")
    parser.add_argument("--requests", type=script.at_least(2), default=60)
    parser.add_argument("--warmup", type=script.at_least(1), default=8)
    parser.add_argument("--prompt-tokens", type=script.at_least(1), default=128)
    parser.add_argument("--output-tokens", type=script.at_least(2), default=48)
    parser.add_argument("--rounds", type=script.at_least(1), default=6, help="of both, who is first alternates")
    parser.add_argument(
        "--tolerance", type=script.positive, default=0.05, help="allowed |ours / theirs - 1| of medians"
    )
    args = parser.parse_args(argv)
    vllm_program()  # said before a model is made
    args.model = args.model or folder_of("nano")
    script.start(__file__, args)
    with contextlib.ExitStack() as stack:
        url = args.url
        if not url:
            options = {"served-model-name": args.served_model, "enable-prefix-caching": False}
            url = stack.enter_context(Server(args.model, "vllm", options, env=engine_apart())).url
        judge = stack.enter_context(turns.Process("vllm bench serve", "ch06_vllm.vllm_bench:main"))
        judge.ready()
        result = asyncio.run(compare(url, args, judge))
    if result["largest_difference"] > args.tolerance:
        apart = f"ours and theirs differ by {result['largest_difference']:.1%}, more than {args.tolerance:.0%}"
        raise CheckFailed(f"{apart}; if theirs_range is as wide, the machine is busy: take more --rounds", result)
    return result


if __name__ == "__main__":
    script.run(main)
