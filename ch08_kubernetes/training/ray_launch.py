"""Ranks of a training script as Ray tasks: a GPU (or CPUs) each, placed all together or not at all.

You learn   what Ray gives a launcher (a placement group is a gang; a task has its GPU to itself) and what it leaves:
            ranks, a meeting point, and an end of all when one fails
Laptop      python -m ch08_kubernetes.training.ray_launch --ranks 2 ch03_ddp/train_ddp.py --preset nano --steps 20
GPU node    python -m ch08_kubernetes.training.ray_launch --ranks 8 --gpus 1 ch03_ddp/train_ddp.py --preset small
Cluster     kubectl apply -f ch08_kubernetes/training/operators/rayjob.yaml
You see     the script's own lines, and its RESULT from rank 0
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from typing import Any

from common import script


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    made = script.parser(__doc__)
    made.add_argument("--ranks", type=script.at_least(1), default=2)
    made.add_argument("--cpus", type=script.at_least(1), default=1, help="of a rank")
    made.add_argument("--gpus", type=script.at_least(0), default=0, help="of a rank: 0 or 1")
    made.add_argument("--placement-timeout-s", type=script.positive, default=600, help="until all ranks have a place")
    made.add_argument("script", help="like ch03_ddp/train_ddp.py")
    made.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    return made.parse_args(argv)


def meeting_point() -> tuple[str, int]:
    """Address and a free port of the node that this runs on."""
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def one_rank(rank: int, world_size: int, address: str, port: int, command: list[str]) -> str:
    """Run one rank to its end; its standard output, which is also shown as it comes.

    Raises:
        RuntimeError: it failed. Ray hands that to the driver, which ends the others.
    """
    # A task is a node of its own to the script: Ray shows it one GPU, number 0.
    env = {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address, "MASTER_PORT": str(port),
    }  # fmt: skip
    kept = []
    with subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                print(line, end="", flush=True)
                kept.append(line)
        finally:
            child.terminate()  # also where Ray cancels the task: SIGTERM saves
    if child.returncode:
        raise RuntimeError(f"rank {rank} ended with {child.returncode}")
    return "".join(kept)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    command = [sys.executable, "-u", "-m", "ch08_kubernetes.training.rank", args.script, *args.flags]
    ray.init(log_to_driver=True)
    try:
        group = placement_group([{"CPU": args.cpus, "GPU": args.gpus}] * args.ranks, strategy="PACK")
        if not group.wait(args.placement_timeout_s):
            raise script.UserError(
                f"no place for {args.ranks} ranks of {args.cpus} CPUs and {args.gpus} GPUs after "
                f"{args.placement_timeout_s:g} s; see `ray status`, or take fewer --ranks"
            )

        def placed(function: Any, rank: int) -> Any:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            return ray.remote(function).options(
                num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0, scheduling_strategy=where
            )

        address, port = ray.get(placed(meeting_point, 0).remote())
        tasks = [placed(one_rank, n).remote(n, args.ranks, address, port, command) for n in range(args.ranks)]
        waiting = list(tasks)
        try:
            while waiting:  # the first that fails ends all
                done, waiting = ray.wait(waiting)
                ray.get(done)
        except ray.exceptions.RayError as error:
            for task in waiting:
                ray.cancel(task)
            raise script.UserError(
                f"{str(error).strip().splitlines()[-1].removeprefix('RuntimeError: ')}; see its lines above"
            ) from None
        said = [line for line in ray.get(tasks[0]).splitlines() if line.startswith("RESULT ")]
    finally:
        ray.shutdown()
    if not said:
        raise script.UserError("rank 0 printed no RESULT; see its lines above")
    return dict(json.loads(said[-1].removeprefix("RESULT ")))


if __name__ == "__main__":
    script.run(main)
