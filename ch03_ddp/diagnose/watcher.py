"""The watch over a block of training: a thread on each rank that sees a hang, rings, and tells what its rank is doing.

A thread, because it is the main thread that hangs; the store, because it is collectives that hang.

    with diagnose.watch(ctx, timeout_s=60) as watch:
        ddp = watch.model(DistributedDataParallel(model))
        for batch in batches:
            ...
            watch.step()
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as td
from torch._C._distributed_c10d import PrefixStore
from torch.nn.parallel import DistributedDataParallel

from ch03_ddp.diagnose import recorder, stacks
from ch03_ddp.diagnose.alarm import ANSWER_S, Alarm
from ch03_ddp.diagnose.backward import Backward
from ch03_ddp.diagnose.interpose import interposed
from ch03_ddp.diagnose.signatures import SignatureCheck
from ch03_ddp.diagnose.stragglers import Pace
from ch03_ddp.diagnose.verdict import Fault, Report, Verdict, judge
from common import script
from common.dist import Context

POLL_S = 0.1
LEAVE_S = 10.0  # how long the main thread has to leave the block after the verdict
# Exceptions with such words only say that somebody else is gone or late.
OTHERS = ("gloo", "nccl", "connection closed", "process group", "left with an error", "ranks reached", "lost rank 0")
_watches = itertools.count()  # all ranks enter them in the same order: that pairs them


class Watch:
    """One rank's watch. See `watch`."""

    def __init__(self, ctx: Context, timeout_s: float, check: bool) -> None:
        if os.environ.get("TORCH_FR_BUFFER_SIZE") == "0":
            raise script.UserError("TORCH_FR_BUFFER_SIZE=0 turns the Flight Recorder off; unset it for diagnose.watch")
        self._ctx, self._timeout_s = ctx, timeout_s
        self._began_ns = time.time_ns()
        # Connections of its own: one client of the store serves one thread at a time, and the main thread may be in it.
        prefix = f"watch/{next(_watches)}"
        self._store = PrefixStore(prefix, ctx.store.clone())
        self._alarm = Alarm(PrefixStore(prefix, ctx.store.clone()), ctx.rank, ctx.world_size)
        self._check = SignatureCheck(PrefixStore(prefix, ctx.store.clone()), self._raise_if_told) if check else None
        self._pace = Pace(ctx.device)
        self._models: list[Backward] = []
        self._report = Report(ctx.rank)
        self._asked: list[tuple[str, threading.Event]] = []  # by the main thread: why to ring, and who waits for it
        self._found: Verdict | None = None  # by this rank alone
        self._verdict: Verdict | None = None  # everybody's
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diagnose.watch", daemon=True)
        self._undo = contextlib.ExitStack()

    # ---------------------------------------------------------------- for the user

    def model(self, ddp: DistributedDataParallel) -> DistributedDataParallel:
        """Look into this model's backward too: unused parameters, changed buckets, the wait for the others."""
        self._models.append(Backward(ddp, self._pace.mark, self._pace.waited))
        return ddp

    def step(self) -> None:
        """A training step ends here."""
        self._pace.step()

    def straggler(self) -> Verdict | None:
        """The rank that all wait for, by the steps so far; None if there is none. Every rank must call it."""
        return self._pace.straggler(self._ctx)

    # ---------------------------------------------------------------- the block, in the main thread

    def __enter__(self) -> Watch:
        self._undo.enter_context(interposed(self._before, self._pace.mark, self._pace.waited))
        if self._ctx.device.type == "cpu":  # a stuck gloo call ends soon after the verdict; NCCL's are aborted instead
            td.distributed_c10d._set_pg_timeout(timedelta(seconds=self._timeout_s + 1))
            whole = timedelta(seconds=self._ctx.timeout_s)
            self._undo.callback(lambda: td.is_initialized() and td.distributed_c10d._set_pg_timeout(whole))
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            # torchrun ends the other ranks within 0.1 s after one is gone: it must wait until they have said who.
            signal.signal(signal.SIGTERM, self._on_term)
            self._undo.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            if error is None:
                self._meet_at_the_end()
            elif isinstance(error, Exception):
                self._answer_for(error)
        finally:
            self._over.set()
            self._thread.join(2 * ANSWER_S)
            if self._verdict and self._ctx.rank == 0:
                with contextlib.suppress(RuntimeError):
                    self._alarm.wait_until_heard()
            for model in self._models:
                model.close()
            self._undo.close()

    def _before(self, op: str, message: torch.Tensor | None, group: td.ProcessGroup) -> None:
        self._raise_if_told()
        if found := self._changed():
            raise Fault(found)
        if self._check:
            self._check(op, message, group)

    def _raise_if_told(self) -> None:
        if self._verdict:
            raise Fault(self._verdict)

    def _ask(self, why: str) -> None:
        """Have the thread ring, and wait for the end of a round that begins after this."""
        answered = threading.Event()
        self._asked.append((why, answered))
        if self._thread.is_alive():
            answered.wait(3 * ANSWER_S)

    def _meet_at_the_end(self) -> None:
        """Stay to answer until all ranks are through, then compare what they called: not every wrong order hangs."""
        if found := self._changed():
            self._answer_for(Fault(found))
            raise Fault(found)
        self._report.state = "left"
        patience = time.monotonic() + self._timeout_s
        try:
            self._store.set(f"digest/{self._ctx.rank}", digest(self._calls()))
            if self._store.add("left", 1) == self._ctx.world_size:
                self._store.set("all left", "")
            while not self._store.check(["all left"]):
                self._raise_if_told()
                ended = self._alarm.ended()  # in this order: who saw that all have left may have ended since
                if (ended and not self._store.check(["all left"])) or time.monotonic() > patience:
                    self._ask("the others do not reach the end of the block")
                    patience = time.monotonic() + self._timeout_s
                time.sleep(0.02)
            digests = self._store.multi_get([f"digest/{rank}" for rank in range(self._ctx.world_size)])
        except RuntimeError:  # the store is gone, and with it rank 0
            self._ask("the store is gone")
            self._raise_if_told()
            raise
        if len(set(digests)) > 1:
            self._ask("not all ranks made the same calls")
        self._raise_if_told()

    def _answer_for(self, error: Exception) -> None:
        """The block was left by an exception: this rank's own, or one that comes of another rank's fault."""
        if isinstance(error, Fault):
            self._found = error.verdict
            self._ask("a fault was found")
            return
        self._report.state = "raised"
        self._report.where = stacks.raised_at(error)
        if not any(sign in str(error).lower() for sign in OTHERS):
            line = (str(error).strip().splitlines() or [""])[0]
            self._report.error = f"{type(error).__name__}: {line} ({self._report.where})"
        if not self._verdict:
            self._ask(f"{type(error).__name__}")
        if self._verdict and not (self._verdict.cause == "error" and self._ctx.rank in self._verdict.ranks):
            raise Fault(self._verdict) from error

    def _on_term(self, *_: object) -> None:
        self._report.state = "terminated"
        self._ask("SIGTERM")
        self._raise_if_told()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    # ---------------------------------------------------------------- beside it, in a thread

    def _run(self) -> None:
        looked = time.monotonic()
        pause = max(POLL_S, min(1.0, self._timeout_s / 20))  # between looks into the recorder, which cost milliseconds
        while not self._over.is_set() and not self._verdict:
            asked = self._asked[:]
            try:
                self._found = self._found or self._changed()
                why = next((why for why, _ in asked), "a fault was found" if self._found else "")
                if not why and time.monotonic() > looked + pause:
                    looked = time.monotonic()
                    why = self._stuck()
                if why:
                    self._alarm.ring(why)
                if self._alarm.rings():
                    self._verdict = self._round()
                    del self._asked[: len(asked)]
                    for _, answered in asked:
                        answered.set()
            except RuntimeError:  # the store does not answer: the process that served it is gone
                host = "torchrun's agent" if "TORCHELASTIC_RUN_ID" in os.environ else "rank 0"
                made = self._calls()
                last = f"; the last call of rank {self._ctx.rank} was {made[-1].what}" if made else ""
                self._verdict = Verdict("death", (0,), f"rank 0 is gone, and the store that {host} served{last}")
            self._over.wait(POLL_S)
        if self._verdict:
            with contextlib.suppress(RuntimeError):  # the store is gone
                self._alarm.heard()
        for _, answered in self._asked:
            answered.set()
        if self._verdict and not self._over.is_set():
            self._let_go()

    def _calls(self) -> list[recorder.Call]:
        return recorder.calls(self._began_ns)

    def _stuck(self) -> str:
        """What this rank has waited in for too long."""
        late = [call for call in self._calls() if not call.done and call.age_s > self._timeout_s]
        if self._check and self._check.waiting and time.monotonic() > self._check.waiting[1] + self._timeout_s:
            late.append(self._check.waiting[0])
        return f"{late[0].what} takes more than {self._timeout_s:g} s" if late else ""

    def _changed(self) -> Verdict | None:
        changed = next((model.changed for model in self._models if model.changed), None)
        if not changed:
            return None
        text = (
            f"rank {self._ctx.rank} changed a gradient in place while its bucket was under way ({', '.join(changed)}): "
            "what the ranks got of it depends on chance"
        )
        return Verdict("inplace", (self._ctx.rank,), text)

    def _round(self) -> Verdict | None:
        """The alarm rings: report, hear the others, judge."""
        if self._found or self._alarm.settled():
            return self._alarm.settle(self._found)
        report = self._report
        report.calls, report.groups = self._calls(), recorder.groups()
        if self._check and self._check.waiting:
            report.calls.append(self._check.announced(report.calls))
        report.without_gradient = [name for model in self._models for name in model.without_gradient]
        if report.state == "inside":
            report.where = stacks.main_thread()
        found = self._alarm.settle(judge(*self._alarm.exchange(report)))
        if found is None:
            self._alarm.round += 1  # a false alarm: what was late has come
        elif script.Run.current is not None:
            with contextlib.suppress(OSError):  # the folder may be on another node
                script.Run.current.path(f"stacks-rank{self._ctx.rank}.txt").write_text(stacks.everything())
        return found

    def _let_go(self) -> None:
        """Get the main thread out of its call, or end the process: a verdict is no use to a job that still hangs."""
        if self._over.wait(1):
            return
        if self._ctx.device.type == "cuda":
            td.distributed_c10d._abort_process_group()
        if not self._over.wait(LEAVE_S):
            print(f"error [rank {self._ctx.rank}]: {self._verdict}", file=sys.stderr, flush=True)
            print(stacks.everything(), file=sys.stderr, flush=True)
            os._exit(2)


def digest(calls: list[recorder.Call]) -> str:
    """Of the job's own group: how many calls, and which."""
    text = repr([(call.number, call.signature) for call in calls if call.group == "0"])
    return hashlib.sha256(text.encode()).hexdigest()


def watch(ctx: Context, *, timeout_s: float = 300, check: bool = False) -> Watch:
    """Watch the block that follows, on every rank.

    Args:
        ctx: of common.dist.session.
        timeout_s: a collective that takes longer is taken for a hang. So is the end of the block, where the ranks wait
            for each other.
        check: compare every call of torch.distributed before it is made (signatures.py).

    Raises:
        Fault: on leaving the block, when there is a verdict. A rank whose own exception it was raises that one.
    """
    return Watch(ctx, timeout_s, check)
