"""Benchmark a server: requests by a schedule of their own, exact token counts, TTFT, TPOT, ITL, E2E, goodput.

You learn   open loop and closed loop, what each latency is counted from, why percentiles and not means, what an
            objective (SLO) makes of throughput
Laptop      python -m ch06_vllm.bench_serve --serve vllm:nano --rate 8 --requests 100
            python -m ch06_vllm.bench_serve --url http://127.0.0.1:8000 --model DIR --rate 8 --requests 100
GPU node    python -m ch06_vllm.bench_serve --model DIR --rate 40 --requests 1000 --prompt-tokens lognormal:512,0.8 \
                --output-tokens 64-256 --slo ttft:200 --slo tpot:30
Cluster     python -m ch06_vllm.bench_serve --url one=http://node1:8000 --url two=http://node2:8000 --model DIR …
You see     a row for each server; every request in requests-NAME.jsonl; load.png: the distributions of TTFT and ITL,
            requests in flight and tokens/s over time. lag_ms_p99 and loop_lag_ms_p99 are this program's own lateness:
            where they are not small beside the latencies, the client is what you measured

DIR is the folder that the server loads: its tokenizer gives the ids that prompts are made of. The load comes from
--rate with --burstiness (open loop), --trace (open loop, a file's arrivals and lengths) or --concurrency (closed loop).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ch06_vllm import load
from ch06_vllm.client import Client, Retry
from ch06_vllm.started import HELP, engine_and_model, folder_of, server
from common import logs, script

COLUMNS = (
    ("requests/s", "requests_per_s"),
    ("output tok/s", "output_tokens_per_s"),
    *(("TTFT p50", "ttft_ms_p50"), ("p99", "ttft_ms_p99"), ("TPOT p50", "tpot_ms_p50"), ("p99", "tpot_ms_p99")),
    *(("ITL p50", "itl_ms_p50"), ("p99", "itl_ms_p99"), ("E2E p50", "e2e_ms_p50"), ("p99", "e2e_ms_p99")),
)


@dataclass(frozen=True)
class Load:
    """What to send: `times` are the open loop's arrivals in seconds, None for a closed loop of `concurrency`."""

    requests: list[load.Request]
    warmup: list[load.Request]
    times: np.ndarray | None
    concurrency: int


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--url", type=named_url, action="append", help="[NAME=]URL of a server; again for more")
    parser.add_argument("--serve", type=engine_and_model, help=f"start this first: {HELP}")
    parser.add_argument("--model", type=Path, help="the model's folder, for its tokenizer (default: that of --serve)")
    parser.add_argument("--served-model", help="the name to ask for (default: the first that the server lists)")
    add_load_flags(parser)
    args = parser.parse_args(argv)
    if not (args.serve or args.model):
        raise script.UserError("whose tokenizer is unknown; give --model DIR, or --serve ENGINE:MODEL")
    return args


