"""What the autoscalers compute, as functions without a clock: the HPA's, KEDA's, and those of KEDA's ScaledJob.

Times are seconds of any clock that the caller keeps. Sources:

    HPA   Kubernetes documentation, Horizontal Pod Autoscaling: Algorithm details, Configurable scaling behavior;
          kubernetes/kubernetes, pkg/controller/podautoscaler: replica_calculator.go, horizontal.go
    KEDA  keda.sh documentation, Scaling Deployments and Scaling Jobs;
          kedacore/keda, pkg/scaling/executor: scale_scaledobjects.go, scale_jobs.go
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ch08_kubernetes.cluster.rest import Json

TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance
POLLING_INTERVAL_S, COOLDOWN_PERIOD_S = 30, 300  # KEDA's defaults


def within_tolerance(ratio: float, tolerance: float = TOLERANCE) -> bool:
    return abs(1 - ratio) <= tolerance


# desired = ceil(ready pods x metric / target), and the same number where metric / target is in 1 +- tolerance.
# Pods without a metric count as at their target when it is to be fewer, and as at 0 when it is to be more; as at 0 then
# also pods that are not ready yet. If that turns the direction around, nothing changes.
def pods_desired(
    current: int, metrics: Mapping[str, float], target: float, *, missing: int = 0, unready: int = 0,
    tolerance: float = TOLERANCE,
) -> int:  # fmt: skip
    """Replicas by a metric of pods: type Pods with an AverageValue, or Resource with utilisations in percent.

    Args:
        metrics: of pods that are ready, by name, in the unit of `target`.
        missing: pods that run and have no metric.
        unready: pods that are pending, or for CPU not yet ready. A custom metric is taken of every running pod.

    Raises:
        ValueError: no ready pod has a metric: the HPA then leaves the number as it is.
    """
    if not metrics:
        raise ValueError("no metric of any ready pod")
    ratio = sum(metrics.values()) / len(metrics) / target
    if not missing and not (unready and ratio > 1):
        return current if within_tolerance(ratio, tolerance) else math.ceil(_exact(ratio * len(metrics)))
    total, count = sum(metrics.values()), len(metrics) + missing
    if ratio < 1:
        total += missing * target
    if ratio > 1:
        count += unready
    careful = total / count / target
    if within_tolerance(careful, tolerance) or (ratio < 1) != (careful < 1):
        return current
    desired = math.ceil(_exact(careful * count))
    return current if (desired > current) != (careful > 1) else desired


# AverageValue of an External or Object metric: the ratio, for the tolerance, is metric / (target x replicas).
def total_desired(current: int, total: float, target: float, tolerance: float = TOLERANCE) -> int:
    """Replicas by one figure for all of them, such as a queue's length; `target` is one replica's share."""
    if current and within_tolerance(total / (target * current), tolerance):
        return current
    return math.ceil(_exact(total / target))


# Value of an External or Object metric: the figure does not get smaller by the number of pods that share it.
def value_desired(current: int, ready: int, value: float, target: float, tolerance: float = TOLERANCE) -> int:
    """Replicas by a figure that is a level, such as a cache's usage; `ready`: pods that are."""
    ratio = value / target
    if current == 0:
        return math.ceil(_exact(ratio))
    return current if within_tolerance(ratio, tolerance) else math.ceil(_exact(ratio * ready))


def _exact(value: float) -> float:
    """The controller counts in thousandths: 3.0000000000000004 replicas are 3."""
    return round(value, 9)


@dataclass(frozen=True)
class Policy:
    """At most `value` pods, or percent of the pods there were, within the last `period_s` seconds."""

    type: str  # Pods or Percent
    value: int
    period_s: float


@dataclass(frozen=True)
class Rules:
    """spec.behavior.scaleUp or .scaleDown. `select`: Max or Min, the policy that changes most or least."""

    window_s: float
    policies: Sequence[Policy]
    select: str = "Max"  # or Min, or Disabled

    @staticmethod
    def read(spec: Json | None, default: Rules) -> Rules:
        """From a manifest, where what is not said is as by default."""
        spec = spec or {}
        listed = [Policy(p["type"], p["value"], p["periodSeconds"]) for p in spec.get("policies") or []]
        return Rules(
            spec.get("stabilizationWindowSeconds", default.window_s),
            listed or default.policies,
            spec.get("selectPolicy", default.select),
        )


SCALE_UP = Rules(0, (Policy("Pods", 4, 15), Policy("Percent", 100, 15)))
SCALE_DOWN = Rules(300, (Policy("Percent", 100, 15),))


