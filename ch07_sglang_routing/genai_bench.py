"""genai-bench on a server of known truth: what it reports, what was true, what its raw figures say when read aright.

You learn   to run genai-bench offline and read its result; which of its figures not to take as they are; that a
            benchmark is itself to be measured, on a server of which one knows the truth
Laptop      python -m ch07_sglang_routing.genai_bench                               (make setup-genai-bench first)
            python -m ch07_sglang_routing.genai_bench --serve sglang:nano           (or vllm:nano, ours:nano)
GPU node    python -m ch07_sglang_routing.genai_bench --serve sglang:1b --concurrency 32 --requests 400
Cluster     python -m ch07_sglang_routing.genai_bench --url http://node1:8000 --model DIR --served-model NAME
You see     a row for each of three runs (plain, with --warmup-ratio 0.3, with failures): genai-bench's figure, ours
            from the same raw requests, the truth; TTFT by our client beside; genai-bench.png. Of a real engine: the
            same, after one run on the known server, by which its TTFT is corrected

Why (genai-bench 0.0.5, aggregated_metrics_collector.py): the output tokens are summed without the warm-up's, and
divided by a duration with it; failures are divided by a count of requests that is set one step later, so error_rate is
0. A run is stopped in the middle of as many requests as are in flight, and what was served of them is not counted. Its
TTFT holds what its own client takes (a new connection for each request, threads of one process): no time in its file
tells how much, but a server of known truth does. Of inter-token latency and goodput it says nothing, and its file holds
no times to compute them from: for those take chapter 6's bench_serve.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ch06_vllm import load
from ch06_vllm.bench_serve import Load, measure
from ch06_vllm.started import HELP, engine_and_model, folder_of, server
from ch07_sglang_routing import sglang_engine  # noqa: F401  it is an engine from here on
from ch07_sglang_routing.known_truth import KnownServer, Truth
from common import process, script
from common.bootstrap import engine_environment

TTFT_S, GAP_S, TOKENS = 0.05, 0.01, 16


@dataclass(frozen=True)
class Reported:
    """Of one run: genai-bench's own figures, and what its raw requests say. NaN where there is none."""

    requests: int
    error_rate: float
    tokens_per_s: float
    ttft_ms_p50: float
    own_error_rate: float
    own_tokens_per_s: float
    own_requests_per_s: float
    ttfts_ms: tuple[float, ...]


def read_result(text: str) -> Reported:
    """A result file of genai-bench (one scenario at one concurrency).

    Ours: error_rate = failed / all. Rates are over the whole duration, of all completed requests, the warm-up's too,
    and of half of each that was cut off at the end: as many as the concurrency, and on average half of one was served.

    Raises:
        UserError: it is no such file.
    """
    try:
        value = json.loads(text)
        told, raw, unit = value["aggregated_metrics"], value["individual_request_metrics"], value["_time_unit"]
        to_ms = {"s": 1e3, "ms": 1.0}[unit]
        done = [one for one in raw if not one["error_code"]]
        duration_s = told["run_duration"] * to_ms / 1e3
        ttfts_ms = tuple(one["ttft"] * to_ms for one in done)
        served = len(done) + told["num_concurrency"] / 2
        tokens = sum(one["num_output_tokens"] for one in done) / len(done)
        return Reported(
            requests=len(raw),
            error_rate=told["error_rate"],
            tokens_per_s=told["mean_output_throughput_tokens_per_s"],
            ttft_ms_p50=told["stats"]["ttft"]["p50"] * to_ms,
            own_error_rate=1 - len(done) / len(raw),
            own_tokens_per_s=served * tokens / duration_s,
            own_requests_per_s=served / duration_s,
            ttfts_ms=ttfts_ms,
        )
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise script.UserError(f"that is no result of genai-bench 0.0.5 ({error!r}); give the run's own JSON") from None


def run_genai_bench(
    url: str, name: str, tokenizer: Path, out: Path, args: argparse.Namespace, extra: Sequence[str] = ()
) -> Reported:
    """One scenario at one concurrency, offline, with a local tokenizer folder.

    Backend vllm, for any server: openai drops ignore_eos, also where it is asked for, and answers end when they like.

    Raises:
        UserError: it is not installed, or it fails; its last words.
    """
    environment = engine_environment("genai-bench")
    if not (environment / ".installed").exists():
        raise script.UserError("there is no genai-bench here; run make setup-genai-bench")
    command = [
        environment / "bin/genai-bench", "benchmark", "--api-backend", "vllm", "--api-base", url, "--api-key", "none",
        "--task", "text-to-text", "--api-model-name", name, "--model-tokenizer", tokenizer,
        "--num-concurrency", args.concurrency, "--traffic-scenario", f"D({args.prompt_tokens},{TOKENS})",
        "--max-time-per-run", 5, "--max-requests-per-run", args.requests, "--num-workers", 0,
        "--experiment-base-dir", out.parent, "--experiment-folder-name", out.name, "--log-dir", out.parent,
        *extra,
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "COLUMNS": "200"}
    out.parent.mkdir(parents=True, exist_ok=True)
    done = process.run([str(word) for word in command], timeout_s=360, env=offline)
    results = [path for path in out.glob("*.json") if path.name != "experiment_metadata.json"]
    if not results:
        raise script.UserError(f"genai-bench has written no result ({done.reason()}); see {out.parent}/genai_bench.log")
    return read_result(results[0].read_text(encoding="utf-8"))


def our_ttft_ms(url: str, model: Path, args: argparse.Namespace) -> float:
    """The median by chapter 6's client: as many requests, as many at once."""
    ids, rng = load.usable_ids(model), np.random.default_rng(args.seed)
    requests = load.workload(ids, [args.prompt_tokens] * args.requests, [TOKENS] * args.requests, rng)
    _, figures = asyncio.run(measure(url, Load(requests, requests[:8], None, args.concurrency)))
    return figures["ttft_ms_p50"]


