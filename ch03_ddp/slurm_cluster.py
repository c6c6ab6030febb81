"""A real Slurm of two nodes on one machine, for one command: submit, preempt, requeue, and nothing is left of it.

You learn   what sbatch and srun do with a launch file, what a job is told before it is preempted, and what a requeue
            is, on a cluster where nobody waits in a queue and nothing can be broken
Laptop      python -m ch03_ddp.slurm_cluster
Two nodes   python -m ch03_ddp.slurm_cluster -- srun --nodes=2 hostname
A job       python -m ch03_ddp.slurm_cluster -- sbatch ch03_ddp/launch/train.sbatch ch03_ddp/train_ddp.py --steps 20
By hand     python -m ch03_ddp.slurm_cluster -- bash -c 'sinfo; squeue; scontrol show nodes'
Cluster     there is one already: the part behind the -- as it is
You see     without a COMMAND: the nodes and how long they took. With one: its output and that of the jobs it submitted,
            and on stderr each change of a job's state. The exit code is the command's, or 1 if a job failed.

It stands on chapter 2's virtual cluster: each node is a virtual host, with a slurmd, a name, an address and a link of
its own; host0 also runs slurmctld and munged. Two partitions: `batch`, and `urgent`, whose jobs take the nodes away
from batch's: SIGTERM, GraceTime to save, back into the queue. A job's output is also a file in the run folder.
slurm_node.py is what runs inside.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence

from ch02_hardware_parallelism import virtual_cluster
from ch03_ddp import slurm_node
from common import process, script

INSIDE = [sys.executable, "-c", "from ch03_ddp import slurm_node; slurm_node.main()"]


def why_not() -> str | None:
    """What this machine lacks for a Slurm of its own and what to do, None if it can be made."""
    path = virtual_cluster.environment()["PATH"]
    if missing := [name for name in slurm_node.PROGRAMS if not shutil.which(name, path=path)]:
        return f"{', '.join(missing)} not found; install slurm-wlm and munge (make system-deps)"
    if not slurm_node.HOME.is_dir():
        return f"there is no folder {slurm_node.HOME} to hide the cluster's files behind; create it, empty"
    return virtual_cluster.why_not()


def run(
    command: Sequence[str], *, nodes: int = 2, timeout_s: float = 300, grace_s: int = 60, env: dict | None = None
) -> process.Finished:
    """Run `command` in a Slurm cluster of its own, as the command line does; stdout has the jobs' output too."""
    flags = ["--nodes", str(nodes), "--grace-s", str(grace_s), "--timeout-s", "1e6"]
    line = [sys.executable, "-m", "ch03_ddp.slurm_cluster", *flags, "--", *command]
    return process.run(line, timeout_s=timeout_s, env=env)


def main(argv: list[str] | None = None) -> dict:
    words = sys.argv[1:] if argv is None else argv
    end = words.index("--") if "--" in words else len(words)
    command = words[end + 1 :]
    parser = script.parser(__doc__)
    parser.usage = "%(prog)s [flags] [-- COMMAND ...]"
    parser.add_argument("--nodes", type=script.at_least(1), default=2)
    parser.add_argument("--rate", default="1gbit", help="of each node's link, each way, in tc's units")
    parser.add_argument("--grace-s", type=script.at_least(0), default=60, help="GraceTime of a preempted job")
    parser.add_argument("--timeout-s", type=script.positive, default=600)
    args = parser.parse_args(words[:end])
    cluster = virtual_cluster.plan(hosts=args.nodes, rate=args.rate)
    if end < len(words) and not command:
        raise script.UserError("no COMMAND behind the --; write one, or drop the -- to see the nodes")
    if reason := why_not():
        raise script.UserError(reason)
    if command:
        virtual_cluster.check_command("command", command)
    virtual_cluster.check_here()
    folder = script.start(__file__, args).folder.resolve()
    os.environ.setdefault("SBATCH_OUTPUT", str(folder / "%x-%j.out"))
    words_inside = {"nodes": args.nodes, "grace_s": args.grace_s, "command": command}
    started = time.monotonic()
    code, out = virtual_cluster.bring_up(
        cluster, "command", [*INSIDE, json.dumps(words_inside)], on=None, timeout_s=args.timeout_s, capture=not command
    )
    if command or code:
        raise SystemExit(code)
    print(out, end="")
    return {"nodes_idle": out.count(" idle "), "seconds": time.monotonic() - started}


if __name__ == "__main__":
    script.run(main)
