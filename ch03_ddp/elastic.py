"""Lose a node and get it back: torchrun goes on with what is left, then with all again.

You learn   how torchrun's agents notice that a node is gone or has come, what a restart costs, and why a job whose
            global batch does not depend on its ranks computes the same all along
Laptop      python ch03_ddp/elastic.py                        (two agents on this machine stand for two nodes)
GPU node    python ch03_ddp/elastic.py --preset small --ranks-a-node 4
Cluster     launch/torchrun_c10d.sh with NNODES=1:8 on every node; a node that comes back joins by starting it again
You see     the steps done by two nodes, by one, and by two again; losses within some 1e-6 of a run that nothing
            happened to, and every sequence taken once

A node that comes late has counted other restarts than those that were there. Each round of the job therefore needs a
store of its own: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, on every node.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ch03_ddp.survive import Job, choose_device
from common import ranks, script
from common.logs import get_logger
from common.process import Child

log = get_logger()


class Nodes:
    """Agents of one job, each a process tree that can be killed whole, as a node is by a power cut."""

    def __init__(self, job: Job, args: argparse.Namespace) -> None:
        self.job, self.args, self.port = job, args, ranks.free_port()
        self.up: dict[str, Child] = {}

    def start(self, name: str) -> None:
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{self.port}", "--rdzv-id", "elastic"]
        # For how long the ones that are here wait for more, once there are enough. b will die: they meet at a.
        words = f"last_call_timeout={self.args.last_call_s:g},keep_alive_interval=1,is_host={int(name == 'a')}"
        meet += ["--rdzv-conf", words]
        size = ["--nnodes", "1:2", "--nproc-per-node", str(self.args.ranks_a_node), "--max-restarts", "5"]
        training = self.job.words(self.args.flags)
        env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        if self.args.device != "cpu":  # each node its own GPUs
            first = "ab".index(name) * self.args.ranks_a_node
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + self.args.ranks_a_node)))
        self.up[name] = Child(["torchrun", *size, *meet, "--monitor-interval", "0.5", *training], env=env)

    def kill(self, name: str) -> None:
        self.up.pop(name).kill()

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Raises UserError if it does not come to pass, or the job ends first."""
        deadline = time.monotonic() + self.args.timeout_s
        while not condition():
            if ended := [child for child in self.up.values() if child.process.poll() is not None]:
                raise script.UserError(f"the job ended before {what} ({ended[0].wait(5).reason()})")
            if time.monotonic() > deadline:
                raise script.UserError(f"{what} did not come in {self.args.timeout_s:g} s; raise --timeout-s")
            time.sleep(0.05)

    def finish(self) -> dict:
        """The RESULT, from the node that has rank 0."""
        results = [child.wait(self.args.timeout_s).result for child in self.up.values()]
        found = [result for result in results if result is not None]
        if not found:
            raise script.UserError("no node ended well; run the two torchrun commands by hand to see why")
        return found[-1]

    def stop(self) -> None:
        for child in self.up.values():
            child.stop()


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--steps", type=script.at_least(20), default=60)
    parser.add_argument("--save-every", type=script.at_least(1), default=5)
    parser.add_argument("--global-batch", type=script.at_least(1), default=8)
    parser.add_argument("--seq-len", type=script.at_least(2), default=64)
    parser.add_argument("--ranks-a-node", type=script.at_least(1), default=1)
    parser.add_argument("--last-call-s", type=script.positive, default=2, help="wait so long for more nodes to join")
    parser.add_argument("--timeout-s", type=script.positive, default=120, help="for each thing to come to pass")
    args = parser.parse_args(argv)
    args.dropout, args.dtype = 0.0, "fp32"  # so that the losses can be compared over numbers of ranks
    both, one = 2 * args.ranks_a_node, args.ranks_a_node
    # Each agent would take all cores for its own ranks.
    args.flags = ("--threads", str(max(1, script.usable_cores() // both)))
    choose_device(args, both)
    run = script.start(__file__, args)
    folder = Path(tempfile.mkdtemp(prefix="elastic-"))
    try:
        alone = Job(folder / "alone", args)
        alone.finish(one, *args.flags)
        job = Job(folder / "elastic", args)
        nodes = Nodes(job, args)
        try:
            nodes.start("a")
            nodes.start("b")
            first = args.steps // 4
            nodes.wait_for(
                lambda: len(job.losses()) >= first and job.newest_ranks() == both, f"step {first} on two nodes"
            )
            nodes.kill("b")
            begin = time.monotonic()
            log.info("node b is gone: killed -9", after_step=len(job.losses()))
            nodes.wait_for(lambda: job.newest_ranks() == one, "training on one node")
            down_s = time.monotonic() - begin
            nodes.start("b")  # its start takes seconds, in which the other node trains
            log.info("node b is coming back", after_step=len(job.losses()))
            ended = nodes.finish()
        finally:
            nodes.stop()
        shares = job.ranks_by_step()
        again = sum(1 for _ in itertools.takewhile(lambda n: n == both, reversed(shares.values())))
        if not again:
            raise script.UserError("training was done before node b was back; raise --steps")
        differences = [abs(a - b) for a, b in zip(job.losses(), alone.losses(), strict=True)]
        result = {
            "nodes": 2,
            "steps_on_two_nodes": sum(n == both for n in shares.values()),
            "steps_on_one_node": sum(n == one for n in shares.values()),
            "steps_on_two_nodes_again": again,
            "ranks_at_the_end": ended["world_size"],
            "down_s": down_s,
            "largest_loss_difference": max(differences),
            "sequences_equal": job.samples() == alone.samples(),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    run.log(**result)
    print(story(shares))
    print(f"losses differ from an undisturbed run by {max(differences):.1e} at most; {down_s:.1f} s without a step")
    return result


def story(shares: dict[int, int]) -> str:
    """steps 1-20 on 2, 21-43 on 1, 44-60 on 2 ranks"""
    parts: list[list[int]] = []
    for step, ranks_then in shares.items():
        if parts and parts[-1][2] == ranks_then:
            parts[-1][1] = step
        else:
            parts.append([step, step, ranks_then])
    return "steps " + ", ".join(f"{first}-{last} on {n}" for first, last, n in parts) + " ranks"


if __name__ == "__main__":
    script.run(main)
