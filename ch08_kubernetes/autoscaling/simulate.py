"""HPA or KEDA, on which metric, with which cold start: a night, a day and a burst in virtual time, by real formulas.

You learn   that utilisation cannot tell full from overfull, what a cold start costs a burst, and what zero saves
Laptop      python -m ch08_kubernetes.autoscaling.simulate
            python -m ch08_kubernetes.autoscaling.simulate --cold-start 20 --burst 12
GPU node    the same: it computes nothing
Cluster     the same, with your own engine's --slots and --service-s before you write the YAML
You see     for each policy and cold start: waiting times, the share that waited too long, GPU hours, pods started; PNG

The autoscalers are algorithms.py with the numbers of the manifests beside this file. Requests come as a Poisson process
and wait in one queue, first come first served; a pod that is ready serves `slots` at once, each for a time from an
exponential distribution: with a fixed number of pods this is M/M/c, whose waiting time is known (Erlang C).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from ch08_kubernetes.autoscaling.algorithms import HPA, KEDA, pods_desired, total_desired, value_desired
from ch08_kubernetes.cluster.rest import Json
from common import script

HERE = Path(__file__).parent
SYNC_S = 15.0  # of the controller, of KEDA's poll, and of Prometheus: each sees what the last scrape saw


@dataclass
class World:
    """Engines behind one queue. `now` in seconds; a pod is the time from which it is ready."""

    slots: int
    service_s: float
    cold_start_s: float
    rng: np.random.Generator
    now: float = 0.0
    pods: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)  # a heap of the times at which requests end
    waiting: deque[float] = field(default_factory=deque)
    waits_s: list[float] = field(default_factory=list)
    pod_seconds: float = 0.0
    started: int = 0

    @property
    def ready(self) -> int:
        return sum(at <= self.now for at in self.pods)

    def scale(self, desired: int) -> None:
        """New pods are ready after the cold start; those that go finish what they serve, the youngest first."""
        while len(self.pods) < desired:
            self.pods.append(self.now + self.cold_start_s)
            self.started += 1
        del self.pods[desired:]

    def serve(self) -> None:
        while self.waiting and len(self.running) < self.ready * self.slots:
            self.waits_s.append(self.now - self.waiting.popleft())
            heapq.heappush(self.running, self.now + self.rng.exponential(self.service_s))

    def advance(self, until: float) -> None:
        """Requests end and pods get ready, in their order, up to then."""
        while True:
            ends = self.running[0] if self.running else math.inf
            ready = min((at for at in self.pods if at > self.now), default=math.inf)
            at = min(ends, ready, until)
            self.pod_seconds += len(self.pods) * (at - self.now)
            self.now = at
            if ends == at:
                heapq.heappop(self.running)
            self.serve()
            if at == until and min(ends, ready) > until:
                return


Scaler = Callable[[float, World], int]


def manifest(name: str, kind: str) -> Json:
    found = yaml.safe_load_all((HERE / name).read_text(encoding="utf-8"))
    return next(body["spec"] for body in found if body["kind"] == kind)  # type: ignore[no-any-return]


def fixed(number: int) -> Scaler:
    return lambda now, world: number


def on_utilisation() -> Scaler:
    """hpa-resource.yaml's target, here of busy slots; at 100 % it cannot see how long the queue is."""
    spec = manifest("hpa-resource.yaml", "HorizontalPodAutoscaler")
    target = spec["metrics"][0]["containerResource"]["target"]["averageUtilization"]
    hpa = HPA.read(
        spec | {"minReplicas": 1, "behavior": manifest("hpa-custom.yaml", "HorizontalPodAutoscaler")["behavior"]}
    )

    def decide(now: float, world: World) -> int:
        busy = min(1.0, len(world.running) / max(1, world.ready * world.slots))
        metrics = {str(number): 100 * busy for number in range(world.ready)}
        current = len(world.pods)
        proposals = [pods_desired(current, metrics, target, unready=current - world.ready)] if metrics else []
        return hpa.decide(now, current, proposals)

    return decide


def on_queue() -> Scaler:
    """hpa-custom.yaml: waiting requests a pod, by the custom metrics API."""
    spec = manifest("hpa-custom.yaml", "HorizontalPodAutoscaler")
    target = float(spec["metrics"][0]["pods"]["target"]["averageValue"])
    hpa = HPA.read(spec)

    def decide(now: float, world: World) -> int:
        current = len(world.pods)
        metrics = {str(number): len(world.waiting) / world.ready for number in range(world.ready)}
        proposals = [pods_desired(current, metrics, target, unready=current - world.ready)] if metrics else []
        return hpa.decide(now, current, proposals)

    return decide


def by_keda(minimum: int | None = None) -> Scaler:
    """keda-prometheus.yaml: all waiting requests, and the share that is busy; with minimum 0 down to none."""
    spec = manifest("keda-prometheus.yaml", "ScaledObject")
    lowest = spec["minReplicaCount"] if minimum is None else minimum
    behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    hpa = HPA.read({"minReplicas": max(1, lowest), "maxReplicas": spec["maxReplicaCount"], "behavior": behavior})
    keda = KEDA(hpa, minimum=lowest, cooldown_s=spec["cooldownPeriod"])
    per_pod, level = (float(trigger["metadata"]["threshold"]) for trigger in spec["triggers"])

    def decide(now: float, world: World) -> int:
        current = keda.poll(now, len(world.pods), len(world.waiting) + len(world.running))
        if current == 0 or not world.pods:
            return current
        busy = len(world.running) / max(1, world.ready * world.slots)
        proposals = [
            total_desired(current, len(world.waiting), per_pod),
            value_desired(current, world.ready, busy, level),
        ]
        return hpa.decide(now, current, proposals)

    return decide


