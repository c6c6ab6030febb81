"""Break a DeepSpeed job in thirteen ways, and have a program say what is wrong and what to do, in one line each.

You learn   which mistakes DeepSpeed refuses and which it takes without a word; which part of the memory did not fit,
            and which stage would; a hang, a loss scale, a NaN and a slow disk told from what they look like
Laptop      python ch05_deepspeed_megatron/debug_deepspeed.py                        (starts its own ranks)
One         python ch05_deepspeed_megatron/debug_deepspeed.py --fault overflow,nan
GPU node    python ch05_deepspeed_megatron/debug_deepspeed.py --fault all --ranks 2
Cluster     in your own script: diagnose.watch names a hang, part() what did not fit into memory, FirstNotFinite the
            module of a NaN; debug_faults.py shows each in use
You see     for each fault its verdict: what, and the cure; RESULT says for each which cause was named
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ch03_ddp import diagnose
from ch05_deepspeed_megatron import debug_faults
from ch05_deepspeed_megatron.debug_faults import BAD, CAPS, HANG_CURES, HANGS, MISTAKEN, NUMBERS
from common import dist, exercises, ranks, script

ALONE = (*BAD, *NUMBERS, "slow-offload")  # on one rank
MEMORY = {f"oom-stage-{stage}": stage for stage in CAPS}
CAUSES = (
    MISTAKEN
    | {name: CAPS[stage][2] for name, stage in MEMORY.items()}
    | {name: cause for name, (_, cause) in HANGS.items()}
    | {"overflow": "overflow", "nan": "nan", "slow-offload": "aio", "none": ""}
)


def provoke(fault: str, args: argparse.Namespace, cure: int | None = None) -> dict[str, Any]:
    """One rank's part in the fault, or in its cure, and what was said about it to this rank."""
    cause, text, verdict = "", "nothing found", None
    begin = time.perf_counter()
    try:
        timeout_s = 20 if fault in MEMORY else 60  # one rank may run out alone, and the other wait for it
        with dist.session(args.device, timeout_s=timeout_s, threads=1) as ctx:
            if fault in HANGS:
                with diagnose.watch(ctx, timeout_s=args.timeout_s) as watch:
                    HANGS[fault][0](ctx, watch, ctx.world_size - 1)
            elif fault in MEMORY:
                stage = MEMORY[fault]
                verdict = debug_faults.no_room(stage if cure is None else cure, ctx, capped_as=stage)
            elif fault in BAD:
                verdict = debug_faults.bad_config(fault, ctx)
            elif fault == "slow-offload":
                verdict = debug_faults.slow_offload(ctx, args.nvme_dir)
            else:
                verdict = NUMBERS[fault](ctx)
            if verdict:
                cause, text = verdict.cause, str(verdict)
    except diagnose.Fault as found:
        cause, text = found.verdict.cause, str(found.verdict)
        if cause in HANG_CURES:
            text = f"{found.verdict.text}; {HANG_CURES[cause]}"
    seconds = time.perf_counter() - begin
    return {"fault": fault, "cause": cause, "verdict": text, "stage": verdict and verdict.stage, "seconds": seconds}


def on_own_ranks(fault: str, args: argparse.Namespace, cure: int | None = None) -> dict[str, Any]:
    """Start the ranks, and ask the first one that has survived."""
    count = 1 if fault in ALONE else args.ranks
    done = ranks.run_ranks(provoke, count, fault, args, cure, timeout_s=args.timeout_s + 90)
    said = [rank.value for rank in done if rank.value]
    if not said:
        ranks.values(done)  # raises what they did
        raise RuntimeError(f"no rank survived {fault}")
    return next((one for one in said if one["cause"]), said[0])


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--fault", default="all", help=f"all, or of: {', '.join(CAUSES)}")
    parser.add_argument("--ranks", type=script.at_least(2), default=2, help="of the faults that need several")
    parser.add_argument("--timeout-s", type=script.positive, default=8, help="until a hang is looked into")
    parser.add_argument("--nvme-dir", type=Path, help="a folder on the disk of slow-offload (default: temporary)")
    args = parser.parse_args(argv)
    faults = list(CAUSES) if args.fault == "all" else args.fault.split(",")
    if unknown := [name for name in faults if name not in CAUSES]:
        raise script.UserError(f"no fault {unknown[0]!r}; one of {', '.join(CAUSES)}")
    if args.nvme_dir and not args.nvme_dir.is_dir():
        raise script.UserError(f"no folder {args.nvme_dir}; make it on the disk to look at")
    script.start(__file__, args)
    ranks.preload("ch05_deepspeed_megatron.debug_faults", "transformers.models.llama.modeling_llama")
    skipped = {}
    if "slow-offload" in faults and (lacking := exercises.missing_for("aio")):
        faults.remove("slow-offload")
        skipped["slow-offload"] = f"needs {lacking}"
    found, proven = [], {}
    for fault in faults:
        found.append(one := on_own_ranks(fault, args))
        print(f"{fault} ({one['seconds']:.1f} s)\n    {one['verdict']}", flush=True)
        if (stage := one["stage"]) is not None:
            tried = on_own_ranks(fault, args, cure=stage)
            proven[fault] = not tried["cause"]
            print(f"    tried under the same cap: stage {stage} {'trains' if proven[fault] else 'does not train'}")
    for fault, why in skipped.items():
        print(f"{fault}: skipped, {why}")
    named = [one["fault"] for one in found if one["cause"] == CAUSES[one["fault"]]]
    result = {one["fault"].replace("-", "_"): one["cause"] for one in found}
    result |= {"faults": len(found), "named": len(named), "skipped": len(skipped), "cures_proven": sum(proven.values())}
    if wrong := [one for one in found if one["fault"] not in named]:
        raise script.CheckFailed(f"{wrong[0]['fault']} was not named rightly: {wrong[0]['verdict']}", result)
    if failed := [fault for fault, trains in proven.items() if not trains]:
        raise script.CheckFailed(f"what was said to cure {failed[0]} does not", result)
    return result


if __name__ == "__main__":
    script.run(main)
