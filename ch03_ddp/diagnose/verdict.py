"""From what every rank says of itself to who is at fault, and for what. Pure: no process group, no clock, no store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ch03_ddp.diagnose.recorder import Call
from common.dist import compress
from common.script import UserError

HINTS = {
    "deadlock": "every rank must make the same calls: look for a branch that depends on the rank or on its data",
    "order": "all ranks must make the same calls in the same order",
    "shape": "give all ranks the same shape and dtype: pad, or exchange the sizes first",
    "uneven": "give all ranks equally many batches (drop the last ones), or wrap the loop in torch's Join",
    "death": "look at its own log and at dmesg (the out-of-memory killer leaves no other word)",
    "error": "look at its own traceback",
    "unused": "use every parameter on every rank, or pass find_unused_parameters=True",
    "inplace": "change gradients after backward, when all buckets have arrived, or inside a communication hook",
    "desync": "start all ranks from the same weights and update them alike; find the first step where it happens",
    "slow": "look at that rank's data, CPU, clock rate and temperature",
    "network": "it is the network: NCCL_DEBUG=INFO, the interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), the links",
}


@dataclass(frozen=True)
class Verdict:
    """cause: a key of HINTS. ranks: those at fault."""

    cause: str
    ranks: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.text}; {HINTS[self.cause]}"

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Verdict:
        value = json.loads(text)
        return Verdict(value["cause"], tuple(value["ranks"]), value["text"])


class Fault(UserError):
    """Raised out of a watched block, on every rank that can still raise: the verdict is the same on all of them."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(str(verdict))
        self.verdict = verdict


@dataclass
class Report:
    """What one rank says of itself when the alarm goes.

    state: "inside" the watched block, "left" it, "raised" out of it, or "terminated" by a SIGTERM.
    """

    rank: int
    state: str = "inside"
    where: str = ""  # the line that its main thread is in
    error: str = ""  # its own exception; not one that only says that others are gone
    calls: list[Call] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    without_gradient: list[str] = field(default_factory=list)  # parameters, once its backward has ended

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Report:
        value: dict[str, Any] = json.loads(text)
        calls = [Call.from_dict(call) for call in value.pop("calls")]
        return Report(**value, calls=calls)


def judge(reports: dict[int, Report], gone: dict[int, str]) -> Verdict | None:
    """Who holds up the job, and how; None where nobody does.

    Args:
        reports: of the ranks that answered.
        gone: those that did not -> why, as in "its process 4711 ended".
    """
    if found := _unused(reports):
        return found
    for rank, report in reports.items():
        if report.error:
            return Verdict("error", (rank,), f"rank {rank} left with {report.error}{_waiting(reports, but=[rank])}")
    if gone:
        ranks = tuple(sorted(gone))
        why = " and ".join(dict.fromkeys(gone.values()))
        text = f"{name(ranks)} {'is' if len(ranks) == 1 else 'are'} gone ({why}){_waiting(reports)}"
        return Verdict("death", ranks, text)
    if any(report.state == "terminated" for report in reports.values()):
        return None  # by whoever ends the job: no fault of anybody's
    names = dict.fromkeys(group for report in reports.values() for group in report.groups)
    absences, free = [], []
    for group in names:
        if found := _mismatch(group, reports):
            return found
        if found := _absent(group, reports):
            absences.append(found)
            if not any(call.group != group for rank in found.ranks for call in _pending(reports[rank])):
                free.append(found)
    if free:  # who waits in a call of another group cannot come to this one: the cause is with those that do not
        return free[0]
    if len(absences) > 1:
        ranks = sorted({rank for found in absences for rank in found.ranks})
        return Verdict("order", tuple(ranks), " and ".join(found.text for found in absences))
    if absences:
        return absences[0]
    if stuck := [call for report in reports.values() for call in _pending(report)]:
        return Verdict("network", tuple(reports), f"all ranks are in {stuck[0].what}, and it does not end")
    inside = [rank for rank, report in reports.items() if report.state == "inside"]
    if inside and len(inside) < len(reports):
        text = (
            f"{name(inside)} does not reach the end of the watched block, where the others wait; "
            f"rank {inside[0]} is at {reports[inside[0]].where}"
        )
        return Verdict("deadlock", tuple(inside), text)
    return None


def name(ranks: Iterable[int]) -> str:
    """rank 1; ranks 0, 2-3."""
    listed = sorted(ranks)
    return f"rank{'s' if len(listed) != 1 else ''} {compress(listed)}"


def minority(values: dict[int, Any]) -> tuple[Any, list[int]]:
    """The value that most ranks have, and the ranks with another one. Of two equally common ones rank 0's counts."""
    counts = Counter(values.values())
    usual = max(counts, key=lambda value: (counts[value], value == values[min(values)]))
    return usual, [rank for rank, value in values.items() if value != usual]


