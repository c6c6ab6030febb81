"""Break a DDP job in nine ways, and have the tool say what is wrong, on which rank, and where.

You learn   what a hang, a crash or a silent drift looks like from each rank, and how to ask for its cause
Laptop      python ch03_ddp/faults.py --fault all                                       (starts its own ranks)
Two ranks   torchrun --standalone --nproc-per-node=2 ch03_ddp/faults.py --fault deadlock --rank 1
GPU node    torchrun --standalone --nproc-per-node=gpu ch03_ddp/faults.py --fault order
Cluster     srun python ch03_ddp/faults.py --fault uneven
You see     for each fault its verdict: the rank, the collective, its number, shape and line, and what to do about it.
            The bugs are in planted.py, each with its fix beside it; the tool is diagnose/.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from ch03_ddp import diagnose, planted
from common import dist, ranks, script

# The cause that is to be named, where it is not the fault's own name.
CAUSES = {"inplace-bucket": "inplace", "unused-unasked": "unused", "none": "", "uneven-joined": ""}
KNOWN = planted.FAULTS | planted.OTHERS
SPARE_S = 30  # beyond --timeout-s, for the start of the ranks and for the verdict


def provoke(fault: str, guilty: int, args: argparse.Namespace) -> dict[str, Any]:
    """One rank's part in the fault, and what the tool said about it to this rank."""
    began, verdict = time.perf_counter(), None
    check = args.check or fault in planted.CHECKED
    try:
        with dist.session(args.device, timeout_s=60, threads=1) as ctx:
            if not guilty < ctx.world_size:
                raise script.UserError(f"--rank {guilty} is not one of {ctx.world_size} ranks; take a smaller one")
            began = time.perf_counter()
            with diagnose.watch(ctx, timeout_s=args.timeout_s, check=check) as watch:
                verdict = KNOWN[fault](ctx, watch, guilty)
    except diagnose.Fault as found:
        verdict = found.verdict
    return {
        "fault": fault,
        "cause": verdict.cause if verdict else "",
        "rank": verdict.ranks[0] if verdict else None,
        "verdict": str(verdict) if verdict else "nothing found",
        "seconds": time.perf_counter() - began,
    }


def on_own_ranks(fault: str, args: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks, and ask the first one that has survived."""
    limit = args.timeout_s + SPARE_S
    done = ranks.run_ranks(provoke, args.ranks, fault, args.rank, args, timeout_s=limit)
    said = [rank.value for rank in done if rank.value]
    if not said:
        ranks.values(done)  # raises what they did
        raise RuntimeError(f"no rank survived {fault}")
    if any(rank.timed_out for rank in done):
        raise RuntimeError(f"{fault}: a rank was still there after {limit:g} s")
    return said[0]


def right(found: dict[str, Any], args: argparse.Namespace) -> bool:
    cause = CAUSES.get(found["fault"], found["fault"])
    return found["cause"] == cause and (not cause or found["rank"] == args.rank)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--fault", choices=("all", *KNOWN), default="all")
    parser.add_argument("--rank", type=script.at_least(0), default=1, help="the guilty one")
    parser.add_argument("--ranks", type=script.at_least(2), default=3, help="to start, under plain python")
    parser.add_argument("--timeout-s", type=script.positive, default=3, help="a collective that takes longer hangs")
    parser.add_argument("--check", action="store_true", help="compare all calls before they are made")
    args = parser.parse_args(argv)
    launched = dist.read_launch().launcher != "python"
    if launched and args.fault == "all":
        raise script.UserError("--fault all needs new ranks for each; start it with plain python, or name one fault")
    if not launched and args.rank >= args.ranks:
        raise script.UserError(f"--rank {args.rank} is not one of {args.ranks} ranks; take a smaller one")
    script.start(__file__, args)
    found = []
    for fault in planted.FAULTS if args.fault == "all" else [args.fault]:
        found.append(provoke(fault, args.rank, args) if launched else on_own_ranks(fault, args))
        survivor = 1 if (found[-1]["cause"], found[-1]["rank"]) == ("death", 0) else 0
        if not launched or dist.read_launch().rank == survivor:
            print(f"{fault} ({found[-1]['seconds']:.1f} s)\n    {found[-1]['verdict']}", flush=True)
    named = sum(right(each, args) for each in found)
    result = found[0] if len(found) == 1 else {each["fault"].replace("-", "_"): each["cause"] for each in found}
    result = result | {"faults": len(found), "named": named}
    result |= {"seconds_longest": max(each["seconds"] for each in found), "timeout_s": args.timeout_s}
    if named < len(found):
        raise script.CheckFailed(f"{len(found) - named} of {len(found)} faults were not named rightly", result)
    return result


if __name__ == "__main__":
    script.run(main)