def named_url(text: str) -> tuple[str, str]:
    """argparse type: [NAME=]URL as (NAME, URL); a URL without a name is its own."""
    name, separator, url = text.partition("=")
    return (name, url) if separator and "://" not in name else (text, text)


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that describe a load, shared by the scripts that send one."""
    group = parser.add_argument_group("load")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--rate", type=float, default=math.inf, help="requests/s of the open loop; inf: all at once")
    source.add_argument("--concurrency", type=script.at_least(1), help="closed loop: so many requests in flight")
    source.add_argument("--trace", type=Path, help="open loop: JSONL with timestamp (ms), input_length, output_length")
    group.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; below: bursts; inf: constant rate")
    group.add_argument(
        "--max-concurrency", type=script.at_least(1), help="hold back what would exceed so many in flight"
    )
    group.add_argument("--requests", type=script.at_least(1), default=100)
    group.add_argument("--warmup", type=script.at_least(0), default=8, help="requests sent before, not counted")
    group.add_argument(
        "--prompt-tokens", type=load.lengths, default="128", help="128, 64-256 or lognormal:MEDIAN,SIGMA"
    )
    group.add_argument(
        "--output-tokens", type=load.lengths, default="64", help="likewise; answers have exactly so many"
    )
    group.add_argument("--shared-prefix", type=script.at_least(0), default=0, help="tokens in front of every prompt")
    group.add_argument("--prefixes", type=script.at_least(1), default=1, help="different shared prefixes")
    group.add_argument(
        "--slo", type=load.slo, action="append", default=[], help="ttft:MS, tpot:MS or e2e:MS; again for more"
    )
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--timeout-s", type=script.positive, default=600.0, help="for one request")


def make_load(args: argparse.Namespace, ids: np.ndarray) -> Load:
    """The requests and their times; the same seed gives the same load to every server."""
    if not (args.rate > 0 and args.burstiness > 0):  # nan is neither
        raise script.UserError("--rate and --burstiness are above 0; see --help")
    rng = np.random.default_rng(args.seed)

    def drawn(n: int) -> list[load.Request]:
        prefix = {"shared_prefix": args.shared_prefix, "prefixes": args.prefixes}
        return load.workload(ids, args.prompt_tokens(rng, n), args.output_tokens(rng, n), rng, **prefix)

    warmup = drawn(args.warmup)
    if args.trace:
        requests, times = load.read_trace(args.trace, ids, rng)
        return Load(requests, warmup, times, len(requests))
    requests = drawn(args.requests)
    if args.concurrency:
        return Load(requests, warmup, None, args.concurrency)
    times = load.arrivals(args.rate, args.requests, rng, args.burstiness)
    return Load(requests, warmup, times, args.max_concurrency or len(requests))


async def measure(
    url: str,
    sent: Load,
    *,
    model: str | None = None,
    bounds_ms: dict[str, float] | None = None,
    temperature: float = 0.0,
    timeout_s: float = 600.0,
    label: str = "requests",
) -> tuple[list[load.Record], script.Result]:
    """Send the load to one server: its records, and their figures. `model` is the first that it lists unless named."""
    one_attempt = Retry(attempts=1)  # a refused request is a result here
    limits = {"concurrency": sent.concurrency, "timeout_s": timeout_s, "api_key": os.environ.get("OPENAI_API_KEY")}
    async with Client(url, retry=one_attempt, **limits) as client:
        model = model or (await client.models())[0]
        with logs.Progress(len(sent.requests), label) as progress:
            ended = 0

            def on_end(record: load.Record) -> None:
                nonlocal ended
                ended += 1
                progress.update(ended, record.error or "")

            quiet = load.Sender(client, model, lambda _: None, temperature=temperature)
            warm = await quiet.closed_loop(sent.warmup, sent.concurrency)
            sender = load.Sender(client, model, on_end, temperature=temperature)
            gc.collect()
            gc.freeze()  # what is there now need not be searched again while tokens come
            async with load.loop_lag() as late:
                if sent.times is None:
                    records = await sender.closed_loop(sent.requests, sent.concurrency)
                else:
                    records = await sender.open_loop(sent.requests, sent.times)
    errors = [record.error for record in [*warm, *records] if record.error]
    if not any(record.error is None for record in records):
        raise script.UserError(f"no request was answered: {errors[0]}; mend that first")
    figures: script.Result = {
        **load.summary(records, bounds_ms),
        "loop_lag_ms_p99": float(np.percentile(late, 99)) * 1e3 if late else 0.0,
        "exact_lengths": all(
            (len(request.prompt), request.max_tokens) == (record.prompt_tokens, record.completion_tokens)
            for request, record in zip(sent.requests, records, strict=True)
            if not record.error
        ),
    }
    if errors:
        figures["first_error"] = errors[0]
    return records, figures


def row(name: str, figures: script.Result, width: int) -> str:
    return f"{name:<{width}}" + "".join(f"{figures[key]:>13.4g}" for _, key in COLUMNS)


def header(width: int) -> str:
    return f"{'ms':<{width}}" + "".join(f"{title:>13}" for title, _ in COLUMNS)


def draw(path: Path, measured: dict[str, list[load.Record]]) -> None:
    """TTFT and ITL as cumulative distributions; requests in flight and tokens/s over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((ttft, itl), (flight, tokens)) = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for name, records in measured.items():
        done = [record for record in records if not record.error]
        for axes, values in ((ttft, [r.ttft_s for r in done]), (itl, [gap for r in done for gap in r.itl_s])):
            axes.plot(np.sort(values) * 1e3, np.linspace(0, 1, len(values)), label=name)
        begun, ended = np.sort([r.called_s for r in done]), np.sort([r.arrivals_s[-1] for r in done])
        at_s = np.linspace(0, ended[-1], 400)
        flight.step(at_s, np.searchsorted(begun, at_s, "right") - np.searchsorted(ended, at_s, "right"), label=name)
        second = max(ended[-1] / 60, 1e-3)
        came = np.concatenate([np.asarray(r.arrivals_s) for r in done])
        counts, edges = np.histogram(came, np.arange(0, ended[-1] + second, second))
        tokens.step(edges[:-1], counts / second, where="post", label=name)
    ttft.set(xlabel="TTFT, ms", ylabel="share of requests", ylim=(0, 1))
    itl.set(xlabel="ITL, ms", ylabel="share of gaps", ylim=(0, 1))
    flight.set(xlabel="s", ylabel="requests in flight", ylim=(0, None))
    tokens.set(xlabel="s", ylabel="chunks of tokens / s", ylim=(0, None))
    ttft.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def save(run: script.Run, name: str, records: list[load.Record]) -> None:
    """Every request as a line of requests-NAME.jsonl."""
    with script.atomic_write(run.path(f"requests-{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}.jsonl")) as file:
        for record in records:
            file.write(json.dumps(logs.finite(record.as_json())) + "\n")


def compare(servers: dict[str, str], sent: Load, args: argparse.Namespace, run: script.Run) -> dict:
    """Measure one server after the other; print the table, write records and plot."""
    width = max(map(len, servers)) + 2
    asked = {"model": args.served_model, "bounds_ms": dict(args.slo), "temperature": args.temperature}
    measured: dict[str, list[load.Record]] = {}
    figures: dict[str, script.Result] = {}
    for name, url in servers.items():
        measured[name], figures[name] = asyncio.run(measure(url, sent, timeout_s=args.timeout_s, label=name, **asked))
        save(run, name, measured[name])
        if len(figures) == 1:
            print(header(width))
        print(row(name, figures[name], width), flush=True)
    draw(run.path("load.png"), measured)
    return next(iter(figures.values())) if len(figures) == 1 else {"servers": figures}


def main(argv: list[str] | None = None) -> dict:
    args = arguments(argv)
    sent = make_load(args, load.usable_ids(args.model or folder_of(args.serve[1])))
    run = script.start(__file__, args)
    with server(args.serve) if args.serve else contextlib.nullcontext() as running:
        started = [(":".join(args.serve), running.url)] if running else []
        urls = args.url or ([] if started else [named_url("http://127.0.0.1:8000")])
        return compare(dict(started + urls), sent, args, run)


if __name__ == "__main__":
    script.run(main)
