"""Chapter 6's engine, slowed down: after each step it rests for so many times what the step took.

It stands for a slower machine where there is but one. It rests rather than works longer, so that another engine beside
it has the core to itself meanwhile.

    Server(model, "throttled", {"factor": 4})        # once this module is imported
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from ch06_vllm import servers
from ch06_vllm.engine import engine, server
from ch06_vllm.engine.request import Output
from common import script

START = "from common import script; from ch07_sglang_routing.throttled import main; script.run(main)"


def slowed(factor: float) -> type[engine.Engine]:
    """An engine whose steps take `factor` times as long."""

    class Throttled(engine.Engine):
        def step(self) -> list[Output]:
            start = time.perf_counter()
            outputs = super().step()
            time.sleep((factor - 1) * (time.perf_counter() - start))
            return outputs

    return Throttled


def command(model: str, port: int, options: Mapping[str, Any]) -> list[str]:
    """The option `factor` (default 2), and those of our engine."""
    python, _, _, *words = servers.own_command(model, port, {k: v for k, v in options.items() if k != "factor"})
    return [python, "-c", START, str(options.get("factor", 2)), *words]


def main() -> dict:
    """FACTOR and the flags of chapter 6's server."""
    factor = script.positive(sys.argv[1])
    engine.Engine = slowed(factor)  # type: ignore[misc]  # the server makes what has this name
    return server.main(sys.argv[2:])


servers.ENGINES["throttled"] = servers.Engine("our engine, throttled", command, lambda ranks: {})
