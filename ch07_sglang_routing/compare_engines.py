"""SGLang, vLLM and our engine: one client, one trace, at several loads, round by round in turn.

You learn   how engines are compared: the same requests at the same moments, ratios within a round instead of figures
            of two days, the settings of each written down; and what such a table can say on a CPU
Laptop      python -m ch07_sglang_routing.compare_engines
GPU node    python -m ch07_sglang_routing.compare_engines --model 1b --rate 4,16,64 --requests 400 --max-running 256
                --prompt-tokens 256-1024 --output-tokens 64-256 --max-len 4096 --cache-tokens 262144
            (a cache of 262144 tokens is 8 GiB in each engine; all three stand on one GPU of 40 GB or more)
Cluster     the same on one replica; replicas share nothing but the load (router/)
You see     for each load a row an engine: tokens/s, TTFT, TPOT and E2E, and E2E over the first engine's: the median of
            the rounds with their range; settings.json with version, command and variables of each

All servers are up from the start and take turns in an order drawn anew each round; the prompts share nothing, and are
new in each round of each load, so that no cache helps. `waiting` is the share of a core that those who wait for their
turn take: it should be near 0. What is the same for all: the longest request, requests and tokens in a step, tokens in
the KV cache, and without a GPU the threads that compute (all cores but one, which client and HTTP servers need).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ch06_vllm import bench_serve, load
from ch06_vllm.servers import ENGINES, Server, cores_of_ranks, own_cores
from ch06_vllm.started import engine_name, folder_of
from ch07_sglang_routing import sglang_engine  # noqa: F401  it is an engine from here on
from common import logs, script
from common.bootstrap import engine_environment, gpus_visible

log = logs.get_logger()
SHOWN = {
    "tokens/s": "output_tokens_per_s", "TTFT p50": "ttft_ms_p50", "p99": "ttft_ms_p99", "TPOT p50": "tpot_ms_p50",
    "E2E p50": "e2e_ms_p50", "E2E p99": "e2e_ms_p99",
}  # fmt: skip


BLOCK = 32  # tokens, of ours and of vLLM, whose CPU build takes no fewer; SGLang's cache has none


def options_of(engine: str, args: argparse.Namespace) -> dict[str, Any]:
    """The same limits in each engine's own words. The rest is the engine's default, or without a GPU what LAPTOP says
    (ch06_vllm.servers, sglang_engine): no compilation."""
    if engine == "sglang":
        return {
            "context-length": args.max_len, "max-running-requests": args.max_running,
            "chunked-prefill-size": args.step_tokens, "max-total-tokens": args.cache_tokens,
            "sleep-on-idle": True,  # on a GPU too: others are measured
        }  # fmt: skip
    blocks = -(-args.cache_tokens // BLOCK)
    found = {
        "max-model-len": args.max_len, "max-num-seqs": args.max_running, "max-num-batched-tokens": args.step_tokens,
        "block-size": BLOCK,
    }  # fmt: skip
    if engine == "vllm":
        found["num-gpu-blocks-override"] = blocks + 1  # it keeps one for itself
        if gpus_visible():  # of the whole GPU, and so much must be free; the override says what the cache takes of it
            found["gpu-memory-utilization"] = 0.9 / len(args.engine)
        return found
    return found | {"num-blocks": blocks}


def variables_of(engine: str) -> dict[str, str]:
    """Without a GPU: the same number of threads in each, one core fewer than there are."""
    if gpus_visible():
        return {}
    cores = own_cores()[1:] or own_cores()
    bound = {"vllm": "VLLM_CPU_OMP_THREADS_BIND", "sglang": "SGLANG_CPU_OMP_THREADS_BIND"}
    found = {"OMP_NUM_THREADS": str(len(cores))}
    return found | ({bound[engine]: cores_of_ranks(cores, 1)} if engine in bound else {})


def versions_of(engine: str) -> dict[str, str]:
    """Of an engine with an environment of its own; ours has the versions of the run's env.json."""
    if engine == "ours":
        return {}
    places = [str(path) for path in (engine_environment(engine) / "lib").glob("python*/site-packages")]
    found = {each.name: each.version for each in importlib.metadata.distributions(path=places)}
    return {name: version for name, version in found.items() if name in ("vllm", "vllm-cpu", "sglang", "torch")}


def settings_of(server: Server) -> dict[str, Any]:
    """Versions, command and own variables: what settings.json holds of each."""
    variables = {name: value for name, value in ENGINES[server.engine].environment(1).items() if name != "PATH"}
    command = server.child.command
    return {"versions": versions_of(server.engine), "command": command, "environment": variables | server.env}


