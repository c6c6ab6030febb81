"""Latency or throughput: which settings of an engine keep an objective (SLO) under a given load, and what they cost.

You learn   what max_num_seqs, max_num_batched_tokens, chunked prefill, prefix caching and the block size trade; why the
            setting with the most tokens/s is seldom the one that keeps the objective; that a winner must win again
Laptop      python -m ch06_vllm.tune --slo ttft:400 --slo tpot:30                        (our engine: some minutes)
            python -m ch06_vllm.tune --engine vllm --slo ttft:600 --slo tpot:50          (real vLLM: ten)
GPU node    python -m ch06_vllm.tune --engine vllm --model DIR --rate 20 --requests 400 --prompt-tokens 256-1024 \\
                --max-model-len 4096 --max-num-batched-tokens 512,2048,8192 --slo ttft:500 --slo tpot:30
Cluster     the same on one replica: replicas share nothing but the load
You see     a row for each setting tried: tokens/s and TPOT with all requests at once, then TTFT, TPOT and the share of
            requests within the objective at --rate; tuning.png with the Pareto front; the recommended setting beside
            the first one, on arrivals and prompts that it was not chosen on; recommended.yaml for serve_vllm

One axis after another, from the same settings on both engines: a value is kept if more requests are within the
objective, or as many and the tail is better. Each point is a fresh server. The objective holds if --attainment of the
requests meet every bound; TTFT counts from the scheduled arrival.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ch06_vllm import bench_serve, load
from ch06_vllm.servers import Server
from ch06_vllm.started import engine_name, folder_of
from common import lm, logs, script

log = logs.get_logger()
Options = dict[str, Any]
START: Options = {
    "max-num-seqs": 64, "max-num-batched-tokens": 2048, "enable-chunked-prefill": True, "enable-prefix-caching": True,
    "block-size": 32,
}  # fmt: skip
FASTER = 0.95  # of the tail, where as many requests are within the objective: what is nearer is noise


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--engine", type=engine_name, default="ours", help="ours or vllm")
    parser.add_argument("--preset", choices=lm.PRESETS, default="nano", help="a model folder is made of it, once")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder instead")
    parser.add_argument("--max-model-len", type=script.at_least(64), default=2048)
    numbers, switch = script.comma_list(script.at_least(1)), script.comma_list(on_off)
    axes = parser.add_argument_group("axes: values to try, in this order; an empty string leaves an axis out")
    axes.add_argument("--max-num-seqs", type=optional(numbers), default="4,16,64")
    axes.add_argument("--max-num-batched-tokens", type=optional(numbers), default="128,512,2048")
    axes.add_argument("--enable-chunked-prefill", type=optional(switch), default="on,off")
    axes.add_argument("--enable-prefix-caching", type=optional(switch), default="on,off")
    axes.add_argument("--block-size", type=optional(numbers), default="16,32,128")
    parser.add_argument("--attainment", type=script.positive, default=0.95, help="share of requests within the SLO")
    bench_serve.add_load_flags(parser)
    parser.set_defaults(rate=12.0, requests=72, prompt_tokens=load.lengths("16-256"), shared_prefix=192,
                        output_tokens=load.lengths("8-64"))  # fmt: skip
    args = parser.parse_args(argv)
    args.slo = dict(args.slo) or {"ttft": 500.0, "tpot": 50.0}
    if args.attainment > 1:
        raise script.UserError(f"--attainment {args.attainment} is a share; take at most 1")
    if not np.isfinite(args.rate) or args.concurrency or args.trace:
        raise script.UserError("tuning needs arrivals at a --rate; give one, and neither --concurrency nor --trace")
    return args


def on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")
    return text == "on"


def optional(convert: Any) -> Any:
    return lambda text: convert(text) if text else []


@dataclass
class Point:
    """A setting and what it brought: load.summary of the load all at once and at the rate, or `error`, why not."""

    options: Options
    at_once: dict[str, float] = field(default_factory=dict)
    at_rate: dict[str, float] = field(default_factory=dict)
    start_s: float = 0.0
    error: str = ""

    def tail(self, slo: dict[str, float]) -> float:
        """The largest p95 as a share of its bound."""
        names = {"ttft": "ttft_scheduled_ms_p95", "tpot": "tpot_ms_p95", "e2e": "e2e_scheduled_ms_p95"}
        return max(self.at_rate[names[name]] / bound for name, bound in slo.items())

    def beats(self, other: Point, slo: dict[str, float], step: float) -> bool:
        """More requests within the objective by at least `step`, or not fewer and a tail that is clearly shorter."""
        if self.error or other.error:
            return not self.error
        gained = self.at_rate["within_slo"] - other.at_rate["within_slo"]
        return gained >= step or (gained > -step and self.tail(slo) < FASTER * other.tail(slo))


def impossible(options: Options, max_model_len: int) -> str:
    """Why no engine takes these together; empty if one may."""
    tokens = options["max-num-batched-tokens"]
    if tokens < options["max-num-seqs"]:
        return "fewer tokens a step than running requests"
    if not options["enable-chunked-prefill"] and tokens < max_model_len:
        return f"without chunks a step must take a prompt of {max_model_len}"
    return ""


def loads(args: argparse.Namespace, ids: np.ndarray, seed: int) -> tuple[bench_serve.Load, bench_serve.Load]:
    """All at once, and the same requests again at --rate with other prompts: nothing is cached from before."""
    one, other = (
        bench_serve.make_load(argparse.Namespace(**{**vars(args), "seed": number}), ids) for number in (seed, seed + 1)
    )
    longest = max(len(request.prompt) + request.max_tokens for request in one.requests + other.requests)
    if longest > args.max_model_len:
        raise script.UserError(f"a request has {longest} tokens; raise --max-model-len {args.max_model_len} to that")
    return dataclasses.replace(one, times=np.zeros(len(one.requests))), other


def measure(args: argparse.Namespace, model: Path, options: Options, ids: np.ndarray, seed: int) -> Point:
    """A fresh server under both loads."""
    if error := impossible(options, args.max_model_len):
        return Point(options, error=error)
    at_once, at_rate = loads(args, ids, seed)
    try:
        with Server(model, args.engine, {**options, "max-model-len": args.max_model_len}) as server:
            same = {"temperature": args.temperature, "timeout_s": args.timeout_s}
            _, burst = asyncio.run(bench_serve.measure(server.url, at_once, label="all at once", **same))
            _, paced = asyncio.run(
                bench_serve.measure(server.url, at_rate, bounds_ms=args.slo, label="at rate", **same)
            )
            return Point(options, burst, paced, server.start_s)
    except script.UserError as error:
        if "did not start" not in str(error):
            raise
        return Point(options, error=str(error))


def row(point: Point, start: Options, star: bool = False) -> str:
    changed = {name: value for name, value in point.options.items() if start[name] != value}
    words = ", ".join(f"{name} {json.dumps(value)}" for name, value in changed.items()) or "the start"
    if point.error:
        return f"{words:<72} not possible: {point.error[:150]}"
    at_once, at_rate = point.at_once, point.at_rate
    cells = (at_once["output_tokens_per_s"], at_once["tpot_ms_p95"], at_rate["ttft_scheduled_ms_p95"],
             at_rate["tpot_ms_p95"])  # fmt: skip
    numbers = "".join(f"{cell:>11,.1f}" for cell in cells)
    return f"{words:<72}{numbers}{at_rate['within_slo']:>9.0%}{'  *' if star else ''}"


HEAD = f"{'setting':<72}{'tok/s':>11}{'TPOT p95':>11}{'TTFT p95':>11}{'TPOT p95':>11}{'in SLO':>9}"


def pareto(points: Sequence[Point]) -> list[Point]:
    """Those that none beats in both tokens/s and p95 of TPOT, all requests at once."""

    def of(point: Point) -> tuple[float, float]:
        return point.at_once["output_tokens_per_s"], -point.at_once["tpot_ms_p95"]

    good = [point for point in points if not point.error]
    return [
        p for p in good if not any(o is not p and all(a >= b for a, b in zip(of(o), of(p), strict=True)) for o in good)
    ]


def search(args: argparse.Namespace, model: Path, ids: np.ndarray) -> tuple[Point, list[Point]]:
    """The best point and all that were measured."""
    tried: list[Point] = []
    print(HEAD)

    def at(options: Options) -> Point:
        known = next((point for point in tried if point.options == options), None)
        if known is None:
            known = measure(args, model, options, ids, args.seed)
            tried.append(known)
            print(row(known, START), flush=True)
        return known

    best = at(START)
    if best.error:
        raise script.UserError(f"{args.engine} does not take the settings to start from: {best.error}")
    for axis in START:
        for value in getattr(args, axis.replace("-", "_")):
            log.info("trying", axis=axis, value=value)
            point = at({**best.options, axis: value})
            if point.beats(best, args.slo, step=1.5 / args.requests):
                best = point
    return best, tried


def plot(tried: Sequence[Point], best: Point, slo: dict[str, float], path: Path) -> None:
    """Tokens/s against p95 of TPOT with all requests at once, and TTFT against TPOT at the rate with the objective."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (trade, paced) = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    good = [point for point in tried if not point.error]
    front = sorted(pareto(good), key=lambda point: point.at_once["tpot_ms_p95"])
    trade.plot(
        *line(front, "at_once", "tpot_ms_p95", "output_tokens_per_s"), "-", color="#bbbbbb", label="Pareto front"
    )
    colors = {"cmap": "RdYlGn", "vmin": 0, "vmax": 1, "c": [point.at_rate["within_slo"] for point in good]}
    trade.scatter(*line(good, "at_once", "tpot_ms_p95", "output_tokens_per_s"), edgecolor="black", zorder=3, **colors)
    dots = paced.scatter(
        *line(good, "at_rate", "tpot_ms_p95", "ttft_scheduled_ms_p95"), edgecolor="black", zorder=3, **colors
    )
    for axes, y, part in ((trade, "output_tokens_per_s", "at_once"), (paced, "ttft_scheduled_ms_p95", "at_rate")):
        axes.plot(
            *line([best], part, "tpot_ms_p95", y),
            "o",
            markersize=15,
            markerfacecolor="none",
            color="black",
            label="recommended",
        )
        axes.grid(color="#eeeeee")
    trade.set(xlabel="TPOT p95, ms", ylabel="output tokens/s", title="all requests at once")
    paced.set(xlabel="TPOT p95, ms", ylabel="TTFT p95, ms", title="at the rate", xscale="log", yscale="log")
    if "tpot" in slo:
        paced.axvline(slo["tpot"], color="black", linestyle=":")
    if "ttft" in slo:
        paced.axhline(slo["ttft"], color="black", linestyle=":", label="objective")
    for axes in (trade, paced):
        axes.legend(frameon=False, fontsize=8)
    figure.colorbar(dots, label="share of requests within the objective")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def line(points: Sequence[Point], part: str, x: str, y: str) -> tuple[list[float], list[float]]:
    return [getattr(p, part)[x] for p in points], [getattr(p, part)[y] for p in points]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    model = args.model or folder_of(args.preset)
    ids = load.usable_ids(model)
    run = script.start(__file__, args)
    best, tried = search(args, model, ids)
    fresh = args.seed + 1000
    log.info("on a fresh trace", seed=fresh)
    proof = measure(args, model, best.options, ids, fresh)
    start = proof if best.options == START else measure(args, model, START, ids, fresh)
    holds = bool(proof.at_rate["within_slo"] >= args.attainment)
    front = pareto(tried)
    print(f"\non the Pareto front: {len(front)} of {len(tried)}\non a fresh trace\n{row(start, START)}")
    if start is not proof:
        print(row(proof, START))
    objective = ", ".join(f"{name} {bound:g} ms" for name, bound in args.slo.items())
    share = f"{proof.at_rate['within_slo']:.0%} of the requests at {args.rate:g}/s are within it"
    print(f"objective {objective}: {'holds' if holds else 'does not hold; lower the rate or the bounds'}: {share}")
    plot(tried, best, args.slo, run.path("tuning.png"))
    with script.atomic_write(run.path("recommended.yaml")) as file:
        yaml.safe_dump(
            {"model": str(model), "max-model-len": args.max_model_len, **best.options}, file, sort_keys=False
        )
    with script.atomic_write(run.path("points.json")) as file:
        json.dump(logs.finite([dataclasses.asdict(point) for point in tried]), file, indent=1)
    return {
        "engine": args.engine, "points": len(tried), "not_possible": sum(bool(point.error) for point in tried),
        "pareto": len(front), "recommended": best.options,
        "changed": sum(START[name] != value for name, value in best.options.items()),
        "rate": args.rate, "slo": args.slo, "slo_holds": holds,
        "within_slo": proof.at_rate["within_slo"], "within_slo_start": start.at_rate["within_slo"],
        "goodput_per_s": proof.at_rate["goodput_per_s"], "goodput_per_s_start": start.at_rate["goodput_per_s"],
        "ttft_ms_p95": proof.at_rate["ttft_scheduled_ms_p95"], "tpot_ms_p95": proof.at_rate["tpot_ms_p95"],
        "tokens_per_s": proof.at_once["output_tokens_per_s"],
        "tokens_per_s_start": start.at_once["output_tokens_per_s"],
    }  # fmt: skip


if __name__ == "__main__":
    script.run(main)
