"""Send manifests to any API server, also an old one, and say what it did not take as it was meant.

report = apply(cluster.client(), Path("ch08_kubernetes/scheduling"))
print(report)

Objects are created, or changed where they exist (a merge patch, RFC 7396). Kinds that the server lacks are looked up
among older versions of their group, then among the published custom resources in lint/crds, which it is then taught.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException

from ch08_kubernetes.cluster import convert
from ch08_kubernetes.cluster.discovery import Resource, Server, group_of, of
from ch08_kubernetes.cluster.rest import Json, call, find, reason_of
from ch08_kubernetes.lint.objects import files, read, rendered
from common.script import UserError

CRDS = Path(__file__).parents[1] / "lint" / "crds"
FIRST = {"CustomResourceDefinition": 0, "Namespace": 1, "PriorityClass": 2, "ServiceAccount": 2}  # others: 3
Source = Json | Path | str


class Refused(UserError):
    """The server takes an object not; `status` is the HTTP code and `reason` its words."""

    def __init__(self, name: str, error: ApiException) -> None:
        self.status, self.reason = error.status, reason_of(error)
        super().__init__(f"{name} is refused ({self.status}): {self.reason}; correct what it names")


@dataclass
class Report:
    """What became of each object, by `Kind/namespace/name`.

    Attributes:
        done: created, changed, unchanged or deleted.
        conversions: what was changed so that this server takes it.
        dropped: fields that were sent and that the server does not know.
    """

    done: dict[str, str] = field(default_factory=dict)
    conversions: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, list[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for name, what in self.done.items():
            lines.append(f"{what:9} {name}")
            lines += [f"          converted: {note}" for note in self.conversions.get(name, [])]
            lines += [f"          dropped: {path}" for path in self.dropped.get(name, [])]
        return "\n".join(lines)


def apply(
    api: ApiClient,
    sources: Source | Iterable[Source],
    *,
    namespace: str = "default",
    dry_run: bool = False,
    define: bool = True,
    timeout_s: float = 30,
) -> Report:
    """Create or change objects: CRDs and namespaces first, the rest in order.

    Args:
        sources: objects, files, or folders (a kustomization is rendered), or several of them.
        namespace: of objects that name none.
        dry_run: the server checks all, admission included, and keeps nothing but custom resource definitions.
        define: teach the server the published custom resources that it lacks. Not for a cluster where an operator is
            to do so: nothing acts on them here.
        timeout_s: for a namespace or a definition until it can be used.

    Raises:
        Refused: by the server. What came before stays.
        UserError: a file cannot be read, or the server has no such kind.
    """
    server, report = Server(api), Report()
    found = sorted(objects(sources), key=lambda body: FIRST.get(body.get("kind", ""), 3))
    for body in found:
        of(body)
        _put(server, body, namespace, dry_run, define, timeout_s, report)
    return report


def delete(api: ApiClient, sources: Source | Iterable[Source], *, namespace: str = "default") -> Report:
    """Delete the objects, the last first; those that are not there are no error, definitions of kinds stay."""
    server, report = Server(api), Report()
    for body in reversed(objects(sources)):
        body, _ = convert.converted(body, server)
        version, kind, name = of(body)
        if resource := server.resource(version, kind):
            within = body["metadata"].get("namespace", namespace)
            if find(api, path := resource.path(name, within)):
                call(api, "DELETE", path, query={"propagationPolicy": "Background"})
                report.done[_title(resource, within, name)] = "deleted"
    return report


def objects(sources: Source | Iterable[Source]) -> list[Json]:
    """Read them all.

    Raises:
        UserError: a path does not exist, is no manifest, or its YAML is broken.
    """
    if isinstance(sources, dict):
        return [sources]
    if isinstance(sources, str | Path):
        return list(_in_path(Path(sources)))
    return [body for source in sources for body in objects(source)]


def _in_path(path: Path) -> Iterator[Json]:
    for at in files([path]):
        # A folder stands for the kustomization in it.
        found, faults = read(at, rendered(at) if at.is_dir() else None)
        if faults:
            raise UserError(str(faults[0]))
        yield from (each.data for each in found if each.kind and each.kind != "Kustomization")


def _title(resource: Resource, namespace: str, name: str) -> str:
    return "/".join([resource.kind, *([namespace] if resource.namespaced else []), name])


def _put(
    server: Server, body: Json, namespace: str, dry_run: bool, define: bool, timeout_s: float, report: Report
) -> None:
    sent, notes = convert.converted(body, server)
    version, kind, name = of(sent)
    resource = server.resource(version, kind)
    if resource is None and define:
        resource = _taught(server, version, kind, timeout_s, report)
    if resource is None:
        served = ", ".join(v for v in server.versions(group_of(version)) if server.resource(v, kind))
        other = f"it serves {served}: write that" if served else "install what defines it"
        raise UserError(f"the server ({server.version}) has no {kind} in {version}; {other}")
    within = sent["metadata"].get("namespace", namespace)
    title = _title(resource, within, name)
    query = {"dryRun": "All"} if dry_run and kind != "CustomResourceDefinition" else {}
    path = resource.path(name, within)
    try:
        if there := find(server.api, path):
            came = call(server.api, "PATCH", path, sent, query=query)
            same = came["metadata"].get("resourceVersion") == there["metadata"]["resourceVersion"]
            report.done[title] = "unchanged" if same else "changed"
        else:
            came = call(server.api, "POST", resource.path(namespace=within), sent, query=query)
            report.done[title] = "created"
    except ApiException as error:
        raise Refused(title, error) from None
    if notes:
        report.conversions[title] = notes
    if lost := list(convert.dropped(sent, came)):
        report.dropped[title] = lost
    if kind == "CustomResourceDefinition":
        _until(lambda: _is_served(server, sent), f"{title} is not served", timeout_s)
    if kind == "Namespace" and not dry_run:
        _until(lambda: _has_account(server, name), f"{title} has no service account for its pods", timeout_s)


def _taught(server: Server, version: str, kind: str, timeout_s: float, report: Report) -> Resource | None:
    """Define a custom resource from its published schema, if that is here."""
    source = CRDS / f"{kind.lower()}.{group_of(version)}.json"
    if not source.is_file():
        return None
    cut = json.loads(source.read_text(encoding="utf-8"))
    if version == f"{cut['group']}/{cut['version']}":
        _put(server, convert.definition(cut), "", False, False, timeout_s, report)
    return server.resource(version, kind)


def _is_served(server: Server, definition: Json) -> bool:
    """Whether the server's discovery has the kind, in all its versions."""
    server.forget()
    spec = definition["spec"]
    versions = [f"{spec['group']}/{v['name']}" for v in spec["versions"] if v.get("served", True)]
    return all(server.resource(version, spec["names"]["kind"]) for version in versions)


def _has_account(server: Server, namespace: str) -> bool:
    """Pods are refused until the default one is there, and on a server before 1.24 its token."""
    account = find(server.api, f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
    return account is not None and (server.minor >= 24 or bool(account.get("secrets")))


def _until(there: Callable[[], bool], what: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        if time.monotonic() > deadline:
            raise UserError(f"{what} after {timeout_s:g} s; see whether the controller manager runs, or wait longer")
        time.sleep(0.05)
