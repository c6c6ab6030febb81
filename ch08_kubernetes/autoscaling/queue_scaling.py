"""Workers from none to three and back to none by a queue's length: KEDA's formula over a real Redis list and processes.

You learn   scaling by a queue without losing what a killed worker had in hand: the worker and the formula of the
            cluster, with processes in place of pods
Laptop      python -m ch08_kubernetes.autoscaling.queue_scaling
            python -m ch08_kubernetes.autoscaling.queue_scaling --requests 200 --share 20
GPU node    python -m ch08_kubernetes.autoscaling.queue_scaling --serve vllm:1b
Cluster     kubectl apply -f ch08_kubernetes/autoscaling/keda-redis.yaml
You see     at each poll the queue, the workers and how many are started; one worker is killed with -9; every request is
            answered once
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import redis
import yaml

from ch06_vllm.started import HELP, engine_and_model, server
from ch08_kubernetes.autoscaling.algorithms import jobs_to_start
from common import process, script
from common.exercises import missing_for
from common.ranks import free_port

LIST = "prompts"
MANIFEST = Path(__file__).parent / "keda-redis.yaml"


def strategy() -> str:
    """The ScaledJob's own."""
    bodies = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return next(str(b["spec"]["scalingStrategy"]["strategy"]) for b in bodies if b["kind"] == "ScaledJob")


def until_up(client: redis.Redis, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            client.ping()
            return
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise script.UserError(
                    f"redis-server does not answer after {timeout_s:g} s; see whether it starts"
                ) from None
            time.sleep(0.05)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--serve", type=engine_and_model, default=("ours", "nano"), help=f"the engine; {HELP}")
    parser.add_argument("--requests", type=script.at_least(4), default=40)
    parser.add_argument("--tokens", type=script.at_least(1), default=32, help="of each answer")
    parser.add_argument("--share", type=script.at_least(1), default=10, help="requests a worker (listLength)")
    parser.add_argument("--most", type=script.at_least(1), default=3, help="workers (maxReplicaCount)")
    parser.add_argument("--poll-s", type=script.positive, default=1.0, help="pollingInterval")
    parser.add_argument("--timeout-s", type=script.positive, default=240)
    args = parser.parse_args(argv)
    if lacking := missing_for("redis"):
        raise script.UserError(f"the queue needs {lacking}")
    run = script.start(__file__, args)
    port, by = free_port(), strategy()
    url = f"redis://127.0.0.1:{port}"
    started: list[process.Child] = []
    retried: list[process.Child] = []
    peak, killed, polls = 0, False, 0
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(server(args.serve))
        words = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(run.folder)]
        stack.enter_context(process.Child(words))
        client = redis.Redis(port=port, decode_responses=True)
        until_up(client)
        for number in range(args.requests):
            body = {"id": f"r{number}", "prompt": f"def f{number}(", "max_tokens": args.tokens, "temperature": 0}
            client.lpush(LIST, json.dumps(body))
        command = ["python", "-m", "ch08_kubernetes.autoscaling.queue_worker", "--redis", url, "--list", LIST,
                   "--engine", engine.url, "--idle-exit", "1", "--lease-s", "3"]  # fmt: skip
        print(f"{'s':>5}{'queue':>7}{'answered':>10}{'workers':>9}{'started':>9}", flush=True)
        began = time.monotonic()
        while True:
            running = [child for child in started if child.process.poll() is None]
            waiting, answered = int(client.llen(LIST)), int(client.hlen(f"{LIST}:results"))
            pending = sum(not any("waits for requests" in line for line in child.out) for child in running)
            new = jobs_to_start(waiting, args.share, len(running), pending, args.most, by)
            started += [stack.enter_context(process.Child(command)) for _ in range(new)]
            peak, polls = max(peak, len(running) + new), polls + 1
            print(f"{time.monotonic() - began:>5.0f}{waiting:>7}{answered:>10}{len(running):>9}{new:>9}", flush=True)
            if answered and not killed:
                running[0].kill()  # what it had in hand comes back when its lease has run out
                killed = True
            # KEDA sees no request that a dead worker holds, if the list is empty: the Job's own retry gives it back.
            failed = [child for child in started if child.process.poll() and child not in retried]
            retried += failed
            started += [stack.enter_context(process.Child(command)) for _ in failed]
            if not waiting and not running and not new and not failed:
                break
            if time.monotonic() - began > args.timeout_s:
                raise script.UserError(f"not done after {args.timeout_s:g} s; see the workers' lines, or ask for fewer")
            time.sleep(args.poll_s)
        answered, left = int(client.hlen(f"{LIST}:results")), sorted(client.keys(f"{LIST}:*"))
    left = [key for key in left if key != f"{LIST}:results"]
    result = {"requests": args.requests, "answered": answered, "peak": peak, "workers_last": 0, "killed": int(killed),
              "started": len(started), "retried": len(retried), "left": left}  # fmt: skip
    if answered != args.requests or left:
        raise script.CheckFailed(f"{args.requests - answered} requests were lost, or {left} is left", result)
    return result


if __name__ == "__main__":
    script.run(main)
