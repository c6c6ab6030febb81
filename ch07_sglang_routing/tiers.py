"""Two tiers of replicas, a fast dear one and a slow cheap one: how long a request would take, and where it goes.

Pure functions and the counts that they need. The model of an engine is one line, a step's time:

    step = base_s + sequence_s x (running requests) + prefill_s x (prompt tokens computed in it)

Continuous batching with chunked prefill: in a step each running request gets a token, and prompts are computed in the
order of their arrival as far as the step's budget of tokens goes. Three rates are calibrated by requests alone, the
router keeps its own count of what is in flight (an engine's gauges lag), and the rest is arithmetic. It fails where a
step is not linear (a GPU's steps hardly grow with few sequences, a long context costs more), where answers end before
max_tokens, and where others use the same engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

INTERACTIVE, SHORT, BATCH = "interactive", "short", "batch"


@dataclass(frozen=True)
class Speed:
    """Of one replica. overhead_s: of a request, outside the engine. max_seqs, max_tokens: of a step, as the engine's
    max_num_seqs and max_num_batched_tokens."""

    base_s: float
    sequence_s: float
    prefill_s: float
    overhead_s: float = 0.0
    max_seqs: int = 256
    max_tokens: int = 2048


@dataclass(eq=False)  # each is itself: two of the same lengths are not one
class Flight:
    """A request that was sent: prompt tokens not computed yet (0 from its first token on), and tokens not come yet."""

    prompt_left: int
    output_left: int


@dataclass
class Drift:
    """Measured over predicted, of late: exp of a moving average of its logarithm (one in five weighs the newest).

    The prediction knows what is in flight, not what comes after: a later prompt stalls this one's decoding. How much,
    depends on the load, and the last answers tell. It fails when the load changes faster than answers end.
    """

    ttft: float = 0.0
    e2e: float = 0.0

    def see(self, predicted: Prediction, ttft_s: float, e2e_s: float) -> None:
        self.ttft += 0.2 * (math.log(ttft_s / predicted.ttft_s) - self.ttft)
        self.e2e += 0.2 * (math.log(e2e_s / predicted.e2e_s) - self.e2e)

    def correct(self, predicted: Prediction) -> Prediction:
        return Prediction(predicted.ttft_s * math.exp(self.ttft), predicted.e2e_s * math.exp(self.e2e))


@dataclass
class Replica:
    """What a policy knows of one: its tier, its speed, and what was sent there and has not ended, oldest first."""

    name: str
    tier: str
    speed: Speed
    flights: list[Flight] = field(default_factory=list)
    drift: Drift = field(default_factory=lambda: Drift())


@dataclass(frozen=True)
class Ask:
    """A request: its class and lengths. ttft_s and e2e_s are its objective, infinite where it has none."""

    kind: str
    prompt: int
    output: int
    ttft_s: float = float("inf")
    e2e_s: float = float("inf")


@dataclass(frozen=True)
class Prediction:
    """Seconds from sending."""

    ttft_s: float
    e2e_s: float

    def meets(self, ask: Ask) -> bool:
        return self.ttft_s <= ask.ttft_s and self.e2e_s <= ask.e2e_s


def predict(speed: Speed, flights: Sequence[Flight], prompt: int, output: int) -> Prediction:
    """Play the engine's steps until the new request has its last token.

    Where no prompt is computed nothing changes until a request ends: all those steps are taken at once. So the cost is
    in requests, not in tokens.
    """
    left = [[flight.prompt_left, flight.output_left] for flight in flights] + [[prompt, output]]
    own, time_s, first_s = left[-1], speed.overhead_s, None
    while own[1]:
        running = left[: speed.max_seqs]
        decoding = [one for one in running if not one[0]]
        budget, computed, done = speed.max_tokens - len(decoding), 0, list(decoding)
        for one in running:
            if one[0]:
                share = min(one[0], budget - computed)
                computed += share
                one[0] -= share
                if not one[0]:
                    done.append(one)  # a prompt's last share brings the first token
        steps = 1 if computed else min(one[1] for one in decoding)
        time_s += steps * (speed.base_s + speed.sequence_s * len(decoding) + speed.prefill_s * computed)
        for one in done:
            one[1] -= steps
            if one is own and first_s is None:
                first_s = time_s
        left = [one for one in left if one[1] > 0]
    assert first_s is not None
    return Prediction(first_s, time_s)


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Probe:
    """`batch` requests of the same lengths, sent together to an idle replica: medians of their TTFT and their E2E."""

    batch: int
    prompt: int
    output: int
    ttft_s: float
    e2e_s: float


def fit(probes: Sequence[Probe], max_seqs: int = 256, max_tokens: int = 2048) -> Speed:
    """Rates from probes, each not below 0.

    Decode: (E2E - TTFT) / (output - 1) is a step's time, a line over the batch. Prefill: the TTFT of one request alone
    is a line over its prompt; what it has at 0 beyond one step is the overhead. (Of several, one is computed first.)
    """
    decode = [(p.batch, (p.e2e_s - p.ttft_s) / (p.output - 1)) for p in probes if p.output > 1]
    sequence_s, base_s = _line(decode)
    prefill_s, at_zero_s = _line([(p.prompt, p.ttft_s) for p in probes if p.batch == 1])
    return Speed(base_s, sequence_s, prefill_s, max(0.0, at_zero_s - base_s), max_seqs, max_tokens)


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept of least squares, neither below 0."""
    x, y = np.array(points, dtype=float).T
    spread = x - x.mean()
    slope = max(0.0, float(spread @ (y - y.mean()) / (spread @ spread)))
    return slope, max(0.0, float(y.mean() - slope * x.mean()))


