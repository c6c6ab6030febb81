"""Routing policies on one arrival trace, in virtual time: hit rates, tails, hot spots, stale gauges, a leaked counter.

You learn   why a router must look at caches and at load together; how to compare two policies: the same arrivals for
            both, an interval on the difference, and regret against someone who knows more
Laptop      python -m ch07_sglang_routing.simulate
            python -m ch07_sglang_routing.simulate --workers 16 --rate 300 --blocks 2048
GPU node    the same: it computes nothing. --slower 0.3 is a faster engine; validate_simulator.py measures yours
Cluster     nothing more
You see     a table a trace: hit rate, TTFT, E2E, each with a 95 % interval of the difference from round robin, and
            regret; then what goes wrong with pure prefix routing, old gauges and a counter that leaks; simulate.png

The engines are simulated step for step (simulator/engine.py), the policies are the router's own. Intervals are those of
a paired block bootstrap (simulator/compare.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from ch06_vllm.engine.request import Config
from ch07_sglang_routing.router.policies import POLICIES
from ch07_sglang_routing.simulator import compare, run, traces
from ch07_sglang_routing.simulator.physics import Physics
from ch07_sglang_routing.simulator.run import Played, Setting
from common import logs, script

log = logs.get_logger()
NAMES = {"hit_rate": "hit rate", "ttft_ms": "TTFT ms", "ttft_ms_p99": "TTFT p99 ms", "e2e_ms": "E2E ms"}
COLORS = ("#1f5c99", "#2e7d32", "#b3541e", "#6a4c93", "#888888", "#c2185b", "#000000")
Plays = dict[str, Played]


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--requests", type=script.at_least(200), default=12_000, help="of each trace")
    parser.add_argument("--rate", type=script.positive, default=70.0, help="requests/s, on average")
    parser.add_argument("--workers", type=script.at_least(2), default=8)
    parser.add_argument(
        "--blocks", type=script.at_least(128), default=1024, help="of 16 tokens: each engine's KV cache"
    )
    parser.add_argument("--slower", type=script.positive, default=1.0, help="times; 1 is the nano model on two cores")
    parser.add_argument(
        "--request-tokens", type=script.comma_list(script.at_least(0)), default="0,16,64,256,1024",
        help="prefill tokens that joint counts for a request in flight",
    )  # fmt: skip
    parser.add_argument("--lags", type=script.comma_list(script.positive), default="1,3,6", help="s between scrapes")
    parser.add_argument("--leak", type=script.positive, default=0.02, help="share of one worker's requests")
    parser.add_argument("--day-requests", type=script.at_least(1000), default=120_000, help="in 24 hours")
    parser.add_argument("--resamples", type=script.at_least(50), default=400, help="of the bootstrap")
    return parser.parse_args(argv)


def play(name: str, policies: list[str], setting: Setting, args: argparse.Namespace) -> Plays:
    """A trace by each of these policies, and by one that knows lengths and caches."""
    trace = traces.named(name, args.requests, args.rate, args.seed)
    log.info("playing", trace=name, requests=len(trace))
    played = {policy: run.play(trace, run.policy(policy, setting), setting) for policy in policies}
    return played | {"informed": run.play(trace, run.Informed(setting.physics), setting)}


def table(title: str, played: Plays, base: str, args: argparse.Namespace) -> str:
    """Each policy's figures; what it has more than `base`, and its regret, with intervals."""
    best = run.oracle(played.values())
    lines = [f"{title:<18}" + "".join(f"{name:>13}" for name in NAMES.values())]
    for policy, one in played.items():
        lines.append(f"{policy:<18}" + "".join(f"{compare.value(name, one):>13.4g}" for name in NAMES))
    differs = ("hit_rate", "ttft_ms_p99", "e2e_ms")
    lines.append(f"more than {base}:".ljust(32) + "".join(f"{NAMES[n]:<33}" for n in differs) + "regret: E2E ms")
    for policy, one in played.items():
        found = [(name, played[base]) for name in differs] + [("e2e_ms", best)]
        cells = [
            "-" if one is other else str(compare.difference(name, one, other, args.seed, resamples=args.resamples))
            for name, other in found
        ]
        lines.append(f"  {policy:<30}" + "".join(f"{cell:<33}" for cell in cells).rstrip())
    return "\n".join(lines)