@dataclass
class HPA:
    """The controller's own memory of one HPA: recommendations for the windows, changes for the policies."""

    minimum: int
    maximum: int
    up: Rules = SCALE_UP
    down: Rules = SCALE_DOWN
    recommendations: list[tuple[float, int]] = field(default_factory=list)
    changes: list[tuple[float, int]] = field(default_factory=list)  # (when, replicas added or, negative, taken)

    @staticmethod
    def read(spec: Json) -> HPA:
        """From the spec of an HPA in autoscaling/v2."""
        behavior = spec.get("behavior") or {}
        up, down = Rules.read(behavior.get("scaleUp"), SCALE_UP), Rules.read(behavior.get("scaleDown"), SCALE_DOWN)
        return HPA(spec.get("minReplicas", 1), spec["maxReplicas"], up, down)

    def decide(self, now: float, current: int, proposals: Iterable[int]) -> int:
        """Replicas from now on: one sync of the controller. It takes the largest of what the metrics propose.

        Args:
            current: the target's spec.replicas.
            proposals: one for each metric, of the functions above; none if no metric could be had.
        """
        proposals = list(proposals)
        if not self.recommendations:
            self.recommendations.append((now, current))
        if current == 0 and self.minimum > 0:
            return 0  # switched off by hand, or by KEDA
        if not self.minimum <= current <= self.maximum:
            desired = min(max(current, self.minimum), self.maximum)
        elif proposals:
            desired = self.limited(now, current, self.stabilized(now, current, max(proposals)))
        else:
            desired = current
        if desired != current:
            self.changes.append((now, desired - current))
        longest = max(p.period_s for p in (*self.up.policies, *self.down.policies))
        self.changes = [change for change in self.changes if change[0] > now - longest]
        return desired

    # Up: not above the lowest recommendation of the window; down: not below the highest.
    def stabilized(self, now: float, current: int, recommended: int) -> int:
        """The recommendation that the stabilization windows leave, and it is remembered."""
        lowest = min([recommended, *(n for t, n in self.recommendations if t > now - self.up.window_s)])
        highest = max([recommended, *(n for t, n in self.recommendations if t > now - self.down.window_s)])
        longest = max(self.up.window_s, self.down.window_s)
        self.recommendations = [r for r in self.recommendations if r[0] > now - longest] + [(now, recommended)]
        return min(max(current, lowest), highest)

    # Each policy allows so much from the replicas there were at the start of its period.
    def limited(self, now: float, current: int, desired: int) -> int:
        """`desired` within the policies and the minimum and maximum."""
        if desired > current:
            desired = min(desired, max(current, self._limit(now, current, self.up, 1)), self.maximum)
        elif desired < current:
            desired = max(desired, min(current, self._limit(now, current, self.down, -1)), self.minimum)
        return min(max(desired, self.minimum), self.maximum)

    def _limit(self, now: float, current: int, rules: Rules, sign: int) -> int:
        if rules.select == "Disabled":
            return current
        limits = []
        for policy in rules.policies:
            start = current - sum(count for when, count in self.changes if when > now - policy.period_s)
            if policy.type == "Pods":
                limits.append(start + sign * policy.value)
            else:
                percent = start * (100 + sign * policy.value) / 100
                limits.append(math.ceil(percent) if sign > 0 else math.floor(percent))
        furthest = (rules.select == "Max") == (sign > 0)
        return max(limits) if furthest else min(limits)


@dataclass
class KEDA:
    """A ScaledObject's 0 <-> 1, which KEDA does itself at each poll; from 1 up it is the HPA that KEDA made.

    activation: active is a metric above it. The HPA's `target` (threshold) has nothing to do with that.
    """

    hpa: HPA
    activation: float = 0
    minimum: int = 0
    cooldown_s: float = COOLDOWN_PERIOD_S
    last_active: float = -math.inf

    # active and 0 replicas: max(1, minReplicaCount); inactive for longer than the cooldown and minReplicaCount 0: 0.
    def poll(self, now: float, current: int, metric: float) -> int:
        """Replicas after a poll, once in a pollingInterval."""
        if metric > self.activation:
            self.last_active = now
            return current or max(1, self.minimum)
        if current and self.minimum == 0:
            return 0 if now - self.last_active > self.cooldown_s else current
        return max(current, self.minimum)


# max scale = min(maxReplicaCount, ceil(queue / target)): of the running and pending jobs each strategy takes some away.
def jobs_to_start(
    queue: float, target: float, running: int, pending: int, maximum: int, strategy: str = "default"
) -> int:
    """Jobs that a ScaledJob adds at a poll.

    Args:
        queue: length of the list; `target`: items a job.
        running: jobs that have not ended, the pending ones included. pending: those whose pod does not run yet.
        strategy: default: the queue still holds what running jobs work on (it is locked, not taken off).
            accurate: running jobs have taken theirs off the queue. eager: fill every free slot that the queue needs.
    """
    scale = min(maximum, math.ceil(_exact(queue / target)))
    strategies: dict[str, Callable[[], int]] = {
        "default": lambda: scale - running,
        "accurate": lambda: maximum - running if scale + running > maximum else scale - pending,
        "eager": lambda: min(maximum - running - pending, scale),
    }
    return max(0, strategies[strategy]())
