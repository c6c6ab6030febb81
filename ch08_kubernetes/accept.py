"""All manifests of this chapter, sent to a real API server: what it takes, what is changed for it, what it drops.

You learn   what an API server checks that a schema cannot (a selector that misses its template, a request that is not
            the limit), and what an old one drops without a word
Laptop      python -m ch08_kubernetes.accept                                  (make setup-kube first)
            python -m ch08_kubernetes.accept ch08_kubernetes/training/overlays/dev my.yaml
GPU node    the same; of a cluster of your own ask: kubectl apply --dry-run=server -f FILE
Cluster     as on a GPU node
You see     a line for each object, below it what was converted or dropped; RESULT counts them

The server is a local control plane (cluster/local.py). Namespaces and the definitions of custom resources are made for
real; all else is a dry run: validated and admitted like a request that is meant, and not kept, so that overlays of the
same Job do not meet.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kubernetes.client import ApiClient

from ch08_kubernetes.cluster.apply import Refused, Report, apply, objects
from ch08_kubernetes.cluster.local import LocalCluster
from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.lint.objects import files
from ch08_kubernetes.lint.schemas import OF_TOOLS
from common import script


def sent_to_server(body: Json) -> bool:
    """Whether it is for an API server: kind's and the scheduler's own files are not."""
    return body["apiVersion"].partition("/")[0] not in OF_TOOLS


def namespaces(bodies: Iterable[Json]) -> list[Json]:
    """Those that objects are in. They may be made by another file, or by what is a prerequisite."""
    names = {body["metadata"].get("namespace", "default") for body in bodies}
    names |= {body["metadata"]["name"] for body in bodies if body["kind"] == "Namespace"}
    return [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in sorted(names)]


def accept(api: ApiClient, paths: Iterable[Path]) -> tuple[dict[Path, Report], list[str]]:
    """Send what is at each of these paths; the reports, and what was refused with the server's words."""
    bodies = {path: [body for body in objects(path) if sent_to_server(body)] for path in paths}
    apply(api, namespaces([body for found in bodies.values() for body in found]))
    reports, refused = {}, []
    for path, found in bodies.items():
        report = reports[path] = Report()
        for body in found:
            try:
                one = apply(api, body, dry_run=True)
            except Refused as error:
                refused.append(f"{path}: {error}")
                continue
            report.done |= one.done
            report.conversions |= one.conversions
            report.dropped |= one.dropped
    return reports, refused


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(__file__).parent], metavar="PATH")
    args = parser.parse_args(argv)
    paths = files(args.paths)
    with tempfile.TemporaryDirectory() as folder, LocalCluster(Path(folder) / "cluster") as cluster:
        reports, refused = accept(cluster.client(), paths)
    for path, report in reports.items():
        if report.done:
            print(f"{path}\n{report}")
    for line in refused:
        print(f"refused: {line}")
    definition = "CustomResourceDefinition/"
    kinds = Counter(name.startswith(definition) for report in reports.values() for name in report.done)
    result = {
        "accepted": kinds[False], "refused": len(refused), "definitions": kinds[True],
        "converted": sum(len(report.conversions) for report in reports.values()),
        "with_fields_dropped": sum(len(report.dropped) for report in reports.values()),
    }  # fmt: skip
    if refused:
        raise script.CheckFailed(f"{len(refused)} objects are refused; see the lines above", result)
    return result


if __name__ == "__main__":
    script.run(main)