def shares(one: Played, workers: int) -> np.ndarray:
    """Of the trace's second half, the share of requests that each worker got."""
    half = one.worker[len(one.worker) // 2 :]
    return np.bincount(half, minlength=workers) / len(half)


def weigh(setting: Setting, args: argparse.Namespace) -> list[dict[str, float]]:
    """The joint policy with other weights of load against cache."""
    trace = traces.named("shared", args.requests, args.rate, args.seed)
    rows = []
    for weight in args.request_tokens:
        one = run.play(trace, run.policy("joint", setting, weight), setting)
        rows.append({"weight": weight} | {name: compare.value(name, one) for name in NAMES})
    return rows


def stale(setting: Setting, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Least in flight and power of two choices by own counts, and by gauges that are read now and then."""
    trace = traces.named("shared", args.requests, args.rate, args.seed)
    rows: list[dict[str, Any]] = []
    for lag in (None, *args.lags):
        seen = dataclasses.replace(setting, scrape_s=lag)
        for policy in ("least_in_flight", "power_of_two"):
            one = run.play(trace, run.policy(policy, seen), seen)
            # A herd: how much of what came in a second went to one worker.
            seconds = one.at_s.astype(int)
            herds = [np.bincount(one.worker[seconds == s]).max() / (seconds == s).sum() for s in np.unique(seconds)]
            row = {"policy": policy, "lag_s": lag or 0.0, "herd": float(np.mean(herds))}
            rows.append(row | {name: compare.value(name, one) for name in ("ttft_ms", "ttft_ms_p99", "e2e_ms")})
    return rows


def day(setting: Setting, args: argparse.Namespace) -> tuple[dict[str, Any], Played]:
    """24 hours, by the joint policy, on engines so slow that the busiest hour is busy."""
    rate = args.day_requests / traces.DAY_S
    slow = dataclasses.replace(setting, physics=setting.physics.times(0.6 * args.rate / rate))
    trace = traces.named("day", args.day_requests, rate, args.seed)
    began = time.process_time()
    one = run.play(trace, run.policy("joint", slow), slow)
    seconds = time.process_time() - began
    return {"day_cpu_s": seconds, "day_requests": len(trace), "day_hours": one.end_s / 3600}, one


def plot(shared: Plays, hot: Plays, stale_rows: list[dict], leaking: Plays, one_day: Played, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((hits, tails, spots), (lags, leaks, hours)) = pyplot.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, name in ((hits, "hit_rate"), (tails, "ttft_ms_p99")):
        bars = axis.barh(list(shared), [compare.value(name, one) for one in shared.values()], color=COLORS)
        axis.bar_label(bars, fmt="%.3g", fontsize=8, padding=2)
        axis.set(xlabel=NAMES[name], title=f"shared prefixes: {NAMES[name]}")
        axis.margins(x=0.14)
        axis.invert_yaxis()
    workers = len(next(iter(hot.values())).busy)
    for number, policy in enumerate(("prefix", "joint", "least_in_flight")):
        at = np.arange(workers) + 0.27 * (number - 1)
        spots.bar(at, 100 * shares(hot[policy], workers), 0.26, color=COLORS[number], label=policy)
    spots.set(xlabel="worker", ylabel="% of the requests", title="one prefix in most prompts: hot spots")
    for policy, color in zip(("least_in_flight", "power_of_two"), COLORS, strict=False):
        own = [row for row in stale_rows if row["policy"] == policy]
        lags.plot([r["lag_s"] for r in own], [r["ttft_ms_p99"] for r in own], "o-", color=color, label=policy)
    lags.set(xlabel="s between scrapes (0: own counts)", ylabel="TTFT p99 ms", yscale="log", title="old gauges: herds")
    for (policy, one), color in zip(leaking.items(), COLORS, strict=False):
        parts = np.array_split(one.worker == 0, 20)
        leaks.plot([100 * part.mean() for part in parts], "o-", color=color, label=policy)
    leaks.set(xlabel="twentieth of the trace", ylabel="% of requests to worker 0", title="worker 0's counter leaks")
    edges = np.arange(25) * 3600.0
    number = np.histogram(one_day.at_s, edges)[0]
    hours.bar(np.arange(24), number / 3600, color="#cccccc", label="requests/s")
    hours.set(xlabel="hour", ylabel="requests/s", title="a day, by the joint policy")
    right = hours.twinx()
    hour = np.minimum(one_day.at_s // 3600, 23)
    right.plot([np.percentile(one_day.ttft_s[hour == h], 99) for h in range(24)], "o-", color=COLORS[2])
    right.set_ylabel("TTFT p99 s", color=COLORS[2])
    right.set_ylim(0, None)
    for axis in (spots, lags, leaks):
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    out = script.start(__file__, args)
    config = Config("", num_blocks=args.blocks, max_num_seqs=32, max_num_batched_tokens=512)
    setting = Setting(Physics().times(args.slower), args.workers, config)
    options = {"resamples": args.resamples}
    result: dict[str, Any] = {"requests": args.requests, "workers": args.workers}

    shared = play("shared", list(POLICIES), setting, args)
    print(table("shared prefixes", shared, "round_robin", args))
    robin, joint = shared["round_robin"], shared["joint"]
    gain = compare.ratio("hit_rate", joint, robin, args.seed, **options)
    tail = compare.difference("ttft_ms_p99", joint, robin, args.seed, **options)
    print(f"joint / round robin, hit rate: {gain}; joint - round robin, TTFT p99: {tail} ms")
    result |= {"hit_rate_times": gain.value, "hit_rate_times_low": gain.low, "ttft_p99_ms_more": tail.value,
               "ttft_p99_ms_more_high": tail.high}  # fmt: skip
    best = compare.value("e2e_ms", run.oracle(shared.values()))
    result |= {f"{policy}_regret": compare.value("e2e_ms", one) / best - 1 for policy, one in shared.items()}

    weights = weigh(setting, args)
    print(f"\n{'a request is worth':<20}" + "".join(f"{name:>13}" for name in NAMES.values()))
    for row in weights:
        print(f"{row['weight']:>6} tokens".ljust(20) + "".join(f"{row[name]:>13.4g}" for name in NAMES))
    result["weights_e2e_ms"] = {str(row["weight"]): row["e2e_ms"] for row in weights}

    unshared = play("unshared", ["round_robin", "least_in_flight", "joint"], setting, args)
    print("\n" + table("nothing shared", unshared, "least_in_flight", args))
    for name, key in (("e2e_ms", "unshared_e2e_ratio"), ("ttft_ms_p99", "unshared_ttft_p99_ratio")):
        against = compare.ratio(name, unshared["joint"], unshared["least_in_flight"], args.seed, **options)
        print(f"joint / least in flight, {NAMES[name]}: {against}")
        result |= {key: against.value, f"{key}_high": against.high}

    hot = play("hot", ["prefix", "joint", "least_in_flight"], setting, args)
    print("\n" + table("one hot prefix", hot, "least_in_flight", args))
    for policy in ("prefix", "joint"):
        result[f"hot_{policy}_busiest"] = float(shares(hot[policy], args.workers).max() * args.workers)
    result["hot_ttft_p99_times"] = compare.value("ttft_ms_p99", hot["prefix"]) / compare.value(
        "ttft_ms_p99", hot["joint"]
    )
    print(f"the busiest worker's share, times an even one: prefix {result['hot_prefix_busiest']:.2f}, "
          f"joint {result['hot_joint_busiest']:.2f}")  # fmt: skip

    old = stale(setting, args)
    print(
        f"\n{'gauges every':<14}{'policy':<18}{'TTFT ms':>10}{'p99 ms':>10}{'E2E ms':>10}   to one worker in a second"
    )
    for row in old:
        when = f"{row['lag_s']:g} s" if row["lag_s"] else "own counts"
        figures = f"{row['ttft_ms']:>10.1f}{row['ttft_ms_p99']:>10.1f}{row['e2e_ms']:>10.1f}   {row['herd']:.0%}"
        print(f"{when:<14}{row['policy']:<18}{figures}")
    result["stale_ttft_p99_times"] = old[2]["ttft_ms_p99"] / old[0]["ttft_ms_p99"]

    leaky = dataclasses.replace(setting, leaks=(0, args.leak))
    trace = traces.named("shared", args.requests, args.rate, args.seed)
    leaking = {policy: run.play(trace, run.policy(policy, leaky), leaky) for policy in ("least_in_flight", "joint")}
    print(f"\na counter that forgets {args.leak:.0%} of what worker 0 has done:")
    for policy, one in leaking.items():
        more = compare.ratio("e2e_ms", one, shared[policy], args.seed, **options)
        last = float((one.worker[-len(trace) // 10 :] == 0).mean())
        print(f"{policy:<18}worker 0 gets {last:.1%} of the last tenth; E2E, times without the leak: {more}")
        result[f"leak_{policy}_last_share"] = last

    figures, one_day = day(setting, args)
    took = f"{figures['day_hours']:.1f} hours in {figures['day_cpu_s']:.1f} s of one core"
    print(f"\na day: {figures['day_requests']} requests, {took}")
    plot(shared, hot, old, leaking, one_day, out.path("simulate.png"))
    return result | figures


if __name__ == "__main__":
    script.run(main)
