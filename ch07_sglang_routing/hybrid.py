"""Interactive requests to the GPU, short ones and batches to CPUs, spill-over by predicted latency: what it costs.

You learn   to predict a request's latency from a step's formula and your own count of what is in flight, how wrong that
            is, and why; what routing by class gains and where it queues; dollars per million tokens beside latency
Laptop      python -m ch07_sglang_routing.hybrid
            (without a GPU the tier called gpu is chapter 6's engine, and the tier called cpu the same engine throttled
            to a --throttle-th of its speed: ratios of latencies are about the policies, dollars about no real GPU)
GPU node    python -m ch07_sglang_routing.hybrid --model 1b --cpu-replicas 1 --rounds 2
            (the GPU, and the cores of its host; a replica on CPUs holds 2.5 GiB of weights and a cache of 1 GiB)
Cluster     python -m ch07_sglang_routing.hybrid --model DIR --url gpu=http://node1:8000 --url cpu=http://node2:8000
You see     four policies on one arrival trace: share of interactive requests within their TTFT, completion of batches,
            dollars; the difference that spill-over makes, with its interval; hybrid.png

Each turn of a policy has words of its own, of the same lengths, so that none finds in a cache what another left. The
load is set by calibration: --load 0.6 keeps the gpu tier busy for 60 % of the trace if it gets everything. The
prices are an assumption, give your own: an H100 was rented for 2 to 5 dollars an hour in May 2026
(mercatus-ai.com/blog/cloud-gpu-pricing), eight cores we take for 0.35. rented: a policy pays for the tiers that it
uses, all the time. busy: it pays while a replica has something in flight, as where others use the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ch06_vllm import load, servers
from ch06_vllm.bench_serve import named_url
from ch06_vllm.client import Client, RequestFailed, Retry
from ch06_vllm.engine.request import Config
from ch06_vllm.started import folder_of
from ch07_sglang_routing import hybrid_report as report
from ch07_sglang_routing import (
    throttled,  # noqa: F401  it is an engine from here on
    tiers,
)
from ch07_sglang_routing.hybrid_report import Done
from ch07_sglang_routing.simulator import compare as simulated
from ch07_sglang_routing.simulator import live
from ch07_sglang_routing.simulator.physics import Physics
from ch07_sglang_routing.tiers import BATCH, INTERACTIVE, POLICIES, SHORT, Ask, Flight, Prediction, Replica
from common import script
from common.bootstrap import gpus_visible

# Tokens of prompt and answer, share of the requests, and how many times what an idle home tier takes is still good.
CLASSES = {
    INTERACTIVE: ((32, 128), (16, 48), 0.5, 4.0),
    SHORT: ((16, 48), (4, 8), 0.25, 4.0),
    BATCH: ((96, 192), (48, 96), 0.25, 4.0),
}
BURST = 6  # requests of a batch come together


@dataclass(frozen=True)
class Planned:
    """A request of the trace. Its words are drawn anew for each turn."""

    at_s: float
    ask: Ask


@dataclass(frozen=True)
class Place:
    """What the probes ask of a server."""

    url: str
    model: str


class Fleet:
    """The replicas, a client to each, and the count of what is in flight there. Prompts are made of `ids`."""

    def __init__(self, replicas: Sequence[Replica], clients: dict[str, Client], model: str, ids: np.ndarray) -> None:
        self.replicas, self.clients, self.model, self.ids = list(replicas), clients, model, ids

    async def stream(self, replica: Replica, request: load.Request, flight: Flight) -> tuple[float, float]:
        """TTFT and E2E in seconds. `flight` counts there from now until the end, whatever the end is.

        Raises:
            RequestFailed: also where the answer has not a single token.
        """
        body = {"model": self.model, "prompt": request.prompt, "max_tokens": request.max_tokens}
        start, first_s, last_s = time.perf_counter(), 0.0, 0.0
        replica.flights.append(flight)
        try:
            options = {"ignore_eos": True, "temperature": 0}
            async with self.clients[replica.name].stream("/v1/completions", body | options) as chunks:
                async for chunk in chunks:
                    if chunk.tokens or chunk.finish_reason:  # a last token without text comes with the reason alone
                        first_s, last_s = first_s or chunk.at_s, chunk.at_s
                        flight.came += max(1, chunk.tokens)
        finally:
            replica.flights.remove(flight)
        if not flight.came:
            raise RequestFailed("the answer holds no token")
        return first_s - start, last_s - start

    async def send(self, planned: Planned, request: load.Request, policy: tiers.Policy, began: float) -> Done:
        ask = planned.ask
        sent_s = time.perf_counter() - began
        replica, predicted = policy(ask, self.replicas)
        error, ttft_s, e2e_s = "", float("nan"), float("nan")
        try:
            ttft_s, e2e_s = await self.stream(replica, request, Flight(ask.prompt, ask.output))
        except RequestFailed as failed:
            error = str(failed)
        late_s = sent_s - planned.at_s
        within = not error and Prediction(ttft_s + late_s, e2e_s + late_s).meets(ask)
        return Done(
            ask.kind, replica.tier, replica.name, sent_s, late_s, ttft_s, e2e_s, predicted,
            ask.prompt, ask.output, within, error,
        )  # fmt: skip

    async def replay(self, trace: Sequence[Planned], policy: tiers.Policy, rng: np.random.Generator) -> list[Done]:
        """One turn of a policy, with new words: what came of each request, in the trace's order."""
        lengths = [(planned.ask.prompt, planned.ask.output) for planned in trace]
        requests = load.workload(self.ids, *zip(*lengths, strict=True), rng)
        began, tasks = time.perf_counter(), []
        async with asyncio.TaskGroup() as group:
            for planned, request in zip(trace, requests, strict=True):
                await asyncio.sleep(max(0.0, began + planned.at_s - time.perf_counter()))
                tasks.append(group.create_task(self.send(planned, request, policy, began)))
        return [task.result() for task in tasks]

    async def calibrate(self, rng: np.random.Generator, rounds: int) -> None:
        """Each replica's physics, of all at once: in the trace too they share the machine. A round before warms up."""
        measured = await asyncio.gather(*(self._probe(replica, rng, rounds) for replica in self.replicas))
        for replica, samples in zip(self.replicas, measured, strict=True):
            medians = {terms: statistics.median(found) for terms, found in samples.items()}  # few probes, and outliers
            # A client that was held up reads all tokens at once: no time between them is no measurement.
            replica.physics = live.fit({terms: [middle] for terms, middle in medians.items() if middle})
            terms = ", ".join(f"{name[:-2]} {1e3 * value:.3g}" for name, value in asdict(replica.physics).items())
            print(f"{replica.name}: ms {terms}", flush=True)

    async def _probe(self, replica: Replica, rng: np.random.Generator, rounds: int) -> live.Samples:
        place = Place(self.clients[replica.name].url, self.model)
        samples: live.Samples = {}
        await live.measure([place], self.ids, {}, rng)
        for _ in range(rounds):
            await live.measure([place], self.ids, samples, rng)
        return samples


