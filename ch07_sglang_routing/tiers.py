"""Two tiers of replicas, a fast dear one and a slow cheap one: how long a request would take, and where it goes.

Pure functions and the counts that they need. What a step takes is the simulator's formula (simulator/physics.py,
Physics), measured on each replica by requests alone (simulator/live.py). The router keeps its own count of what is in
flight, as an engine's gauges lag, and plays the steps that are to come: continuous batching with chunked prefill, in a
step each running request gets a token, and prompts are computed in the order of their arrival as far as the step's
budget of tokens goes. (The simulator's Engine begins with a trace and knows blocks and caches; this begins with what is
in flight, and has some microseconds.) It fails where answers end before max_tokens, where others use the same engine or
its cores, and in what it cannot know: what arrives next. `hindsight` tells how much of its error that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ch06_vllm.engine.request import Config
from ch07_sglang_routing.simulator import engine as simulator
from ch07_sglang_routing.simulator.physics import Physics

INTERACTIVE, SHORT, BATCH = "interactive", "short", "batch"


@dataclass(eq=False)  # each is itself: two of the same lengths are not one
class Flight:
    """A request that was sent: tokens of its prompt and its answer, and how many of the answer have come."""

    prompt: int
    output: int
    came: int = 0


@dataclass
class Replica:
    """What a policy knows of one: its tier, its speed and limits, and what was sent there and has not ended, oldest
    first."""

    name: str
    tier: str
    physics: Physics
    config: Config
    flights: list[Flight] = field(default_factory=list)


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


def predict(physics: Physics, config: Config, flights: Sequence[Flight], prompt: int, output: int) -> Prediction:
    """Play the engine's steps until the new request has its last token.

    Where no prompt is computed nothing changes until a request ends: all those steps are taken at once. So the cost is
    in requests, not in tokens.
    """
    # of each: prompt tokens to compute, output tokens to come, tokens that are computed
    left = [[0, max(1, f.output - f.came), f.prompt + f.came] if f.came else [f.prompt, f.output, 0] for f in flights]
    own = [prompt, output, 0]
    left.append(own)
    time_s, first_s = physics.request_s, None
    while own[1]:
        running = left[: config.max_num_seqs]
        done = [one for one in running if not one[0]]
        decoding, context = len(done), sum(one[2] for one in done)
        budget, computed, pairs = config.max_num_batched_tokens - decoding, 0, 0.0
        for one in running:
            share = min(one[0], budget - computed)
            if share:
                computed += share
                pairs += share * (one[2] + (share + 1) / 2)
                one[0], one[2] = one[0] - share, one[2] + share
                if not one[0]:
                    done.append(one)  # a prompt's last share brings the first token
        steps = 1 if computed else min(one[1] for one in done)
        time_s += (
            physics.step(decoding, context, computed, pairs) if computed else physics.run(decoding, context, steps)
        )
        for one in done:
            one[1], one[2] = one[1] - steps, one[2] + steps
            if one is own and first_s is None:
                first_s = time_s
        left = [one for one in left if one[1]]
    assert first_s is not None
    return Prediction(first_s, time_s)


def hindsight(physics: Physics, config: Config, sent: Sequence[tuple[float, int, int]]) -> list[Prediction]:
    """The same of each of a replica's requests, (seconds, prompt, output) in their order, had one known them all."""
    first_s, last_s = [0.0] * len(sent), [0.0] * len(sent)
    blocks = sum(-(-(prompt + output) // config.block_size) for _, prompt, output in sent)
    roomy = dataclasses.replace(config, num_blocks=max(1, blocks), enable_prefix_caching=False)
    engine = simulator.Engine(physics, roomy, first_s.__setitem__, last_s.__setitem__)
    for index, (at_s, prompt, output) in enumerate(sent):
        while engine.wake_s <= at_s:
            engine.fire()
        engine.submit(simulator.Sequence(index, prompt, output, []), at_s)
    while engine.wake_s < simulator.IDLE:
        engine.fire()
    pairs = zip(first_s, last_s, sent, strict=True)
    return [
        Prediction(*(each - at_s + physics.request_s for each in (first, last))) for first, last, (at_s, *_) in pairs
    ]


def work_s(physics: Physics, ask: Ask, batch: int = 4) -> float:
    """What a request takes of a replica's time where `batch` run at once: they share each step's own time."""
    token_s = physics.step_s / batch + physics.decode_seq_s + physics.decode_context_s * (ask.prompt + ask.output / 2)
    prompt_s = physics.prefill_token_s * ask.prompt + physics.prefill_pair_s * ask.prompt * (ask.prompt + 1) / 2
    return prompt_s + ask.output * token_s


# ---------------------------------------------------------------- policies: which replica gets a request


def soonest(ask: Ask, replicas: Sequence[Replica]) -> tuple[Replica, Prediction]:
    """argmin of the predicted end: the one that has the least to do for its speed."""
    found = [(each, predict(each.physics, each.config, each.flights, ask.prompt, ask.output)) for each in replicas]
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


# ---------------------------------------------------------------- money


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
