"""Check manifests offline: strict schemas, rules for AI pods, what objects need of each other, and PromQL.

You learn   what an API server accepts and a cluster still gets wrong: a literal $HF_TOKEN, a start-up shorter than the
            model takes to load, a budget that blocks every drain, a query that breaks at two replicas
Laptop      python -m ch08_kubernetes.lint ch08_kubernetes
            python -m ch08_kubernetes.lint my.yaml overlays/prod          (a folder with kustomization.yaml is rendered)
GPU node    the same command: nothing is sent anywhere
You see     a line for each fault, `file:line: rule: object: what; what to do`, and exit code 1; or none
"""

from __future__ import annotations

from pathlib import Path

from ch08_kubernetes.lint.objects import Finding, Object, files, pods, read, rendered
from common import script


def load(path: Path) -> tuple[list[Object], list[Finding]]:
    """The objects of a file, or of a folder as kustomize renders it."""
    return read(path, rendered(path)) if path.is_dir() else read(path)


def check(paths: list[Path]) -> tuple[list[Object], list[Finding]]:
    """All objects under `paths`, and the faults in them.

    Files of one folder belong together, as one `kubectl apply -f FOLDER`; each folder that is rendered is a set of its
    own. Names that objects refer to, and recording rules, may be in any.

    Raises:
        UserError: a path cannot be read, or a package is missing.
    """
    try:
        from ch08_kubernetes.lint import group_rules, pod_rules, promql, schemas
    except ModuleNotFoundError as error:
        raise script.UserError(f"the package {error.name} is missing; run make setup") from None
    sets: dict[Path, list[Object]] = {}
    fit: dict[Path, list[Object]] = {}  # those whose fields are of the types that the rules read
    findings: list[Finding] = []
    for path in files(paths):
        found, faults = load(path)
        folder = path if path.is_dir() else path.parent
        sets.setdefault(folder, []).extend(found)
        findings += faults
        for owner in found:
            faults = list(schemas.check(owner))
            findings += faults
            if all(fault.rule != "schema" for fault in faults):
                fit.setdefault(folder, []).append(owner)
    every = [owner for objects in fit.values() for owner in objects]
    for owner in every:
        for pod in pods(owner):
            for rule in pod_rules.RULES.values():
                try:
                    findings += list(rule(pod))
                except script.UserError as error:  # a quantity that is none
                    findings.append(pod.finding("schema", str(error)))
    for objects in fit.values():
        for between in group_rules.RULES.values():
            findings += between(objects, every)
    findings += promql.check(every)
    ordered = sorted(set(findings), key=lambda f: (f.where.split(":")[0], int(f.where.split(":")[1]), f.rule))
    return [owner for objects in sets.values() for owner in objects], ordered


def main(argv: list[str] | None = None) -> dict:
    made = script.parser(__doc__)
    made.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="manifests, or folders of them")
    args = made.parse_args(argv)
    objects, findings = check(args.paths)
    for finding in findings:
        print(finding)
    result = {"objects": len(objects), "findings": len(findings)}
    if findings:
        raise script.CheckFailed(f"{len(findings)} faults in {len(objects)} objects; see the lines above", result)
    return result


if __name__ == "__main__":
    script.run(main)
