"""The other side of turns.py: a loop over stdin. It imports nothing of ours: it runs in an engine's environment."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def in_turn(load: Callable[[], Callable[[Any], Any]]) -> None:
    """Call `load`, say {"ready": its seconds}, then answer each line of stdin with what the loaded function returns."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print, in Python or in C, is no reply
    start = time.perf_counter()
    answer = load()

    def say(what: Any) -> None:
        print(json.dumps(what, default=float), file=replies, flush=True)

    say({"ready": time.perf_counter() - start})
    for line in sys.stdin:
        say(answer(json.loads(line)))
