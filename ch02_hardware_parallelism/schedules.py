"""Pipeline schedules: which stage computes what, in which order. Pure functions; the messages follow from them.

Huang et al., "GPipe" (arXiv:1811.06965); 1f1b is PipeDream-Flush in Narayanan et al. (arXiv:2006.09503).
"""

from __future__ import annotations

import itertools

Op = tuple[str, int]  # ("forward" or "backward", chunk)


def schedule(kind: str, stage: int, stages: int, chunks: int) -> list[Op]:
    """What `stage` computes, in order. All messages follow from it.

    gpipe: all forwards, then all backwards. 1f1b: as many forwards as there are stages behind this one, then one
    forward and one backward in turn: each backward frees an activation before the next forward needs room.
    """
    forwards = [("forward", chunk) for chunk in range(chunks)]
    backwards = [("backward", chunk) for chunk in range(chunks)]
    ahead = chunks if kind == "gpipe" else min(stages - 1 - stage, chunks)
    in_turn = itertools.chain(*zip(forwards[ahead:], backwards, strict=False))
    return [*forwards[:ahead], *in_turn, *backwards[chunks - ahead :]]


def peak_live(order: list[Op]) -> int:
    """The most chunks that are past their forward and before the end of their backward: activations in memory."""
    return max(itertools.accumulate(1 if kind == "forward" else -1 for kind, _ in order))


def bubble_formula(stages: int, chunks: int) -> float:
    """Idle share of all stages' time, if all chunks take the same time everywhere and messages none.

    The same for both schedules: 1f1b saves memory, not time. More chunks make it smaller.
    """
    return (stages - 1) / (chunks + stages - 1)
