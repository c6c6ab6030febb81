"""Real SGLang among the engines that a Server can start, in its own environment (make setup-sglang).

with Server(model, "sglang", {"tp-size": 2}) as server: ...        # once this module is imported

On a CPU it runs with torch's own operators: scheduler, radix cache, grammars and HTTP server are SGLang's, its kernels
for GPUs are not there (stand_ins.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ch02_hardware_parallelism.virtual_hosts import described
from ch06_vllm.servers import ADVICE, APART, ENGINES, HOST, Engine, cores_of_ranks, flags, own_cores, program
from common.bootstrap import gpus_visible

# What it needs on any machine without a GPU. The cache takes max-total-tokens, and mem-fraction-static is only a
# ceiling: SGLang measures free memory twice while it loads, and other processes count.
LAPTOP: dict[str, Any] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "disable-overlap-schedule": True,
    "mem-fraction-static": 0.3,
    "max-total-tokens": 32768,
    "sleep-on-idle": True,  # else its scheduler keeps a core busy with waiting
}
# Its counters at /metrics; how many tokens of a prompt were in the radix cache, in each answer's usage.
ALWAYS: dict[str, Any] = {"enable-metrics": True, "enable-cache-report": True, "log-level-http": "warning"}
PARSER = """
import argparse
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
"""
SGLANG_ADVICE = [
    (
        r"[Nn]ot enough memory|out of memory|no GPU memory for the KV cache",
        "raise mem-fraction-static, lower max-total-tokens, or free memory",
    ),
    (r"divisible|divided", "take a tp-size that divides the model's heads"),
    (r"context.length|context_len", "lower context-length"),
    (
        r"[Ii]nstall NIXL|No module named 'mooncake",
        "take disaggregation-transfer-backend nixl: make setup-sglang brings it",
    ),
    *ADVICE,
]


def environment(ranks: int) -> dict[str, str]:
    """Variables for so many ranks on this host: its programs first on PATH, and on a CPU the cores of each rank."""
    found = {"PATH": f"{program('sglang', 'python').parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    if described() is not None:  # its hosts share /dev/shm, by which SGLang takes them for one and listens on loopback
        found |= APART | {"SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "false"}
    if gpus_visible():
        return found
    found |= {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than what it saves
    if (ranks > 1 or described() is not None) and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
        found["SGLANG_CPU_OMP_THREADS_BIND"] = cores_of_ranks(own_cores(), ranks)
        found["OMP_NUM_THREADS"] = str(max(1, len(own_cores()) // ranks))
    return found


def command(model: str, port: int, options: Mapping[str, Any], launch: Sequence[str] = ()) -> list[str]:
    """`launch`: a script of launch/ that starts SGLang with these words and its own."""
    python = str(program("sglang", "python"))
    start = [*(launch or (python, "-m", "sglang.launch_server", "--model-path")), model]
    named = {"served-model-name": Path(model).name} if Path(model).is_dir() else {}
    wanted = {"host": HOST, "port": port} | ALWAYS | named | ({} if gpus_visible() else LAPTOP) | options
    wanted.pop("shutdown-timeout", None)  # it lets running requests finish when it is told to end
    return start + flags({name: value for name, value in wanted.items() if value is not False})  # no --no- flags


ENGINES["sglang"] = Engine(
    "SGLang",
    command,
    environment,
    sizes=("tp-size", "pp-size", "dp-size"),
    parser=PARSER,
    help="sglang serve --help",
    advice=tuple(SGLANG_ADVICE),
)
