"""How ranks talk while nothing else works: by keys of the store. One rings, all report, the first verdict is all's."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import time
from pathlib import Path

import psutil
import torch.distributed as td

from ch03_ddp.diagnose.verdict import Report, Verdict

ANSWER_S = 5.0  # how long a rank has to answer: its watch needs the GIL and the store, no more
NOTHING = "nothing"


class Alarm:
    """One rank's side of it. After a round without a verdict (a false alarm) the next one begins, on all ranks."""

    def __init__(self, store: td.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.round = 0
        store.set(f"process/{rank}", f"{os.getpid()} {process_table()}")

    def ring(self, why: str) -> None:
        self.store.compare_set(f"alarm/{self.round}", "", f"rank {self.rank}: {why}")

    def rings(self) -> bool:
        return self.store.check([f"alarm/{self.round}"])

    def settle(self, found: Verdict | None) -> Verdict | None:
        """Say what it is. The first to say so is believed by all: the answer is its verdict."""
        said = self.store.compare_set(f"verdict/{self.round}", "", found.dumps() if found else NOTHING).decode()
        return None if said == NOTHING else Verdict.loads(said)

    def settled(self) -> bool:
        return self.store.check([f"verdict/{self.round}"])

    def heard(self) -> None:
        """This rank has the verdict."""
        self.store.set(f"heard/{self.rank}", "")

    def wait_until_heard(self) -> None:
        """Stay until all that live have the verdict: the store may end with this process, and leave them to guess."""
        deadline = time.monotonic() + ANSWER_S
        waiting = set(range(self.world_size))
        while waiting and time.monotonic() < deadline:
            waiting -= {rank for rank in waiting if self.store.check([f"heard/{rank}"])} | set(self.ended())
            time.sleep(0.01)

    def exchange(self, report: Report) -> tuple[dict[int, Report], dict[int, str]]:
        """Give this rank's report for the others'. Also: who did not answer, and why that is."""
        self.store.set(f"report/{self.round}/{self.rank}", report.dumps())
        reports: dict[int, Report] = {}
        deadline = time.monotonic() + ANSWER_S
        while True:
            ended = self.ended()
            for rank in set(range(self.world_size)) - set(reports):
                if self.store.check([key := f"report/{self.round}/{rank}"]):
                    reports[rank] = Report.loads(self.store.get(key).decode())
            silent = set(range(self.world_size)) - set(reports)
            if silent <= set(ended):
                return reports, {rank: ended[rank] for rank in silent}
            if time.monotonic() > deadline:
                why = f"no answer for {ANSWER_S:g} s: its process ended or is stopped"
                return reports, {rank: ended.get(rank, why) for rank in silent}
            time.sleep(0.02)

    def ended(self) -> dict[int, str]:
        """Ranks of this host whose process is no more. Of other hosts only their silence tells."""
        found = {}
        for rank in range(self.world_size):
            if not self.store.check([f"process/{rank}"]):
                continue
            pid, table = self.store.get(f"process/{rank}").decode().split(" ", 1)
            if table == process_table() and not _lives(int(pid)):
                found[rank] = f"its process {pid} ended"
        return found


@functools.cache
def process_table() -> str:
    """Where this process's id means anything: host, boot and pid namespace (two containers may have one name)."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on Linux
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(found)


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
