"""What is asked and when: sessions of several turns behind shared system prompts, even, in bursts or by the day.

A session is one conversation: each turn's prompt is all that was said before it and something new. Its first
`system_tokens` are one of `systems` texts, drawn by Zipf's law: a few are in most prompts. Arrivals are fixed before
anything is routed, so that all policies meet the same requests at the same moments (common random numbers); a user
who waits for an answer before going on is not in it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ch06_vllm import load

BITS = 24  # a text has at most 2**24 tokens; its tokens are numbered from (its number << BITS) on
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request. Its prompt begins with `shared` tokens of text `system`, the rest is of text `own`.

    Every token of every text has a number of its own: prompts share what has equal numbers. `rank` is the request's
    luck, uniform in [0, 1), for policies that draw.
    """

    at_s: float
    session: str
    system: int
    shared: int
    own: int
    prompt: int
    output: int
    rank: float

    def tokens(self) -> array[int]:
        """The prompt, as these numbers."""
        first, own = self.system << BITS, self.own << BITS
        found = array("q")
        for begin, end in ((first, first + self.shared), (own, own + self.prompt - self.shared)):
            found.frombytes(np.arange(begin, end, dtype=np.int64).tobytes())
        return found

    def hashes(self, index: int, size: int, *, recur: bool = True) -> list[int]:
        """A name for the content of each full block of the prompt and of the answer: its last token's number.

        recur: the answer is what the session's next prompt goes on with. Else only request `index` has its blocks:
        so it is where a real engine's answers are not those of the trace.
        """
        first, own = self.system << BITS, self.own << BITS
        full = self.shared // size
        begin, end = own + (full + 1) * size - 1 - self.shared, own + self.prompt - self.shared
        names = list(range(first + size - 1, first + self.shared, size))
        if recur:
            return names + list(range(begin, end + self.output, size))
        names += range(begin, end, size)
        answer = -1 - (index << BITS)
        names += range(answer, answer - ((self.prompt + self.output) // size - len(names)), -1)
        return names


Trace = Sequence[Asked]


def sessions(
    requests: int,
    rate: float,
    rng: np.random.Generator,
    *,
    systems: int = 0,
    zipf: float = 1.0,
    system_tokens: int = 256,
    turns: float = 1.0,
    think_s: float = 20.0,
    new_tokens: str = "lognormal:48,0.6",
    output_tokens: str = "lognormal:48,0.6",
    longest: int = 1024,
    burstiness: float = 1.0,
    daily: float = 0.0,
) -> list[Asked]:
    """
    Args:
        rate: requests/s, on average.
        systems: system prompts of `system_tokens` tokens each; 0: none, each session begins with words of its own.
        zipf: the k-th most frequent of them is asked for in proportion to k**-zipf.
        turns: of a session, on average (geometric); 1: nothing is asked twice.
        think_s: between a session's turns, on average (exponential).
        new_tokens, output_tokens: of each turn; ch06_vllm.load.lengths says how they are written.
        longest: tokens of prompt and answer together, at most: a conversation ends before that.
        burstiness: of the sessions' arrivals; 1 is Poisson, less comes in bursts (ch06_vllm.load.arrivals).
        daily: 0.6 is a day whose busiest moment has 1.6 times the average rate and whose quietest 0.4 times.
    """
    asks, answers = load.lengths(new_tokens), load.lengths(output_tokens)
    head = system_tokens if systems else 0
    weights = np.arange(1, systems + 1) ** -zipf if systems else np.ones(1)
    number = math.ceil(requests / turns * 1.2) + 8  # the last sessions' turns come after the trace's end
    begins = load.arrivals(rate / turns, number, rng, burstiness)
    of = rng.choice(max(1, systems), number, p=weights / weights.sum())
    counts = rng.geometric(1 / turns, number)
    total = int(counts.sum())
    new, output = asks(rng, total), answers(rng, total)
    thinks = rng.exponential(think_s, total)
    found, at = [], 0
    for session, (begin_s, system, count) in enumerate(zip(begins.tolist(), of.tolist(), counts.tolist(), strict=True)):
        prompt, at_s, own = head, begin_s, systems + session
        for turn in range(at, at + count):
            answer = min(int(output[turn]), longest // 2)
            prompt += min(int(new[turn]), max(1, longest - answer - head))
            if prompt + answer > longest:
                break
            found.append((at_s, session, system, own, prompt, answer))
            prompt += answer
            at_s += float(thinks[turn])
        at += count
    found.sort()
    found = found[:requests]
    times = np.array([row[0] for row in found])
    times = _by_day(times * (len(found) / rate / times[-1]), daily)  # conversations cut short must not lower the rate
    ranks = rng.random(len(found)).tolist()
    return [
        Asked(at_s, f"session-{session}", system, head, own, prompt, answer, rank)
        for (_, session, system, own, prompt, answer), at_s, rank in zip(found, times.tolist(), ranks, strict=True)
    ]


def _by_day(times: np.ndarray, daily: float) -> np.ndarray:
    """The same arrivals at a rate of 1 - daily x cos: least at the trace's start and end, most in its middle."""
    if not daily:
        return times
    end = times[-1]
    clock = np.linspace(0, end, 4097)
    passed = clock - daily * end / (2 * math.pi) * np.sin(2 * math.pi * clock / end)  # the integral of 1 - daily x cos
    return np.interp(times, passed, clock)


SHORT = {"new_tokens": "lognormal:32,0.6", "output_tokens": "lognormal:32,0.6", "longest": 1536}
SHARED = SHORT | {"systems": 96, "zipf": 0.8, "system_tokens": 512, "turns": 3.0}
# Traces by name: options of `sessions`.
TRACES: dict[str, dict] = {
    # 96 assistants, together six times what one worker's cache holds beside what runs; conversations of three turns.
    "shared": SHARED,
    # As many tokens to compute for a request as a miss costs there, and nothing is asked twice.
    "unshared": SHORT | {"new_tokens": "lognormal:160,0.6"},
    # One assistant is in most prompts.
    "hot": SHARED | {"zipf": 2.0},
    "bursty": SHARED | {"burstiness": 0.2},
    "day": SHARED | {"daily": 0.6, "think_s": 120.0},
}


def named(name: str, requests: int, rate: float, seed: int) -> list[Asked]:
    return sessions(requests, rate, np.random.default_rng((seed, list(TRACES).index(name))), **TRACES[name])
