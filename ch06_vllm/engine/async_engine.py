"""The engine in a thread of its own, asyncio on the other side.

The engine is not thread-safe, so nothing but its thread touches it: requests and cancellations go in through a queue
that is emptied before each step; what a step brought comes out in one call to the event loop. A reader that is slow
gets several tokens at once: what waits for it never grows beyond its own max_tokens.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

import torch

from ch06_vllm.engine.engine import Engine
from ch06_vllm.engine.metrics import Metrics, Timeline
from ch06_vllm.engine.request import Output, SamplingParams
from common.dist import LOST_PEER
from common.logs import get_logger

log = get_logger()
KEEP_ALIVE_S = 60  # between signs of life to the other ranks, whose wait ends after dist.session's timeout_s


class EngineDead(RuntimeError):
    """The engine's thread has ended: by a fault in a step, or as it was told."""


class Mailbox:
    """What a caller's requests bring, as it comes: iterate over (number of the request, output).

    Use it in a `with` block: leaving it cancels the requests that still run.
    """

    def __init__(self, engine: AsyncEngine, names: list[str]) -> None:
        self._engine, self._names = engine, names
        self._waiting: dict[int, Output] = {}
        self._arrived = asyncio.Event()

    def put(self, number: int, output: Output) -> None:
        if number in self._waiting:
            self._waiting[number].add(output)
        else:
            self._waiting[number] = output
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        left = len(self._names)
        while left:
            await self._arrived.wait()
            self._arrived.clear()
            taken, self._waiting = self._waiting, {}
            for number, output in taken.items():
                if output.finish_reason == "error":
                    raise EngineDead(self._engine.dead)
                left -= output.finish_reason is not None
                yield number, output

    def __enter__(self) -> Mailbox:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.leave(self._names)


class AsyncEngine:
    """
    Args:
        engine: from here on it belongs to the thread.
        model_name: as the metrics call it.

    Attributes:
        on_death: called in the event loop with the reason, when all callers have been told.
    """

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.engine, self.metrics = engine, Metrics(engine, model_name)
        self.dead = ""  # why, once it is
        self.on_death: Callable[[str], None] | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None: stop
        self._timelines: dict[str, Timeline] = {}  # the thread's
        self._mailboxes: dict[str, tuple[Mailbox, int]] = {}  # the event loop's
        self._numbers = itertools.count(1)
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Call it in the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_requests(self) -> int:
        """In flight, running or waiting."""
        return len(self._mailboxes)

    async def generate(
        self, prompt: Sequence[int], params: SamplingParams, priority: int = 0, request_id: str | None = None
    ) -> AsyncIterator[Output]:
        """What the steps bring. Leaving the iterator cancels the request: its blocks are free before the next step.

        Raises:
            ValueError: as Engine.check says.
            EngineDead: there will be no more tokens.
        """
        with self.submit([(prompt, params)], priority, request_id) as outputs:
            async for _, output in outputs:
                yield output

    def submit(
        self, requests: Sequence[tuple[Sequence[int], SamplingParams]], priority: int = 0, request_id: str | None = None
    ) -> Mailbox:
        """Several requests that live and end together; otherwise as generate."""
        for prompt, params in requests:
            self.engine.check(prompt, params)
        if self.dead:
            raise EngineDead(self.dead)
        names = [f"{request_id or 'request'}-{next(self._numbers)}" for _ in requests]  # never the same again
        mailbox, now = Mailbox(self, names), time.perf_counter()
        for number, (name, (prompt, params)) in enumerate(zip(names, requests, strict=True)):
            self._mailboxes[name] = mailbox, number
            self._commands.put(functools.partial(self._add, name, prompt, params, priority, now))
        return mailbox

    def leave(self, names: Sequence[str]) -> None:
        """Nobody waits for these requests any more."""
        if unfinished := [name for name in names if self._mailboxes.pop(name, None)]:
            self._commands.put(functools.partial(self._cancel, unfinished))

    def fail(self, why: str) -> None:
        """Tell all callers that the engine is dead, from the event loop; its thread may be stuck."""
        if self.dead:
            return
        self.dead = why
        for name, (mailbox, number) in list(self._mailboxes.items()):
            mailbox.put(number, Output(name, finish_reason="error"))
        if self.on_death:
            self.on_death(why)

    async def stop(self, timeout_s: float = 10) -> None:
        """End the thread, after the step that it is in; requests that still run are cancelled."""
        self.on_death = None
        self.fail("the engine was stopped")
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, timeout_s)

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps the number for each thread
        try:
            while self._obey():
                self._step()
            self.engine.runner.stop()
        except Exception as error:
            why = f"the engine died: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if LOST_PEER.search(why):
                why = "the engine died: another rank was lost"
            elif not self.dead:
                log.exception("a step failed")
            self.metrics.finished["error"] += len(self._timelines)
            self._loop.call_soon_threadsafe(self.fail, why)

    def _obey(self) -> bool:
        """Do what was asked since the last step; without work, wait to be asked. False: stop."""
        while True:
            try:
                command = self._commands.get(not self.engine.has_work, KEEP_ALIVE_S)
            except queue.Empty:
                if self.engine.has_work:
                    return True
                self.engine.runner.keep_alive()
                continue
            if command is None:
                self._cancel(list(self.engine.requests))
                return False
            command()

    def _step(self) -> None:
        outputs = self.engine.step()
        now = time.perf_counter()
        for output in outputs:
            name = output.request_id
            self.metrics.token(self._timelines[name], output, now)
            if output.finish_reason:
                del self._timelines[name]
        if outputs:
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _add(self, name: str, prompt: Sequence[int], params: SamplingParams, priority: int, now: float) -> None:
        self.engine.add(prompt, params, priority=priority, request_id=name)
        self._timelines[name] = Timeline(self.engine.requests[name], now)

    def _cancel(self, names: Sequence[str]) -> None:
        for name in names:
            if self.engine.cancel(name):
                del self._timelines[name]
                self.metrics.finished["abort"] += 1

    # ------------------------------------------------------------ in the event loop

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            found = self._mailboxes.get(output.request_id)
            if found is None:
                continue  # its caller has left
            mailbox, number = found
            if output.finish_reason:
                del self._mailboxes[output.request_id]
            mailbox.put(number, output)