def make_trace(replicas: Sequence[Replica], args: argparse.Namespace, rng: np.random.Generator) -> list[Planned]:
    """So many requests that the gpu tier would be busy for --load of their time. Objectives hang on its idle speed."""
    gpu, cpu = (next(each for each in replicas if each.tier == tier) for tier in ("gpu", "cpu"))
    capacity = sum(each.tier == "gpu" for each in replicas)
    asks = []
    for kind, (prompts, outputs, share, slack) in CLASSES.items():
        home = gpu if kind == INTERACTIVE else cpu
        idle = tiers.predict(home.physics, home.config, [], prompts[1], outputs[1])
        objective = {"ttft_s": slack * idle.ttft_s} if kind == INTERACTIVE else {"e2e_s": slack * idle.e2e_s}
        if kind == INTERACTIVE and args.ttft_ms:
            objective = {"ttft_s": args.ttft_ms / 1e3}
        for _ in range(max(1, round(share * args.requests))):
            lengths = (int(rng.integers(low, high + 1)) for low, high in (prompts, outputs))
            asks.append(Ask(kind, *lengths, **objective))
    length_s = sum(tiers.work_s(gpu.physics, ask) for ask in asks) / capacity / args.load
    at_s = rng.uniform(0, length_s, len(asks))
    for first in range(0, len(asks), BURST):
        burst = [i for i in range(first, min(first + BURST, len(asks))) if asks[i].kind == BATCH]
        at_s[burst] = at_s[first]
    return [Planned(float(at_s[i]), asks[i]) for i in np.argsort(at_s)]


