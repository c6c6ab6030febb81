"""What is wrong in a cluster, the evidence, and the fix: causes first, then what follows from them.

You learn   where Kubernetes says why: a condition, an event, an exit code; and which of twenty symptoms is the cause
Laptop      make setup-kube, then: python -m ch08_kubernetes.plant        (faults on a local cluster, and the doctor)
            python -m ch08_kubernetes.doctor --snapshot snapshot.json     (what --save or kubectl get -o json wrote)
Cluster     python -m ch08_kubernetes.doctor --namespace training --logs  (or -A; with the rights of the role `view`)
You see     numbered causes with evidence and a command that mends them; exit code 1 if anything is wrong
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from ch08_kubernetes.cluster import target
from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor import read
from ch08_kubernetes.doctor.diagnosis import diagnose
from ch08_kubernetes.doctor.facts import name, namespace, owner, ref, text
from ch08_kubernetes.doctor.findings import concerning, inside, lines
from common import script


def subjects(objects: list[Json], kind: str, called: str, space: str | None) -> set[str]:
    """The objects meant by --pod, --job or --node, with those that belong to them.

    Raises:
        UserError: there is none.
    """
    meant = {
        ref(o)
        for o in objects
        if text(o, "kind") == kind and name(o) == called and (kind == "Node" or not space or namespace(o) == space)
    }
    if not meant:
        raise script.UserError(f"there is no {kind.lower()} {called} here; see: kubectl get {kind.lower()}s -A")
    return meant | {ref(o) for o in objects if owner(o) in meant}


def parse_args(argv: list[str] | None):  # type: ignore[no-untyped-def]
    made = script.parser(__doc__)
    scope = made.add_mutually_exclusive_group()
    scope.add_argument("-n", "--namespace", default="default")
    scope.add_argument("-A", "--all-namespaces", action="store_true")
    one = made.add_mutually_exclusive_group()
    for kind in ("pod", "job", "node"):
        one.add_argument(f"--{kind}", metavar="NAME", help=f"only what concerns this {kind}, and its causes")
    made.add_argument("--logs", action="store_true", help="read the last lines of failing containers too")
    made.add_argument("--snapshot", type=Path, help="diagnose saved objects instead of a cluster")
    made.add_argument("--save", type=Path, help="write the objects that were read, to be diagnosed elsewhere")
    made.add_argument("--json", action="store_true", help="findings as JSON instead of text")
    target.add_flags(made)
    return made.parse_args(argv)


def gather(args) -> tuple[read.Snapshot, datetime | None]:  # type: ignore[no-untyped-def]
    """The snapshot, and its time: now, or (None) that of the newest thing in a saved one."""
    if args.snapshot:
        return read.load(args.snapshot), None
    if args.save and not args.save.absolute().parent.is_dir():
        raise script.UserError(f"there is no folder {args.save.absolute().parent}; make it, or name another --save")
    space = None if args.all_namespaces or args.node else args.namespace
    with target.connect(args).api as api:
        snapshot = read.take(api, space)
        if args.logs:
            read.add_logs(api, snapshot, space)
    if args.save:
        with script.atomic_write(args.save) as file:
            json.dump({"apiVersion": "v1", "kind": "List", "items": snapshot.objects}, file, indent=1)
    return snapshot, datetime.now(UTC)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    snapshot, now = gather(args)
    findings = diagnose(snapshot.objects, now, snapshot.logs)
    whole = args.all_namespaces or args.node or args.snapshot
    if not whole:
        every, findings = findings, inside(findings, args.namespace)
        if elsewhere := len(every) - len(findings):
            snapshot.notes.append(f"{elsewhere} findings elsewhere do not concern namespace {args.namespace}; see -A")
    for kind in ("Pod", "Job", "Node"):
        if called := getattr(args, kind.lower()):
            space = None if whole else args.namespace
            findings = concerning(findings, subjects(snapshot.objects, kind, called, space))
    for note in snapshot.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        print("\n".join(lines(findings)) or f"nothing is wrong in {len(snapshot.objects)} objects")
    roots = [finding.cause for finding in findings if not finding.because]
    result = {
        "objects": len(snapshot.objects),
        "findings": len(findings),
        "causes": roots,
        "unread": len(snapshot.notes),
    }
    if findings:
        raise script.CheckFailed(f"{len(roots)} causes of {len(findings)} findings; the fixes stand with them", result)
    return result


if __name__ == "__main__":
    script.run(main)
