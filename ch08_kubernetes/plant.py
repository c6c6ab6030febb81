"""Plant faults on a local cluster and let the doctor name them: what goes wrong, and what it looks like.

You learn   what each fault leaves behind in the API, and which of the things that look wrong is the cause
Laptop      make setup-kube, then: python -m ch08_kubernetes.plant              (all of them)
            python -m ch08_kubernetes.plant --only deadlock,quota --show        (two, with evidence and fix)
GPU node    the same command: no GPU is touched, the nodes are not real
You see     a table: fault, the cause that must be named first, what the doctor named first, and what follows from it
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

from ch08_kubernetes.cluster.kubelet import FakeKubelet
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.doctor import faults, planting, read
from ch08_kubernetes.doctor.diagnosis import diagnose
from ch08_kubernetes.doctor.findings import Finding, inside, lines
from common import script

SOON = {"horizontal-pod-autoscaler-sync-period": "2s"}  # instead of 15 s


def named(fault: faults.Fault, found: list[Finding], space: str) -> bool:
    """Whether the cause is the first finding and the only root, with its consequences below it."""
    if not fault.cause:
        return not found
    roots = [finding for finding in found if not finding.because]
    below = [finding.cause for finding in found[1:]]
    right = len(roots) == 1 and roots[0].cause == fault.cause and fault.says.replace("%s", space) in found[0].message
    return right and set(fault.then) <= set(below)


def grow(
    planted: dict[str, tuple[faults.Fault, planting.Planter, list[planting.Step]]], timeout_s: float
) -> dict[str, list[Finding]]:
    """Take the steps until all is planted and named; at the limit, what is found by then.

    Returns:
        findings by namespace, all of one last snapshot.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        late = time.monotonic() > deadline
        for _, at, steps in planted.values():
            while steps and steps[0](at):
                steps.pop(0)
        api = next(iter(planted.values()))[1].api
        found = diagnose(read.take(api).objects, faults.soon())
        each = {space: inside(found, space) for space in planted}
        if late or all(not steps and named(fault, each[space], space) for space, (fault, _, steps) in planted.items()):
            return each
        time.sleep(0.3)


def parse_args(argv: list[str] | None):  # type: ignore[no-untyped-def]
    made = script.parser(__doc__)
    names = [fault.name for fault in faults.FAULTS]
    made.add_argument("--only", type=script.comma_list(str), metavar="NAMES", help=f"of: {', '.join(names)}")
    made.add_argument("--show", action="store_true", help="print each finding whole")
    made.add_argument("--timeout-s", type=script.positive, default=120)
    args = made.parse_args(argv)
    if unknown := sorted(set(args.only or []) - set(names)):
        raise script.UserError(f"there is no fault {unknown[0]}; known are {', '.join(names)}")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    script.start(__file__, args)
    chosen = [fault for fault in faults.FAULTS if not args.only or fault.name in args.only]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plant-")))
        cluster = stack.enter_context(LocalCluster(folder / "cluster", controller_manager_options=SOON))
        api = stack.enter_context(cluster.client())
        kubelet = stack.enter_context(FakeKubelet(api))
        planted = {}
        for fault in [faults.HEALTHY, *chosen]:
            planted[fault.name] = (fault, *faults.plant(fault, api, kubelet, fault.name))
        if sys.stderr.isatty():
            print(f"{len(chosen)} faults are planted; waiting until they show", file=sys.stderr)
        found = grow(planted, args.timeout_s)
    right = 0
    print(f"{'fault':12} {'must be named first':24} {'is named first':24} and below it")
    for space, (fault, *_) in planted.items():
        each = found[space]
        fine = named(fault, each, space)
        right += fine and bool(fault.cause)
        below = ", ".join(dict.fromkeys(finding.cause for finding in each[1:])) or "-"
        first = each[0].cause if each else "nothing"
        print(f"{fault.name:12} {fault.cause or 'nothing':24} {first:24} {below}{'' if fine else '   WRONG'}")
        if args.show:
            print("\n".join(lines(each)))
    result = {"planted": len(chosen), "named": right, "findings_when_healthy": len(found[faults.HEALTHY.name])}
    if right < len(chosen) or result["findings_when_healthy"]:
        raise script.CheckFailed("not all causes are named; pass --show, or a longer --timeout-s", result)
    return result


if __name__ == "__main__":
    script.run(main)
