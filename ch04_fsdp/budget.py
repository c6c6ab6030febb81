"""The memory budget of a training step, from a model's config and a setting alone: what one rank holds in each phase.

    plan = budget(lm.config("8b"), Setting("full", ranks=8, dtype=torch.bfloat16, recompute="block"))
    plan.peak, plan.phase, plan.at_peak    ->  bytes, "loss", {"parameters": ..., "optimizer": ..., "temporaries": ...}

States alone do not tell whether a job fits: a sum of every component's own peak is too much, as they do not meet. So
walk.py walks through one step as torch runs it, with a ledger of what is allocated, and what is asked here is where
the ledger stood highest.

P parameters, N ranks that shard them, p bytes of a weight's type. Held between two steps:

    strategy                      parameters  gradients          optimizer      source
    replicate (DDP)               4 P         4 P in buckets     8 P            float32 weights, autocast
    full, grad, hybrid (FSDP2)    4 P / N     none               8 P / N        float32 shards, gathered in p bytes
    zero1                         p P         none               12 P / N       ZeRO's P_os, arXiv:1910.02054, 3.1
    zero2                         p P         none               12 P / N       P_os+g: gradients leave in buckets
    zero3                         p P / N     none               12 P / N       P_os+g+p

The 12 are Adam's two moments and a float32 copy of the weights, which in float32 itself is not needed (8). Gradients
come in backward: p P for zero1, p P / N for zero2 and zero3, 4 P / N for FSDP, and are dropped by zero_grad.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ch04_fsdp.setting import Setting
from ch04_fsdp.walk import Step


@dataclass(frozen=True)
class Budget:
    """One rank's memory, in bytes: of the pipeline stage that needs most."""

    phases: dict[str, int]  # the most in each phase, in the order of the step
    phase: str  # in which the peak lies
    at_peak: dict[str, int]  # what is held then, by kind
    between: dict[str, int]  # what is held between two steps
    host: int  # offloaded, per rank
    stage: int

    @property
    def peak(self) -> int:
        return self.phases[self.phase]


def budget(config: Any, setting: Setting) -> Budget:
    """The most that any rank allocates in a step after the first (which makes the optimizer's state).

    Raises:
        UserError: the model does not divide as the setting asks.
    """
    found = []
    for stage in {0, setting.pp // 2, setting.pp - 1}:
        step = Step(config, setting, stage)
        step.walk()
        ledger = step.ledger
        phase = max(ledger.peaks, key=lambda name: ledger.peaks[name][0])
        sizes = {name: size for name, (size, _) in ledger.peaks.items()}
        between = ledger.peaks["between steps"][1]
        found.append(Budget(sizes, phase, ledger.peaks[phase][1], between, step.host, stage))
    return max(found, key=lambda one: one.peak)
