"""How a strategy did in one setting: its errors, what they mean in words, and its bytes beside their formula."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
STEPS = 2


@dataclass(frozen=True)
class Case:
    """One setting to compare in. frozen and uneven are the two that hand-made loops forget."""

    ranks: int = 2
    accumulation: int = 1
    dtype: str = "float64"
    tied: bool = True
    frozen: bool = False  # some parameters get no gradient
    uneven: bool = False  # the last micro-batch is smaller and does not divide by the ranks
    by_hand: bool = True  # collectives from send and receive; False: the library's


@dataclass(frozen=True)
class Outcome:
    """How a strategy did in a case: errors relative to the reference, the largest over steps, ranks and parameters."""

    strategy: str
    case: Case
    skipped: str = ""  # why the case does not apply
    loss_error: float = 0.0
    gradient_error: float = 0.0
    norm_error: float = 0.0
    weight_error: float = 0.0
    worst: str = ""  # the parameter with the largest gradient error
    wrong: tuple[str, ...] = ()  # all with too large a one, in the first step that has any
    wrong_step: int = STEPS  # that step
    missing: tuple[str, ...] = ()  # gradients that a rank did not have in some step, of weights that it holds
    unheld: frozenset[str] = frozenset()  # parameters whose weights are on no rank
    factors: dict[str, float] = field(default_factory=dict)  # of the wrong ones: how many times the reference, if so
    wire_bytes: int = 0  # payload sent by all ranks by hand, a step
    wire_bytes_formula: int | None = None  # what the strategy's formula says; None: it has none, or nothing was counted

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.case.dtype]

    @property
    def failures(self) -> list[str]:
        """Which comparisons failed. NaN fails."""
        errors = {"loss": self.loss_error, "gradient": self.gradient_error, "norm": self.norm_error,
                  "weight": self.weight_error}  # fmt: skip
        return [name for name, error in errors.items() if not error <= self.tolerance] + ["missing"] * bool(
            self.missing
        )

    @property
    def ok(self) -> bool:
        return not self.skipped and not self.failures

    @property
    def bytes_exact(self) -> bool | None:
        """Are the counted bytes those of the formula? None where there is nothing to compare."""
        return None if self.wire_bytes_formula is None else self.wire_bytes == self.wire_bytes_formula

    def diagnosis(self) -> str:
        """What is wrong, in words: which parameters, and by what factor if it is one."""
        if self.skipped or self.ok:
            return self.skipped
        parts = []
        if self.missing:
            parts.append(f"no gradient for {_some(self.missing)}")
        if self.wrong:
            factors = {round(f, 4) for f in self.factors.values()}
            how = (
                f"{factors.pop():g} times too large"
                if len(factors) == 1 and len(self.factors) == len(self.wrong)
                else "wrong"
            )
            parts.append(f"gradient of {_some(self.wrong)} {how}")
        parts += [f"{name} off by {error:.1e}" for name, error in
                  (("loss", self.loss_error), ("grad-norm", self.norm_error), ("weights", self.weight_error))
                  if not error <= self.tolerance]  # fmt: skip
        return "; ".join(parts)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} parameters ({names[0]}, ...)"


def merge(parts: Sequence[Outcome]) -> Outcome:
    """One outcome from those of the ranks. Each parameter must be held by some rank."""
    worst = max(parts, key=lambda part: part.gradient_error if part.gradient_error == part.gradient_error else 9e99)
    unheld = frozenset.intersection(*(part.unheld for part in parts))
    missing = unheld.union(*(part.missing for part in parts))
    step = min(part.wrong_step for part in parts)
    first = [part for part in parts if part.wrong_step == step]
    return replace(
        worst,
        loss_error=worst_of([p.loss_error for p in parts]),
        gradient_error=worst_of([p.gradient_error for p in parts]),
        norm_error=worst_of([p.norm_error for p in parts]),
        weight_error=worst_of([p.weight_error for p in parts]),
        wrong=tuple(dict.fromkeys(itertools.chain(*(part.wrong for part in first)))),
        wrong_step=step,
        factors={name: f for part in first for name, f in part.factors.items()},
        missing=tuple(sorted(missing)),
        unheld=unheld,
        wire_bytes=sum(part.wire_bytes for part in parts),
    )


def worst_of(errors: Iterable[float]) -> float:
    """The largest, and NaN if there is one."""
    errors = list(errors)
    return next((e for e in errors if e != e), max(errors, default=0.0))