def compare(at: dict[int, Call]) -> Verdict | None:
    """The ranks' calls of one number in one group: is it the same call on all of them?"""
    usual, odd = minority({rank: call.signature for rank, call in at.items()})
    if not odd:
        return None
    one = at[odd[0]]
    others = [rank for rank, call in at.items() if call.signature == usual]
    other = at[others[0]]
    if one.op != other.op:
        return Verdict("order", tuple(odd), f"{name(odd)} called {one.what}, {name(others)} {other.what}")
    return Verdict(
        "shape",
        tuple(odd),
        f"{name(odd)} called {one.op} #{one.number} with {one.tensor} ({one.where}), {name(others)} with "
        f"{other.tensor} ({other.where})",
    )


def _unused(reports: dict[int, Report]) -> Verdict | None:
    """Ranks whose backward is over without some gradient, and DDP has complained, or others wait for its bucket."""
    at = [
        rank for rank, report in reports.items() if report.without_gradient
        and ("finished reduction" in report.error or (report.state == "inside" and _waited_for(rank, reports)))
    ]  # fmt: skip
    if not at:
        return None
    names = ", ".join(dict.fromkeys(label for rank in at for label in reports[rank].without_gradient))
    return Verdict("unused", tuple(at), f"on {name(at)} backward gave no gradient to {names}{_waiting(reports, at)}")


def _mismatch(group: str, reports: dict[int, Report]) -> Verdict | None:
    """The first number of the group at which not all ranks made the same call."""
    at: dict[int, dict[int, Call]] = {}
    for rank, report in reports.items():
        for call in report.calls:
            if call.group == group:
                at.setdefault(call.number, {})[rank] = call
    return next((found for number in sorted(at) if (found := compare(at[number]))), None)


def _absent(group: str, reports: dict[int, Report]) -> Verdict | None:
    """Ranks that never made the call that others of their group are in, or have made."""
    members = next(report.groups[group] for report in reports.values() if group in report.groups)
    last = {rank: _last(group, reports[rank]) for rank in members if rank in reports}
    most = max((call.number for call in last.values() if call), default=0)
    missing = [rank for rank, call in last.items() if (call.number if call else 0) < most]
    if not missing:
        return None
    first = min(last[rank].number if last[rank] else 0 for rank in missing) + 1  # type: ignore[union-attr]
    missing = [rank for rank in missing if (last[rank].number if last[rank] else 0) == first - 1]  # type: ignore[union-attr]
    waiting = [rank for rank in last if rank not in missing]
    entered = (c for rank in waiting for c in reports[rank].calls if c.group == group)
    # A report holds the newest calls of a rank: one that is far ahead no longer tells of the first that was missed.
    call = min((c for c in entered if c.number >= first), key=lambda c: c.number)
    if all(report.state == "left" for report in reports.values()):  # a root may be done before anybody receives
        text = f"{name(waiting)} called {call.what}, and {name(missing)} never did"
        return Verdict("order", tuple(min(missing, waiting, key=len)), text)
    where = f"where {name(waiting)} {'waits' if len(waiting) == 1 else 'wait'}"
    if all(reports[rank].state == "left" for rank in missing):
        is_through = "is through, and never enters" if len(missing) == 1 else "are through, and never enter"
        text = f"{name(missing)} {is_through} {call.what} {where}"
        return Verdict("uneven", tuple(missing), text)
    text = f"{name(missing)} never entered {call.what} {where}; rank {missing[0]} is at {reports[missing[0]].where}"
    return Verdict("deadlock", tuple(missing), text)


def _last(group: str, report: Report) -> Call | None:
    return max((c for c in report.calls if c.group == group), key=lambda c: c.number, default=None)


def _pending(report: Report) -> Sequence[Call]:
    return [call for call in report.calls if not call.done]


def _waited_for(rank: int, reports: dict[int, Report]) -> bool:
    """Others have called what this rank has not."""
    own = {(call.group, call.number) for call in reports[rank].calls}
    return any((c.group, c.number) not in own for other in reports.values() if other.rank != rank for c in other.calls)


def _waiting(reports: dict[int, Report], but: Sequence[int] = ()) -> str:
    """Who waits, or waited until others were gone, in what: the end of a sentence."""
    calls = {rank: _waits_in(report) for rank, report in reports.items() if rank not in but}
    first = next((call for call in calls.values() if call), None)
    if first is None:
        return ""
    ranks = [rank for rank, call in calls.items() if call and (call.group, call.number) == (first.group, first.number)]
    return f"; {name(ranks)} waited in {first.what}"


def _waits_in(report: Report) -> Call | None:
    """A call that failed because another rank is gone counts as done: then it is the last one."""
    pending = [*_pending(report), *(report.calls[-1:] if report.state == "raised" and not report.error else [])]
    return pending[0] if pending else None