def median_ms(truth: Truth) -> float:
    return 1e3 * float(np.median(truth.ttft_s))


def row(name: str, told: Reported, truth: Truth | None, excess_ms: float) -> str:
    """excess_ms: what genai-bench's TTFT was above the truth on the known server, or NaN."""
    error_rate, tokens_per_s, ttft_ms = (
        (truth.error_rate, truth.tokens_per_s, median_ms(truth)) if truth else (math.nan,) * 3
    )
    values = [told.error_rate, told.own_error_rate, error_rate, told.tokens_per_s, told.own_tokens_per_s, tokens_per_s]
    values += [told.ttft_ms_p50, told.ttft_ms_p50 - excess_ms, ttft_ms]
    return f"{name:<10}" + "".join(f"{'-' if math.isnan(value) else f'{value:.3g}':>12}" for value in values)


HEADER = f"{'run':<10}" + "".join(
    f"{title:>12}"
    for title in ("error rate", "ours", "true", "tokens/s", "ours", "true", "TTFT p50 ms", "ours", "true")
)
RUNS: dict[str, tuple[list[str], dict[str, int]]] = {
    "plain": ([], {}),
    "warm-up": (["--warmup-ratio", "0.3"], {}),
    "failures": ([], {"fail": 2, "fail_of": 5}),
}


def draw(path: Path, found: dict[str, Reported], truths: dict[str, Truth]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, told in found.items():
        axes.plot(np.sort(told.ttfts_ms), np.linspace(0, 1, len(told.ttfts_ms)), label=f"genai-bench, {name}")
    for name, truth in truths.items():
        true = np.sort(truth.ttft_s) * 1e3
        axes.plot(true, np.linspace(0, 1, len(true)), "--", label=f"the server, {name}")
    axes.set(xlabel="TTFT, ms", ylabel="share of requests", ylim=(0, 1), xscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    running = script.start(__file__, args)
    found: dict[str, Reported] = {}
    truths: dict[str, Truth] = {}
    print(HEADER, flush=True)
    excess_ms = math.nan
    for name in ("plain",) if args.serve or args.url else RUNS:
        extra, faults = RUNS[name]
        with KnownServer(TTFT_S, GAP_S, **faults) as known:
            out = running.path("genai") / name
            found[name] = run_genai_bench(known.url, "known", folder_of("nano"), out, args, extra)
            truths[name] = known.truth
        print(row(name, found[name], truths[name], excess_ms), flush=True)
        if name == "plain":
            excess_ms = found[name].ttft_ms_p50 - median_ms(truths[name])
    measured = found["plain"]
    if args.serve or args.url:
        tokenizer = args.model or folder_of(args.serve[1])
        with server(args.serve) if args.serve else contextlib.nullcontext() as started:
            url, name = (started.url, started.model) if started else (args.url, args.served_model)
            label = args.serve[0] if args.serve else "server"
            measured = found[label] = run_genai_bench(url, name, tokenizer, running.path("genai") / label, args)
            ours_ms = our_ttft_ms(url, tokenizer, args)
        print(row(label, measured, None, excess_ms))
    else:
        with KnownServer(TTFT_S, GAP_S) as known:
            ours_ms = our_ttft_ms(known.url, folder_of("nano"), args)
    print(f"TTFT p50 by chapter 6's client: {ours_ms:.1f} ms")
    draw(running.path("genai-bench.png"), found, truths)
    result = {
        "requests": measured.requests, "error_rate": measured.own_error_rate,
        "tokens_per_s": measured.own_tokens_per_s, "requests_per_s": measured.own_requests_per_s,
        "ttft_ms_p50_theirs": measured.ttft_ms_p50, "ttft_ms_p50_client": ours_ms, "ttft_ms_excess": excess_ms,
    }  # fmt: skip
    for name, truth in truths.items():
        label, told = name.replace("-", ""), found[name]
        result |= {
            f"{label}_tokens_theirs_over_true": told.tokens_per_s / truth.tokens_per_s,
            f"{label}_tokens_ours_over_true": told.own_tokens_per_s / truth.tokens_per_s,
            f"{label}_ttft_ms_p50_true": median_ms(truth),
        }
        if name != "plain":
            result[f"{label}_ttft_ms_p50_ours"] = told.ttft_ms_p50 - excess_ms
    if "failures" in truths:
        rates = (found["failures"].error_rate, found["failures"].own_error_rate, truths["failures"].error_rate)
        result |= dict(zip(("failures_theirs", "failures_ours", "failures_true"), rates, strict=True))
        result["failures_off"] = abs(rates[1] - rates[2])
    else:
        result["ttft_ms_p50_ours"] = measured.ttft_ms_p50 - excess_ms
    return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--serve", type=engine_and_model, help=f"start this and measure it: {HELP}")
    parser.add_argument("--url", help="of a server that runs; with --model and --served-model")
    parser.add_argument("--model", type=Path, help="the model's folder, for its tokenizer")
    parser.add_argument("--served-model", help="the name that requests use")
    parser.add_argument("--concurrency", type=script.at_least(1), default=4)
    parser.add_argument("--requests", type=script.at_least(10), default=100, help="of each run, at least")
    parser.add_argument("--prompt-tokens", type=script.at_least(1), default=32)
    args = parser.parse_args(argv)
    if args.url and not (args.model and args.served_model):
        raise script.UserError("--url needs --model DIR (its tokenizer) and --served-model NAME")
    return args


if __name__ == "__main__":
    script.run(main)
