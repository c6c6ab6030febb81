"""What communication costs: the bytes a collective must move, and its time as latency plus bytes over bandwidth.

A message of n bytes takes alpha + n beta seconds (Hockney, "The communication challenge for MPP: Intel Paragon and
Meiko CS-2", 1994). alpha is what an empty message costs, 1 / beta the bandwidth. A collective keeps that shape: alpha
then counts its rounds, beta its bytes.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ch01_intro.collectives import slowest_us

SIZES = tuple(2**n for n in (12, 16, 18, 20, 22))  # bytes: 4 KiB to 4 MiB


@dataclass(frozen=True)
class AlphaBeta:
    """Seconds for n bytes: alpha_s + n * beta_s_per_byte.

    off_percent: how far a fitted line is off at most, in percent of what was measured.
    """

    alpha_s: float
    beta_s_per_byte: float
    off_percent: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        return 1 / self.beta_s_per_byte if self.beta_s_per_byte else float("inf")

    def time_s(self, size: float) -> float:
        return self.alpha_s + size * self.beta_s_per_byte


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> AlphaBeta:
    """The alpha and beta >= 0 with the least squares of relative errors, so that small messages count as large ones.

    Args:
        sizes: message sizes in bytes, at least two different ones.
        seconds: the measured time of each.

    Raises:
        ValueError: fewer than two different sizes, or a time that is not positive.
    """
    n, t = np.asarray(sizes, dtype=float), np.asarray(seconds, dtype=float)
    if len(n) != len(t) or len(set(n.tolist())) < 2 or (t <= 0).any():
        raise ValueError("a fit needs positive times at two or more different sizes")
    rows = np.stack([1 / t, n / t], axis=1)  # alpha / t + beta n / t = 1
    candidates = [np.linalg.lstsq(rows, np.ones(len(t)), rcond=None)[0]]
    for only in (0, 1):  # at a bound: one of the two is 0
        one = np.zeros(2)
        one[only] = rows[:, only].sum() / (rows[:, only] ** 2).sum()
        candidates.append(one)
    allowed = [c for c in candidates if (c >= 0).all()]
    best = min(allowed, key=lambda c: float(((rows @ c - 1) ** 2).sum()))
    return AlphaBeta(float(best[0]), float(best[1]), 100 * float(np.abs(rows @ best - 1).max()))


def fit_all_reduce(device: torch.device, sizes: Sequence[int] = SIZES, *, budget_s: float = 0.5) -> AlphaBeta:
    """alpha and beta of an all_reduce over all ranks of this job, by the slowest rank's median time. On every rank.

    Args:
        device: where the messages are, and so whether NCCL or gloo carries them.
        sizes: bytes of the float32 messages, multiples of 4, at least two different ones.
        budget_s: about how many seconds to spend on each size, on 3 to 50 repeats.
    """
    seconds = []
    for size in sizes:
        once = functools.partial(torch.distributed.all_reduce, torch.zeros(size // 4, device=device))
        first = min(slowest_us(once, device, 2))  # the same on all ranks, and so are the repeats
        repeats = max(3, min(50, int(budget_s * 1e6 / first)))
        seconds.append(statistics.median(slowest_us(once, device, repeats)) / 1e6)
    return fit(sizes, seconds)


def bus_factor(collective: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth, as nccl-tests defines them (doc/PERFORMANCE.md there).

    Algorithm bandwidth is size / time, where size is that of the largest buffer of a rank: all_gather's output,
    reduce_scatter's input, the root's buffer of scatter and gather. The factor turns it into what each link carried,
    which can be compared with the hardware's rate whatever the number of ranks.

    Raises:
        KeyError: no such collective.
    """
    n = ranks
    return {
        "all_reduce": 2 * (n - 1) / n,
        "all_gather": (n - 1) / n,
        "reduce_scatter": (n - 1) / n,
        "all_to_all": (n - 1) / n,
        "scatter": (n - 1) / n,
        "gather": (n - 1) / n,
        "broadcast": 1.0,
        "reduce": 1.0,
        "send_recv": 1.0,
    }[collective]


def total_wire_bytes(collective: str, size: int, ranks: int) -> int:
    """Bytes that all ranks together send for one bandwidth-optimal collective on `size` bytes (as in bus_factor).

    Exact, also where the size does not divide by the ranks: each byte of an all_reduce is sent once by all but one rank
    to be summed, and once more by all but one rank on the way back (ring, or recursive halving and doubling).
    """
    n = ranks
    if collective == "all_reduce":
        return 2 * (n - 1) * size
    if collective in ("all_gather", "reduce_scatter", "broadcast", "reduce"):
        return (n - 1) * size
    if collective in ("scatter", "gather"):
        return (n - 1) * size // n
    if collective == "all_to_all":
        return (n - 1) * size
    return n * size  # send_recv: everybody sends once