# ---------------------------------------------------------------- the servers


def start(stack: contextlib.ExitStack, args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(name, tier, url) of each replica, started here unless --url names them."""
    if args.url:
        return [(f"{tier}{number}", tier, url) for number, (tier, url) in enumerate(args.url)]
    folder, shared = folder_of(args.model), {"served-model-name": args.model} | limits(args, "-")
    real = gpus_visible() and args.device != "cpu"
    threads = max(1, len(servers.own_cores()) // args.cpu_replicas) if real else 1
    on_cpu = {"OMP_NUM_THREADS": str(threads)}
    cpu = ("ours", {"device": "cpu"}) if real else ("throttled", {"factor": args.throttle})
    wanted: list[tuple[str, str, dict]] = [("gpu", "ours", {})] + [("cpu", *cpu)] * args.cpu_replicas
    if not real:
        print(f"no GPU: the tier 'gpu' is the engine on a core, 'cpu' the same at 1/{args.throttle:g} of its speed")
    found = []
    for number, (tier, engine, own) in enumerate(wanted):
        env = {} if real and tier == "gpu" else on_cpu
        server = stack.enter_context(servers.Server(folder, engine, shared | own, env=env))
        found.append((f"{tier}{number}", tier, server.url))
    return found


def limits(args: argparse.Namespace, between: str) -> dict[str, int]:
    """Of a step: for the engines' flags and for the prediction."""
    found = {"max num seqs": args.max_num_seqs, "max num batched tokens": max(2048, args.max_num_seqs)}
    return {name.replace(" ", between): value for name, value in found.items()}


async def compare(
    addresses: Sequence[tuple[str, str, str]], ids: np.ndarray, args: argparse.Namespace
) -> tuple[list[Replica], dict[str, list[list[Done]]], list[Planned]]:
    """Calibrate, then each policy on the same trace, --rounds times in turn."""
    rng = np.random.default_rng(args.seed)
    async with contextlib.AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(Client(url, concurrency=1024, retry=Retry(attempts=1)))
            for name, _, url in addresses
        }
        model = (await next(iter(clients.values())).models())[0]
        config = Config("", **limits(args, "_"))
        replicas = [Replica(name, tier, Physics(), config) for name, tier, _ in addresses]
        fleet = Fleet(replicas, clients, model, ids)
        await fleet.calibrate(rng, args.probe_rounds)
        trace = make_trace(replicas, args, rng)
        runs: dict[str, list[list[Done]]] = {name: [] for name in POLICIES}
        for turn in range(args.rounds):
            names = list(POLICIES)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                runs[name].append(await fleet.replay(trace, POLICIES[name], rng))
    return replicas, runs, trace


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    ids = load.usable_ids(folder_of(args.model))
    running = script.start(__file__, args)
    with contextlib.ExitStack() as stack:
        replicas, runs, trace = asyncio.run(compare(start(stack, args), ids, args))
    for name, rounds in runs.items():
        for turn, done in enumerate(rounds):
            for one in done:
                running.log(policy=name, round=turn, **asdict(one))
    usd_per_h = {"gpu": args.usd_per_h_gpu, "cpu": args.usd_per_h_cpu}
    found = {name: report.figures(rounds, usd_per_h, replicas) for name, rounds in runs.items()}
    print(report.table(found))
    within = {name: np.mean([[one.within for one in done] for done in rounds], axis=0) for name, rounds in runs.items()}
    more = within["spill"] - within["by-class"]
    blocks = max(4, len(trace) // 12)
    gain = simulated.bootstrap(lambda at: float(more[at].mean()), len(trace), args.seed, blocks=blocks, resamples=2000)
    print(
        f"spill-over: {gain.value:+.1%} ({gain.low:+.1%} to {gain.high:+.1%}) of all requests within their objective, "
        "over by-class"
    )
    turns = [done for rounds in runs.values() for done in rounds]
    error = report.prediction_error(turns, replicas)
    for label, kind in (("predicted", "e2e"), ("had one known what comes after", "e2e_hindsight")):
        bias, off = error[f"{kind}_over_measured"], error[f"{kind}_error_p50"]
        print(f"E2E, {label}: {bias:.2f} of the measured, off by {off:.0%}")
    report.draw(running.path("hybrid.png"), found, [one for done in turns for one in done])
    gpu, cpu = found["all-gpu"], found["all-cpu"]
    return {
        "requests": len(trace), "rounds": args.rounds, "trace_s": trace[-1].at_s, "policies": found,
        "answered": sum(each["answered"] for each in found.values()),
        "failed": sum(each["failed"] for each in found.values()),
        "in_flight_left": sum(len(replica.flights) for replica in replicas),
        "by_class_gpu_share": found["by-class"]["gpu_share"],
        "cpu_over_gpu_usd": cpu["usd_per_mtok_rented"] / gpu["usd_per_mtok_rented"],
        "cpu_over_gpu_short_e2e": cpu["short_e2e_ms_p50"] / gpu["short_e2e_ms_p50"],
        "spill_gain": gain.value, "spill_gain_low": gain.low, "spill_gain_high": gain.high, **error,
    }  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--model", default="nano", help="a preset, or with --url the folder that the servers load")
    parser.add_argument("--cpu-replicas", type=script.at_least(1), default=2)
    parser.add_argument("--throttle", type=script.positive, default=3.0, help="without a GPU: how much slower cpu is")
    parser.add_argument("--requests", type=script.at_least(12), default=96, help="of the trace")
    parser.add_argument("--rounds", type=script.at_least(1), default=3, help="of each policy")
    parser.add_argument("--probe-rounds", type=script.at_least(1), default=4, help="by which replicas are calibrated")
    parser.add_argument("--load", type=script.positive, default=0.6, help="of the gpu tier, if it gets everything")
    parser.add_argument(
        "--max-num-seqs",
        type=script.at_least(1),
        default=32,
        help="in one step of a replica; with --url as its servers have it",
    )
    parser.add_argument("--ttft-ms", type=script.positive, help="objective of interactive requests (default: 4 x idle)")
    parser.add_argument("--usd-per-h-gpu", type=script.positive, default=2.5, help="of a replica: your price")
    parser.add_argument("--usd-per-h-cpu", type=script.positive, default=0.35, help="likewise")
    parser.add_argument("--url", type=named_url, action="append", help="gpu=URL or cpu=URL, again for more replicas")
    args = parser.parse_args(argv)
    if args.throttle < 1:
        raise script.UserError(f"--throttle {args.throttle:g} would be faster than the engine; take 1 or more")
    if args.url and {tier for tier, _ in args.url} != {"gpu", "cpu"}:
        raise script.UserError("--url needs replicas of both tiers; give gpu=http://… and cpu=http://…")
    return args


if __name__ == "__main__":
    script.run(main)
