"""How ranks talk while nothing else works: by keys of the store. One rings, all report, the first verdict is all's."""

from __future__ import annotations

import os
import socket
import time

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
        store.set(f"process/{rank}", f"{os.getpid()} {socket.gethostname()}")

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
            pid, host = self.store.get(f"process/{rank}").decode().split(" ", 1)
            if host == socket.gethostname() and not _lives(int(pid)):
                found[rank] = f"its process {pid} ended"
        return found


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
