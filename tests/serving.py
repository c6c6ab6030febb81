"""An engine that a script serves until it is told to end: what every engine must do then."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
import threading
import time
from typing import Any

import psutil

from ch06_vllm import servers
from common import process
from common.ranks import free_port


class Starter:
    """A config of its chapter, served by `module` as a user starts it."""

    def __init__(self, module: str, config: str, *flags: str) -> None:
        self.ready, self.stopping = threading.Event(), threading.Event()
        self.url = ""
        path = f"{module.partition('.')[0]}/configs/{config}.yaml"
        command = [sys.executable, "-m", module, path, "--set", f"port={free_port()}", *flags]
        self.child = process.Child(command, on_line=self.on_line)

    def on_line(self, line: str) -> None:
        if match := re.match(r"ready: (\S+)", line):
            self.url = match[1]
            self.ready.set()
        if line.startswith("stopping"):
            self.stopping.set()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 500
        while not self.ready.wait(0.2):
            assert self.child.process.poll() is None, "".join(self.child.err)
            assert time.monotonic() < deadline, "".join(self.child.err)

    def engine(self) -> list[psutil.Process]:
        return psutil.Process(self.child.process.pid).children(recursive=True)

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stop()


def finish_a_stream(starter: Starter, tokens: int = 200) -> dict[str, Any]:
    """SIGTERM while a stream runs: it comes whole, then the script ends well and leaves no process. Its RESULT."""
    starter.wait_until_ready()
    engine = starter.engine()
    (served,) = servers.models(starter.url)
    connection = http.client.HTTPConnection(starter.url.removeprefix("http://"), timeout=120)
    body = {"model": served, "prompt": "def f(", "max_tokens": tokens, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    stream = connection.getresponse()
    assert stream.status == 200
    assert stream.readline().startswith(b"data: ")
    starter.child.process.send_signal(signal.SIGTERM)
    assert starter.stopping.wait(30)
    events = [line[6:] for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == tokens
    done = starter.child.wait(60)
    assert not psutil.wait_procs(engine, timeout=30)[1]
    assert done.returncode == 0, done.stderr
    assert done.result
    return done.result


def left_by_kill_9(starter: Starter) -> list[psutil.Process]:
    """The engine's processes that outlive a kill -9 of the script."""
    engine = starter.engine()
    assert engine
    os.kill(starter.child.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(engine, timeout=60)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
