"""A router: one address, many engines behind it.

You learn   how a request finds the worker that has its prefix and is not busy, and what happens when that worker dies
Laptop      python -m ch07_sglang_routing.router --worker localhost:8001 --worker localhost:8002 --policy joint
GPU node    the same; with prefill and decode apart: --prefill http://HOST:30000,8998 --decode http://HOST:30001
Cluster     the same, on any node that reaches the engines; several routers side by side keep counts of their own
You see     one line when it answers; GET /workers, /metrics. SIGTERM or Ctrl-C: running requests finish
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import resource
import signal
import socket
from typing import Any

import uvloop

from ch06_vllm.servers import bind
from ch07_sglang_routing.router.client import Limits
from ch07_sglang_routing.router.policies import POLICIES, PrefillDecode, make, named
from ch07_sglang_routing.router.radix import RadixTree
from ch07_sglang_routing.router.router import Router
from ch07_sglang_routing.router.workers import address
from common import logs, script
from common.script import UserError

Json = dict[str, Any]
READS = ("session", "prefix", "joint")  # policies that look into a request


def prefill(text: str) -> tuple[str, int | None]:
    """argparse type: URL or URL,PORT."""
    url, _, port = text.partition(",")
    if port and not port.isdigit():
        raise UserError(f"{port!r} is no port of a bootstrap server; give --prefill URL,PORT")
    return url, int(port) if port else None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--worker", action="append", default=[], metavar="URL", help="an engine; several times")
    parser.add_argument("--prefill", action="append", default=[], type=prefill, metavar="URL[,PORT]",
                        help="an engine that only prefills, and the port of its bootstrap server")  # fmt: skip
    parser.add_argument("--decode", action="append", default=[], metavar="URL", help="an engine that only decodes")
    parser.add_argument("--policy", type=named, default="joint",
                        help=f"of --worker, one of {', '.join(POLICIES)}; others have their own")  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=script.at_least(1), default=30000)
    parser.add_argument("--tree-size", type=script.at_least(1024), default=2**22, metavar="CHARACTERS",
                        help="of prompts that are remembered (prefix, joint, prefill)")  # fmt: skip
    parser.add_argument("--worker-cache", type=script.at_least(1), metavar="CHARACTERS",
                        help="of prompts (tokens, where they come as token ids) that a worker's KV cache holds; "
                             "older ones do not count. Answers take room there too: give less than it has")  # fmt: skip
    parser.add_argument("--request-tokens", type=script.positive, default=64,
                        help="joint: what a running request weighs, in prompt tokens")  # fmt: skip
    parser.add_argument("--health-path", default="/health")
    parser.add_argument("--health-interval-s", type=script.positive, default=1)
    parser.add_argument("--retries", type=script.at_least(0), default=Limits.retries)
    parser.add_argument("--request-timeout-s", type=script.positive, default=Limits.request_s, help="to send one in")
    parser.add_argument("--connect-timeout-s", type=script.positive, default=Limits.connect_s)
    parser.add_argument(
        "--answer-timeout-s", type=script.positive, default=Limits.first_byte_s, help="to its first byte"
    )
    parser.add_argument("--idle-timeout-s", type=script.positive, default=Limits.idle_s, help="between its bytes")
    parser.add_argument("--stall-timeout-s", type=script.positive, default=Limits.stall_s, help="of a slow reader")
    parser.add_argument("--max-body-mib", type=script.positive, default=16)
    parser.add_argument("--max-connections", type=script.at_least(1), default=Limits.connections)
    parser.add_argument("--shutdown-timeout", type=script.at_least(0), default=30, help="seconds for running requests")
    return parser.parse_args(argv)


def new_router(args: argparse.Namespace) -> Router:
    limits = Limits(
        connections=args.max_connections,
        body_bytes=int(args.max_body_mib * 2**20),
        request_s=args.request_timeout_s,
        connect_s=args.connect_timeout_s,
        first_byte_s=args.answer_timeout_s,
        idle_s=args.idle_timeout_s,
        stall_s=args.stall_timeout_s,
        retries=args.retries,
    )
    router = Router(
        make(args.policy, tree_size=args.tree_size, keeps=args.worker_cache, request_tokens=args.request_tokens),
        reads=args.policy in READS,
        pairs=PrefillDecode(RadixTree(args.tree_size, args.worker_cache)),
        limits=limits,
        admin_key=os.environ.get("ROUTER_ADMIN_KEY", ""),
        health_path=args.health_path,
        health_s=args.health_interval_s,
    )
    for url in args.worker:
        router.fleet.add(url)
    for url, port in args.prefill:
        router.fleet.add(url, "prefill", port)
    for url in args.decode:
        router.fleet.add(url, "decode")
    return router


async def serve(args: argparse.Namespace, bound: socket.socket) -> Json:
    router = new_router(args)
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        router.loop.add_signal_handler(number, asked.set)
    port = await router.listen(sock=bound)
    print(f"ready: http://{args.host}:{port} ({args.policy}, {len(router.fleet.workers)} workers)", flush=True)
    gc.collect()
    gc.freeze()  # what is here now stays: the collector need not look at it again
    await asked.wait()
    await router.stop(args.shutdown_timeout)
    metrics = router.metrics
    return {
        "requests": sum(metrics.answers.values()),
        "retries": sum(metrics.retries.values()),
        "broken": sum(metrics.broken.values()),
        "in_flight": sum(worker.in_flight for worker in router.fleet.workers.values()),
    }


def main(argv: list[str] | None = None) -> Json:
    args = parse_args(argv)
    logs.setup(all_ranks=args.all_ranks)
    logging.getLogger("router").setLevel(logging.INFO)
    if bool(args.prefill) != bool(args.decode):
        raise UserError("prefill and decode workers need each other; give --prefill and --decode")
    if args.worker and args.prefill:
        raise UserError("beside --prefill and --decode a --worker would get next to nothing; give one or the other")
    names = [address(url)[2] for url in [*args.worker, *(url for url, _ in args.prefill), *args.decode]]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"the worker {twice} is there already; name each once")
    bound = bind(args.host, args.port)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file
    return uvloop.run(serve(args, bound))


if __name__ == "__main__":
    script.run(main)
