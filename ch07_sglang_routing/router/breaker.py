"""A circuit breaker: after some failures in a row a worker gets no requests for a while, then one, to try.

closed     requests go through; `threshold` failures in a row open it
open       none go through, for  uniform(1/2, 1) x min(cap, base x 2^(times it opened in a row - 1))  seconds
half-open  one goes through: if it succeeds, closed again; if it fails, open for longer

Not a health check: that asks whether a worker is there, this whether its answers are any good. Both must say yes.
Fails  where one client's request breaks every worker that gets it: five such in a row and all are out. So few retries.
"""

from __future__ import annotations

import random
from collections.abc import Callable


class Breaker:
    """now: seconds of a clock that does not jump. rng: for the jitter, without which all routers try again together."""

    def __init__(
        self,
        now: Callable[[], float],
        *,
        threshold: int = 5,
        base_s: float = 1.0,
        cap_s: float = 30.0,
        rng: random.Random | None = None,
    ) -> None:
        self.threshold, self.base_s, self.cap_s = threshold, base_s, cap_s
        self._now, self._rng = now, rng or random.Random()
        self.failures = 0  # in a row
        self._opened = 0  # times in a row
        self._until: float | None = None  # open until then
        self._trying = False
        self._epoch = 0  # grows when it opens and when a trial begins: verdicts on what began before no longer count

    @property
    def state(self) -> str:
        if self._until is None:
            return "closed"
        return "open" if self._trying or self._now() < self._until else "half-open"

    def allows(self) -> bool:
        """Whether a request may go there now. In a half-open state it is one, which begins with `begin`."""
        return self._until is None or (not self._trying and self._now() >= self._until)

    def begin(self) -> int:
        """A request is sent; what its verdict must hand back."""
        if self._until is not None:
            self._trying = True
            self._epoch += 1
        return self._epoch

    def succeeded(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self.failures = self._opened = 0
        self._until, self._trying = None, False

    def failed(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        self.failures += 1
        if self._trying or (self._until is None and self.failures >= self.threshold):
            self._opened += 1
            wait_s = min(self.cap_s, self.base_s * 2 ** min(self._opened - 1, 30))
            self._until, self._trying = self._now() + self._rng.uniform(wait_s / 2, wait_s), False
            self._epoch += 1

    def given_up(self, epoch: int) -> None:
        """A request ended with no verdict on the worker: its client left. The next may try."""
        if epoch == self._epoch:
            self._trying = False