class Waiting:
    """CPU time of servers that have nothing to do."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self.processes = [process for server in servers for process in server.child.tree()]
        self.began, self.before = time.monotonic(), self._spent()

    def _spent(self) -> float:
        spent = 0.0
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                spent += times.user + times.system
        return spent

    def cores(self) -> float:
        return (self._spent() - self.before) / (time.monotonic() - self.began)


Round = dict[str, dict[str, float]]  # figures by engine


def drawn_load(at: int, number: int, args: argparse.Namespace, ids: Any) -> bench_serve.Load:
    """The requests and Poisson arrivals of a round of a load, that is args.rate[at]: the same for every engine."""
    rng = np.random.default_rng((args.seed, at, number))

    def drawn(count: int) -> list[load.Request]:
        return load.workload(ids, args.prompt_tokens(rng, count), args.output_tokens(rng, count), rng)

    times = load.arrivals(args.rate[at], args.requests, rng)
    return bench_serve.Load(drawn(args.requests), drawn(args.warmup), times, args.requests)


def play(
    servers: dict[str, Server], at: int, number: int, args: argparse.Namespace, ids: Any, records: Path
) -> tuple[Round, float]:
    """One round: each engine in turn gets the same requests. Their figures, and cores taken by those that waited."""
    sent, rate = drawn_load(at, number, args, ids), args.rate[at]
    figures: Round = {}
    waiting = []
    for name in random.Random(f"{args.seed} {at} {number}").sample(list(servers), len(servers)):
        others = Waiting([server for other, server in servers.items() if other != name])
        work = bench_serve.measure(servers[name].url, sent, model=servers[name].model, label=f"{name}, {rate:g}/s")
        rows, figures[name] = asyncio.run(work)
        waiting.append(others.cores())
        with records.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"engine": name, "rate": rate, "round": number} | row.as_json()) + "\n" for row in rows
            )
    return figures, max(waiting)


def over_first(rounds: Sequence[Round], name: str, first: str, key: str) -> list[float]:
    """Sorted ratios to the first engine's figure, each within a round."""
    return sorted(figures[name][key] / figures[first][key] for figures in rounds)


def show(rate: float, rounds: Sequence[Round], first: str) -> dict[str, Any]:
    """Print the rows of one load; RESULT's part of it."""
    print(f"\n{rate:g} requests/s   " + "".join(f"{head:>10}" for head in SHOWN) + f"   E2E p50 / {first}'s")
    found: dict[str, Any] = {}
    for name in rounds[0]:
        row = {key: statistics.median(figures[name][key] for figures in rounds) for key in SHOWN.values()}
        ratios = over_first(rounds, name, first, "e2e_ms_p50")
        middle = statistics.median(ratios)
        print(
            f"{name:<16}"
            + "".join(f"{value:>10,.1f}" for value in row.values())
            + f"   {middle:6.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
        found[name] = row | {"e2e_over_first": middle, "e2e_over_first_range": [ratios[0], ratios[-1]]}
        found[name]["failed"] = sum(figures[name]["failed"] for figures in rounds)
        found[name]["exact_lengths"] = all(figures[name]["exact_lengths"] for figures in rounds)
    return found


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    run = script.start(__file__, args)
    folder = folder_of(args.model)
    ids = load.usable_ids(folder)
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in args.engine:
            options = {"served-model-name": args.model} | options_of(name, args)
            servers[name] = stack.enter_context(Server(folder, name, options, env=variables_of(name)))
            log.info("up", engine=name, seconds=round(servers[name].start_s, 1))
        settings = {name: settings_of(server) for name, server in servers.items()}
        run.path("settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        result: dict[str, Any] = {"engines": len(servers), "rounds": args.rounds, "waiting_cores": 0.0}
        for at, rate in enumerate(args.rate):
            rounds = []
            for number in range(args.rounds):
                figures, waiting = play(servers, at, number, args, ids, run.path("requests.jsonl"))
                rounds.append({name: figures[name] for name in args.engine})
                result["waiting_cores"] = max(result["waiting_cores"], waiting)
            result[f"at_{rate:g}"] = show(rate, rounds, args.engine[0])
    rows = [row for key, found in result.items() if key.startswith("at_") for row in found.values()]
    result["failed"] = sum(row["failed"] for row in rows)
    result["exact_lengths"] = all(row["exact_lengths"] for row in rows)
    print(f"\nwaiting: at most {result['waiting_cores']:.0%} of a core")
    return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--engine", type=script.comma_list(engine_name), default="ours,vllm,sglang")
    parser.add_argument("--model", default="nano", help="a preset (random weights, made once) or a model's folder")
    parser.add_argument("--rounds", type=script.at_least(1), default=3)
    parser.add_argument("--max-len", type=script.at_least(64), default=1024, help="tokens of the longest request")
    parser.add_argument("--max-running", type=script.at_least(1), default=64, help="requests in one step")
    parser.add_argument("--step-tokens", type=script.at_least(64), default=2048, help="tokens in one step")
    parser.add_argument("--cache-tokens", type=script.at_least(1024), default=32768, help="of each engine's KV cache")
    parser.add_argument(
        "--rate", type=script.comma_list(script.positive), default="1,4", help="requests/s of each load"
    )
    parser.add_argument("--requests", type=script.at_least(1), default=40, help="of a round")
    parser.add_argument("--warmup", type=script.at_least(0), default=8, help="requests sent before, not counted")
    parser.add_argument("--prompt-tokens", type=load.lengths, default="32-256")
    parser.add_argument("--output-tokens", type=load.lengths, default="16-96", help="answers have exactly so many")
    args = parser.parse_args(argv)
    if args.cache_tokens < args.max_len:
        raise script.UserError(
            f"a request of --max-len {args.max_len} does not fit into --cache-tokens {args.cache_tokens}; raise that"
        )
    return args


if __name__ == "__main__":
    script.run(main)