POLICIES: dict[str, Callable[[], Scaler]] = {
    "HPA on utilisation": on_utilisation,
    "HPA on the queue": on_queue,
    "KEDA": by_keda,
    "KEDA to zero": lambda: by_keda(0),
}


def arrivals(args: object, rng: np.random.Generator) -> np.ndarray:
    """A Poisson process: an hour of night, an hour of day with a burst of ten minutes, an hour of night without any."""
    a = args
    rates = [(0, 3600, a.night), (3600, 5400, a.day), (5400, 6000, a.burst), (6000, 7200, a.day)]  # type: ignore[attr-defined]
    return np.concatenate([np.sort(rng.uniform(t, u, rng.poisson(rate * (u - t)))) for t, u, rate in rates])


def play(times: np.ndarray, scaler: Scaler, world: World, first: int, end_s: float) -> list[tuple[float, int, int]]:
    """The trace to its end; (second, pods that are ready, requests that wait) at each sync."""
    world.pods = [0.0] * first
    rows: list[tuple[float, int, int]] = []
    number = 0
    for sync in np.arange(0.0, end_s + SYNC_S, SYNC_S):
        while number < len(times) and times[number] <= sync:
            world.advance(float(times[number]))
            world.waiting.append(world.now)
            world.serve()
            number += 1
        world.advance(float(sync))
        rows.append((world.now, world.ready, len(world.waiting)))
        world.scale(scaler(world.now, world))
    return rows


def erlang_c(servers: int, offered: float) -> float:
    """The probability that a request waits in M/M/c (Erlang 1917); offered = rate x service time < servers."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = offered * blocked / (number + offered * blocked)
    return blocked / (1 - offered / servers * (1 - blocked))


def draw(path: Path, played: dict[str, list[tuple[float, int, int]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for name, rows in played.items():
        minutes = [row[0] / 60 for row in rows]
        axes[0].step(minutes, [row[1] for row in rows], where="post", label=name)
        axes[1].plot(minutes, [row[2] for row in rows], label=name)
    axes[0].set(ylabel="pods that are ready")
    axes[1].set(ylabel="requests that wait", xlabel="minute", yscale="symlog", ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    for name, rate in (("night", 0.1), ("day", 3.0), ("burst", 10.0)):
        parser.add_argument(f"--{name}", type=script.positive, default=rate, help="requests/s")
    parser.add_argument("--slots", type=script.at_least(1), default=16, help="requests that a pod serves at once")
    parser.add_argument("--service-s", type=script.positive, default=8.0, help="s that one takes, on average")
    parser.add_argument(
        "--cold-start", type=script.comma_list(script.positive), default="45,300",
        help="s until a pod is ready: weights on a volume, weights from the hub",
    )  # fmt: skip
    parser.add_argument("--slo-s", type=script.positive, default=5.0, help="longest wait that is good")
    args = parser.parse_args(argv)
    run = script.start(__file__, args)
    end_s = 10_800.0
    peak = math.ceil(args.burst * args.service_s / args.slots / 0.8)
    result: dict[str, float] = {}
    print(f"{'policy':<20}{'cold s':>7}{'wait p50 s':>12}{'p99 s':>8}{'too long':>10}{'GPU hours':>11}{'started':>9}")
    played = {}
    for cold_start_s in args.cold_start:
        for name, make in {f"fixed, {peak}": lambda: fixed(peak), **POLICIES}.items():
            times = arrivals(args, np.random.default_rng(args.seed))
            rng = np.random.default_rng(args.seed + 1)
            world = World(args.slots, args.service_s, cold_start_s, rng)
            rows = play(times, make(), world, peak if name.startswith("fixed") else 1, end_s)
            if not world.waits_s:
                raise script.UserError("no request came in three hours; take a higher --night, --day or --burst")
            waits = np.array(world.waits_s)
            late = float((waits > args.slo_s).mean())
            hours = world.pod_seconds / 3600
            p50, p99 = np.percentile(waits, [50, 99])
            print(f"{name:<20}{cold_start_s:>7.0f}{p50:>12.1f}{p99:>8.1f}{late:>10.1%}{hours:>11.1f}{world.started:>9}")
            key = f"{name.split(',')[0].lower().replace(' ', '_')}_{cold_start_s:.0f}"
            result |= {f"{key}_late": late, f"{key}_gpu_hours": hours, f"{key}_unserved": len(times) - len(waits)}
            if cold_start_s == args.cold_start[0]:
                played[name] = rows
    draw(run.path("autoscaling.png"), played)
    return result | {"requests": len(times), "unserved": sum(v for k, v in result.items() if k.endswith("_unserved"))}


if __name__ == "__main__":
    script.run(main)