def work_s(speed: Speed, ask: Ask, batch: int = 4) -> float:
    """What a request takes of a replica's time where `batch` run at once: they share each step's base."""
    steps = ask.output * (speed.base_s / batch + speed.sequence_s)
    return ask.prompt * speed.prefill_s + steps


# ---------------------------------------------------------------- policies: which replica gets a request


def soonest(ask: Ask, replicas: Sequence[Replica]) -> tuple[Replica, Prediction]:
    """argmin of the predicted end: the one that has the least to do for its speed."""
    found = [(each, each.drift.correct(predict(each.speed, each.flights, ask.prompt, ask.output))) for each in replicas]
    return min(found, key=lambda pair: pair[1].e2e_s)


def _of(tier: str, replicas: Sequence[Replica]) -> list[Replica]:
    return [replica for replica in replicas if replica.tier == tier]


# Everything on one tier: the two ends that the others are measured against.
def all_gpu(ask: Ask, replicas: Sequence[Replica]) -> tuple[Replica, Prediction]:
    return soonest(ask, _of("gpu", replicas))


def all_cpu(ask: Ask, replicas: Sequence[Replica]) -> tuple[Replica, Prediction]:
    return soonest(ask, _of("cpu", replicas))


# By class: who waits at a screen gets the GPU; short answers and batches, the CPU.
# Fails  when the mix is not the one that the tiers were sized for: one tier queues while the other idles.
def by_class(ask: Ask, replicas: Sequence[Replica]) -> tuple[Replica, Prediction]:
    return soonest(ask, _of("gpu" if ask.kind == INTERACTIVE else "cpu", replicas))


# By class, with spill-over: where the tier at home is predicted to miss the objective and the other to meet it, the
# other. Where both would miss it stays at home: it would only add to the other's queue.
# Fails  when the prediction does (then it is by_class, or a coin); and a batch that spills takes from the interactive
#        ones that come right after it, of which nobody knows yet.
def with_spill(ask: Ask, replicas: Sequence[Replica]) -> tuple[Replica, Prediction]:
    home, at_home = by_class(ask, replicas)
    others = [replica for replica in replicas if replica.tier != home.tier]
    if at_home.meets(ask) or not others:
        return home, at_home
    other, there = soonest(ask, others)
    return (other, there) if there.meets(ask) else (home, at_home)


Policy = Callable[[Ask, Sequence[Replica]], tuple[Replica, Prediction]]
POLICIES: dict[str, Policy] = {"all-gpu": all_gpu, "all-cpu": all_cpu, "by-class": by_class, "spill": with_spill}


# ---------------------------------------------------------------- money, and how sure


def usd_per_mtok(usd_per_h: float, seconds: float, tokens: int) -> float:
    """Dollars per million tokens, prompts and answers together, of machines that cost so much an hour."""
    return usd_per_h / 3600 * seconds / tokens * 1e6 if tokens else float("nan")


def busy_s(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans (begin, end): how long a replica had something in flight."""
    return sum(end - begin for begin, end in _joined(spans))


def _joined(spans: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    current: tuple[float, float] | None = None
    for begin, end in sorted(spans):
        if current is None or begin > current[1]:
            if current:
                yield current
            current = begin, end
        else:
            current = current[0], max(current[1], end)
    if current:
        yield current


def paired(
    first: Sequence[float], second: Sequence[float], seed: int = 0, draws: int = 2000
) -> tuple[float, float, float]:
    """Mean of second - first over the same requests, and its 95 % interval by the bootstrap (Efron 1979)."""
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    rng = np.random.default_rng(seed)
    means = differences[rng.integers(len(differences), size=(draws, len(differences)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(differences.mean()), float(low), float(high)
