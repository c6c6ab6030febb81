"""The engine as a server: OpenAI's completions and chat, vLLM's flags and metrics, tensor parallel over ranks.

You learn   what stands between a socket and a scheduler: who may wait, who has left, what is said when a rank is lost
Laptop      python -m ch06_vllm.engine.server --model DIR --port 8000
            python -m ch06_vllm.engine.server --model DIR --tensor-parallel-size 2
GPU node    the same
You see     one line when it answers. SIGTERM or Ctrl-C: running requests finish, at most --shutdown-timeout seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ch06_vllm.engine.request import Config
from ch06_vllm.servers import bind, check_model, check_ranks
from common import logs, process, script
from common.ranks import CONSEQUENCE, free_port, rank_environment
from common.script import UserError

Json = dict[str, Any]


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = script.parser(__doc__)
    parser.add_argument("--model", required=True, help="a model folder or a hub id")
    parser.add_argument("--served-model-name", help="what requests call it (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=script.at_least(1), default=8000)
    parser.add_argument("--tensor-parallel-size", type=script.at_least(1), default=1, metavar="N", help="ranks")
    parser.add_argument(
        "--max-restarts", type=script.at_least(0), default=5, help="of the ranks, when one of them ends"
    )
    parser.add_argument(
        "--max-num-queued-reqs", type=script.at_least(1), help="requests in flight; who comes then gets a 503"
    )
    parser.add_argument(
        "--max-body-mib", type=script.positive, default=16, help="of a request; a larger one gets a 413"
    )
    parser.add_argument("--request-timeout-s", type=script.positive, default=30, help="to send a request in")
    parser.add_argument("--shutdown-timeout", type=script.at_least(0), default=30, help="seconds for running requests")
    shared = {"model", "device", "seed"}
    for field in fields(Config):
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.name not in shared:
            kinds: dict[str, Callable[[str], Any]] = {"str": str, "float | None": script.positive}
            kind = kinds.get(str(field.type), script.at_least(1))
            parser.add_argument(flag, type=kind, default=field.default)
    args = parser.parse_args(argv)
    args.served_model_name = args.served_model_name or Path(args.model).name
    return args, Config(**{field.name: getattr(args, field.name) for field in fields(Config)})


def rank(args: argparse.Namespace, config: Config) -> Json:
    """One rank's part: rank 0 serves, the others compute what it says."""
    bound = bind(args.host, args.port) if logs.env_rank() == 0 else None  # before all that takes time
    from ch06_vllm.engine import api
    from ch06_vllm.engine.async_engine import AsyncEngine
    from ch06_vllm.engine.engine import Engine
    from ch06_vllm.engine.model import Shard
    from ch06_vllm.engine.runner import Runner
    from common import dist

    with dist.session(args.device) as ctx:
        if args.tensor_parallel_size not in (1, ctx.world_size):
            raise UserError(
                f"{ctx.world_size} ranks were started for --tensor-parallel-size {args.tensor_parallel_size}; "
                "make them equal, or start it without torchrun"
            )
        shard = Shard(ctx.rank, ctx.world_size)
        if bound is None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # rank 0 says when it is over
            Runner(config, ctx.device, shard).follow()
            return {}
        engine = AsyncEngine(Engine(config, ctx.device, shard), args.served_model_name)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file
        fault = api.run(engine, args, bound)
        finished = engine.metrics.finished
        result = {"requests": finished.total(), "generation_tokens": engine.metrics.generation_tokens}
        if fault:
            raise script.CheckFailed(fault, result)
        return result


def supervise(args: argparse.Namespace, argv: list[str]) -> Json:
    """Start the ranks, and all of them anew when one ends: the others cannot go on without it.

    Raises:
        UserError: they cannot start, or end again and again.
    """
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    for _ in range(args.max_restarts + 1):
        ready = threading.Event()

        def show(line: str, ready: threading.Event = ready) -> None:
            if line.startswith("ready:"):
                ready.set()
            if not line.startswith("RESULT "):
                print(line, flush=True)

        with contextlib.ExitStack() as stack:
            ranks = [stack.enter_context(child) for child in start_ranks(args, argv, show)]
            while not asked.wait(0.05) and all(child.process.poll() is None for child in ranks):
                pass
            first = ranks[0]
            if asked.is_set():
                first.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    first.process.wait(args.shutdown_timeout + 15)
                return first.wait(1).result or {}
            lost, ended = next((n, child) for n, child in enumerate(ranks) if child.process.poll() is not None)
            if not ready.is_set():
                raise UserError(last_words([child.wait(10) for child in ranks]))
            if ended is not first:
                first.process.send_signal(signal.SIGUSR1)  # its clients hear of it now, whatever it is stuck in
                with contextlib.suppress(subprocess.TimeoutExpired):
                    first.process.wait(3)
            for child in ranks:
                child.kill()
        how = signal.Signals(-code).name if (code := ended.process.returncode) < 0 else f"exit code {code}"
        print(f"rank {lost} ended ({how}); starting the ranks anew", file=sys.stderr, flush=True)
    raise UserError(f"the ranks ended {args.max_restarts + 1} times; see what ends them, or raise --max-restarts")


def start_ranks(args: argparse.Namespace, argv: list[str], show: Callable[[str], None]) -> list[process.Child]:
    size, port = args.tensor_parallel_size, free_port()
    command = [sys.executable, "-m", "ch06_vllm.engine.server", *argv]

    def tell(line: str) -> None:
        if not line.startswith("error "):  # of the ranks' errors one line is told, see last_words
            print(line, file=sys.stderr, flush=True)

    environments = [rank_environment(number, size, port) for number in range(size)]
    for environment in environments:
        del environment["OMP_NUM_THREADS"]  # dist.session shares the cores out
    return [
        process.Child(command, env=environment, cwd=Path.cwd(), on_line=show, on_error=tell)
        for environment in environments
    ]


def last_words(ranks: Sequence[process.Finished]) -> str:
    """The error that came first, not one that follows from it."""
    errors = [re.sub(r"^error \[rank \d+\]: ", "", line) for done in ranks for line in done.stderr.splitlines()
              if line.startswith("error ")]  # fmt: skip
    causes = [line for line in errors if not CONSEQUENCE.search(line)]
    return (causes or errors or [f"a rank {ranks[0].reason()}; see its log"])[0]


def main(argv: list[str] | None = None) -> Json:
    args, config = parse_args(argv)
    logs.setup(all_ranks=args.all_ranks)
    check_model(args.model, args.tensor_parallel_size)
    if args.tensor_parallel_size > 1 and "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" not in os.environ:
        check_ranks(args.tensor_parallel_size)
        bind(args.host, args.port).close()
        return supervise(args, sys.argv[1:] if argv is None else argv)
    return rank(args, config)


if __name__ == "__main__":
    script.run(main)
