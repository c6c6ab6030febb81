"""A router as a process of its own: started, asked, stopped.

with Routing([server.url for server in servers], policy="joint") as routing:
    requests.post(f"{routing.url}/v1/completions", json=...)
"""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from ch06_vllm.scrape import Metrics, scrape
from ch06_vllm.servers import HOST, answers, flags, why
from common import process
from common.bootstrap import engine_environment
from common.ranks import free_port
from common.script import UserError

START_S = 60.0
Json = dict[str, Any]


def peer_installed() -> bool:
    """Whether sglang-router is there (make setup-routers)."""
    return (engine_environment("routers") / ".installed").exists()


class Routing:
    """Ours, or `kind="sglang"`: sglang-router. It is entered when all workers are up.

    Raises:
        UserError: on entering, if it does not get ready.
    """

    def __init__(
        self, workers: Sequence[str], *, kind: str = "ours", policy: str = "", options: Mapping[str, Any] | None = None
    ) -> None:
        self.workers, self.kind, self.options = list(workers), kind, dict(options or {})
        self.policy = policy or {"ours": "joint", "sglang": "cache_aware"}[kind]

    def command(self, port: int) -> list[str]:
        common = ["--policy", self.policy, "--host", HOST, "--port", str(port), *flags(self.options)]
        if self.kind == "ours":
            named = [word for url in self.workers for word in ("--worker", url)]
            return [sys.executable, "-m", "ch07_sglang_routing.router", *named, *common]
        program = engine_environment("routers") / "bin" / "sglang-router"
        if not program.exists():
            raise UserError("sglang-router is not installed; run make setup-routers")
        quiet = ["--log-level", "error", "--prometheus-port", str(free_port())]
        return [str(program), "launch", "--worker-urls", *self.workers, *common, *quiet]

    def __enter__(self) -> Routing:
        port = free_port()
        self.url = f"http://{HOST}:{port}"
        self.child = process.Child(self.command(port))
        try:
            self._wait()
        except BaseException:
            self.child.stop(1)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> Json:
        """What it counted, of ours."""
        self.child.stop(10)
        return self.child.wait(1).result or {}

    def _wait(self) -> None:
        while not self._ready():
            if self.child.process.poll() is not None:
                self.child.wait(0)
                raise UserError(f"the router did not start: {why(self.child.err + self.child.out)}")
            if time.monotonic() > self.child.started + START_S:
                raise UserError(f"the router is not ready after {START_S:g} s; see whether all its workers are up")
            time.sleep(0.05)

    def _ready(self) -> bool:
        if not answers(f"{self.url}/health"):
            return False
        return self.kind != "ours" or all(worker["state"] == "up" for worker in self.known())

    def known(self) -> list[Json]:
        """GET /workers."""
        return self.ask("GET", "/workers")["workers"]

    def add(self, url: str) -> Json:
        return self.ask("POST", "/workers", {"url": url})

    def remove(self, name: str) -> Json:
        return self.ask("DELETE", f"/workers/{name}")

    def metrics(self) -> Metrics:
        return scrape(self.url)

    def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        """
        Raises:
            UserError: it says no.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"Content-Type": "application/json"}, method=method
        )  # a browser's form could not send this type
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise UserError(f"{method} {path}: {json.load(error)['error']['message']}") from None
