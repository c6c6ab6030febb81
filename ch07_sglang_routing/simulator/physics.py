"""How long a step of an engine takes: a sum of five terms, and how it is added up over many steps at once."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Physics:
    """Seconds of a step: a sum of what it computes. The coefficients given here are about those that
    validate_simulator.py measured of the nano model on two cores of an AMD EPYC (2026-11-27); request_s is of servers.

    Args:
        step_s: of any step, whatever is in it.
        prefill_token_s: of each prompt token.
        prefill_pair_s: of each pair of a prompt token and a token before it that it attends to.
        decode_seq_s: of each request that gets one token.
        decode_context_s: of each token that such a request attends to.
        request_s: between the client and the queue, there and back; no part of a step.
    """

    step_s: float = 1.5e-3
    prefill_token_s: float = 56e-6
    prefill_pair_s: float = 140e-9
    decode_seq_s: float = 60e-6
    decode_context_s: float = 0.9e-6
    request_s: float = 4e-3

    def times(self, factor: float) -> Physics:
        """An engine that takes so many times as long."""
        return Physics(*(factor * seconds for seconds in astuple(self)))

    def step(self, singles: int, context: int, tokens: int, pairs: float) -> float:
        """Seconds of a step with `singles` requests that get one token each, attending to `context` tokens together,
        and `tokens` prompt tokens with so many `pairs`."""
        return (
            self.step_s
            + self.prefill_token_s * tokens
            + self.prefill_pair_s * pairs
            + self.decode_seq_s * singles
            + self.decode_context_s * context
        )

    def run(self, singles: int, context: int, steps: int) -> float:
        """Seconds of so many steps that only decode; each adds a token to every context."""
        first = self.step(singles, context, 0, 0)
        return steps * first + self.decode_context_s * singles * steps * (steps - 1) / 2

    def steps_until(self, singles: int, context: int, seconds: float) -> int:
        """The fewest such steps, one at least, that take as long as this."""
        first = self.step(singles, context, 0, 0)
        growth = self.decode_context_s * singles / 2
        if growth > 0:
            slope = first - growth
            steps = math.ceil((math.sqrt(slope * slope + 4 * growth * seconds) - slope) / (2 * growth))
        else:
            steps = math.ceil(seconds / first)
        steps = max(1, steps)
        while steps > 1 and self.run(singles, context, steps - 1) >= seconds:
            steps -= 1
        while self.run(singles, context, steps) < seconds:
            steps += 1
        return steps
