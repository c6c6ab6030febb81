"""What a difference between two policies on one trace is worth: intervals by a paired block bootstrap, and regret.

Both policies answered the same requests, so most of what makes latencies differ (long answers, bursts) is in both and
cancels in the difference. What remains is not independent from request to request: a queue makes neighbours slow
together, and one routing decision changes the caches for all that follow. So whole blocks of consecutive arrivals are
drawn with replacement, the same ones for both policies (Künsch 1989). That works for any statistic, also for a
percentile or a ratio of sums, where a t-interval of batch means does not. Blocks must be longer than a queue's memory:
40 of 12,000 requests hold 300 each, four seconds of the default trace.

Percentiles of so few blocks are narrow by what a normal interval is to Student's: they are taken farther out, so that
for a mean they are his (Hesterberg 2015, "expanded percentiles").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ch07_sglang_routing.simulator.run import Played

BLOCKS = 40
Statistic = Callable[[Played, np.ndarray], float]

STATISTICS: dict[str, Statistic] = {  # of the requests with these indices
    "hit_rate": lambda played, at: float(played.cached[at].sum() / played.prompt[at].sum()),
    "ttft_ms": lambda played, at: float(played.ttft_s[at].mean()) * 1e3,
    "ttft_ms_p99": lambda played, at: float(np.percentile(played.ttft_s[at], 99)) * 1e3,
    "e2e_ms": lambda played, at: float(played.e2e_s[at].mean()) * 1e3,
}


@dataclass(frozen=True)
class Interval:
    """An estimate from all requests, and a 95 % interval; where a queue remembers a fifth of a block it holds the truth
    in 92 %, as blocks' edges cut neighbours apart."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def as_list(self) -> list[float]:
        return [self.value, self.low, self.high]


def students(freedom: int) -> float:
    """The 97.5th percentile of Student's distribution, to 0.2 % from 10 degrees of freedom on (Abramowitz 26.7.5)."""
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, seed: int, *, blocks: int = BLOCKS, resamples: int = 400
) -> Interval:
    """`statistic` of the indices 0 … n - 1, and a 95 % interval from it over resampled blocks of them."""
    rng = np.random.default_rng(seed)
    parts = np.array_split(np.arange(n), min(blocks, n))
    drawn = [
        statistic(np.concatenate([parts[i] for i in rng.integers(len(parts), size=len(parts))]))
        for _ in range(resamples)
    ]
    tail = 100 * NormalDist().cdf(-math.sqrt(len(parts) / (len(parts) - 1)) * students(len(parts) - 1))
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(statistic(np.arange(n)), float(low), float(high))


def difference(name: str, one: Played, other: Played, seed: int = 0, **options: int) -> Interval:
    """one - other in a statistic."""
    of = STATISTICS[name]
    return bootstrap(lambda at: of(one, at) - of(other, at), len(one.at_s), seed, **options)


def ratio(name: str, one: Played, other: Played, seed: int = 0, **options: int) -> Interval:
    """one / other in a statistic."""
    of = STATISTICS[name]
    return bootstrap(lambda at: of(one, at) / of(other, at), len(one.at_s), seed, **options)


def value(name: str, played: Played) -> float:
    return STATISTICS[name](played, np.arange(len(played.at_s)))
