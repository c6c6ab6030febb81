"""The snapshot, read from an API server or a file. Of Secrets and ConfigMaps nothing is asked but their names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from ch08_kubernetes.cluster.rest import Json, as_user_error, get, reason_of
from ch08_kubernetes.doctor.facts import containers, name, namespace, number, ready, ref, statuses, text
from ch08_kubernetes.lint.objects import read as read_manifest
from common.script import UserError

PAGE = 500
# Versions of a kind, the first that is served; then whether it lies in namespaces.
KINDS: list[tuple[str, str, tuple[str, ...], bool]] = [
    ("Pod", "pods", ("api/v1",), True),
    ("Node", "nodes", ("api/v1",), False),
    ("Event", "events", ("api/v1",), True),
    ("Namespace", "namespaces", ("api/v1",), False),
    ("Service", "services", ("api/v1",), True),
    ("Endpoints", "endpoints", ("api/v1",), True),
    ("PersistentVolumeClaim", "persistentvolumeclaims", ("api/v1",), True),
    ("ResourceQuota", "resourcequotas", ("api/v1",), True),
    ("ServiceAccount", "serviceaccounts", ("api/v1",), True),
    ("Secret", "secrets", ("api/v1",), True),
    ("ConfigMap", "configmaps", ("api/v1",), True),
    ("Job", "jobs", ("apis/batch/v1",), True),
    ("Deployment", "deployments", ("apis/apps/v1",), True),
    ("ReplicaSet", "replicasets", ("apis/apps/v1",), True),
    ("StatefulSet", "statefulsets", ("apis/apps/v1",), True),
    ("DaemonSet", "daemonsets", ("apis/apps/v1",), True),
    ("PodDisruptionBudget", "poddisruptionbudgets", ("apis/policy/v1", "apis/policy/v1beta1"), True),
    (
        "HorizontalPodAutoscaler",
        "horizontalpodautoscalers",
        ("apis/autoscaling/v2", "apis/autoscaling/v2beta2", "apis/autoscaling/v1"),
        True,
    ),
    ("StorageClass", "storageclasses", ("apis/storage.k8s.io/v1",), False),
    ("PriorityClass", "priorityclasses", ("apis/scheduling.k8s.io/v1",), False),
    ("APIService", "apiservices", ("apis/apiregistration.k8s.io/v1",), False),
    (
        "ValidatingWebhookConfiguration",
        "validatingwebhookconfigurations",
        ("apis/admissionregistration.k8s.io/v1",),
        False,
    ),
    ("MutatingWebhookConfiguration", "mutatingwebhookconfigurations", ("apis/admissionregistration.k8s.io/v1",), False),
    ("JobSet", "jobsets", ("apis/jobset.x-k8s.io/v1alpha2",), True),
    ("Workload", "workloads", ("apis/kueue.x-k8s.io/v1beta2", "apis/kueue.x-k8s.io/v1beta1"), True),
    ("LocalQueue", "localqueues", ("apis/kueue.x-k8s.io/v1beta2", "apis/kueue.x-k8s.io/v1beta1"), True),
]
NAMES_ONLY = {"Secret", "ConfigMap"}
EVERYWHERE = {"Pod"}  # who holds the GPUs may be in any namespace


@dataclass
class Snapshot:
    """Objects with their kinds; what could not be read, and why; last lines of failed containers."""

    objects: list[Json] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    logs: dict[str, str] = field(default_factory=dict)


def take(api: ApiClient, space: str | None = None) -> Snapshot:
    """Read all kinds, of one namespace or of all. What is forbidden is noted, and left out.

    Raises:
        UserError: no server answers, it knows the user not, or the user may read nothing at all.
    """
    found = Snapshot()
    refused = 0
    try:
        if space and _missing(api, space):
            raise UserError(f"there is no namespace {space}; see: kubectl get namespaces")
        for kind, plural, versions, inside in KINDS:
            for within in _scopes(kind, inside, space):
                try:
                    found.objects += listing(api, kind, plural, versions, within)
                    break
                except ApiException as error:
                    if error.status != 403:
                        raise
                    if within == space or not inside or space is None:
                        refused += 1
                        where = f" in namespace {within}" if within else " in all namespaces" if inside else ""
                        found.notes.append(f"may not list {plural}{where}: {reason_of(error)}")
        if space and not any(text(o, "kind") == "Namespace" for o in found.objects):
            found.notes.append("nodes and other namespaces may be unknown: findings say less")
    except (ApiException, HTTPError, OSError) as error:
        raise as_user_error(error, api.configuration.host) from None
    if not found.objects and refused:
        raise UserError(f"{found.notes[0]}, nor anything else; ask for the role `view`, or name another --namespace")
    return found


def _missing(api: ApiClient, space: str) -> bool:
    try:
        get(api, f"/api/v1/namespaces/{quote(space, safe='')}")
    except ApiException as error:
        if error.status == 404:
            return True
        if error.status != 403:
            raise
    return False


def _scopes(kind: str, inside: bool, space: str | None) -> list[str | None]:
    """Where to look: the first that is allowed counts."""
    if not inside or space is None:
        return [None]
    return [None, space] if kind in EVERYWHERE else [space]


def listing(api: ApiClient, kind: str, plural: str, versions: tuple[str, ...], space: str | None) -> list[Json]:
    """All objects of a kind, by the first version that is served, in pages; none if no version is.

    Raises:
        ApiException: 403 where that is forbidden.
    """
    for version in versions:
        path = f"/{version}/namespaces/{space}/{plural}" if space else f"/{version}/{plural}"
        try:
            items: list[Json] = []
            more = ""
            while True:
                page = _page(api, path, kind in NAMES_ONLY, more)
                items += page.get("items") or []
                more = text(page, "metadata", "continue")
                if not more:
                    return [{**item, "kind": kind} for item in items]
        except ApiException as error:
            if error.status != 404:  # this version is not served
                raise
    return []


def _page(api: ApiClient, path: str, names_only: bool, more: str) -> Json:
    query = {"limit": PAGE} | ({"continue": more} if more else {})
    if not names_only:
        return get(api, path, **query)
    return api.call_api(  # type: ignore[no-any-return]
        path,
        "GET",
        query_params=list(query.items()),
        auth_settings=["BearerToken"],
        response_types_map={200: "object"},
        header_params={"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"},
        _return_http_data_only=True,
        _request_timeout=30,
    )


def load(path: Path) -> Snapshot:
    """A saved snapshot: one or several lists, as `kubectl get -o json` prints them, or YAML.

    Raises:
        UserError: it cannot be read, or holds no objects.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        bodies = data.get("items", [data]) if isinstance(data, dict) else data
        found = (
            [body for body in bodies if isinstance(body, dict) and body.get("kind")] if isinstance(bodies, list) else []
        )
    except ValueError:
        read, faults = read_manifest(path)
        if faults:
            raise UserError(str(faults[0])) from None
        found = [each.data for each in read if each.kind]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); pass what --save wrote") from None
    if not found:
        raise UserError(f"{path} holds no objects; make one with: kubectl get pods,nodes,events,jobs -A -o json")
    return Snapshot(found)


def add_logs(api: ApiClient, snapshot: Snapshot, space: str | None, lines: int = 60) -> None:
    """The last lines of each container that failed or is not ready; what cannot be read is noted."""
    for pod in snapshot.objects:
        if text(pod, "kind") != "Pod" or (space and namespace(pod) != space) or ready(pod):
            continue
        for status in statuses(pod):
            again = number(status, "restartCount") > 0
            if not again and not status.get("started") and not (status.get("state") or {}).get("terminated"):
                continue
            try:
                found = log_of(api, pod, text(status, "name"), tail=lines, previous=again)
            except (ApiException, HTTPError) as error:
                why = reason_of(error) if isinstance(error, ApiException) else "no answer"
                snapshot.notes.append(f"no log of {ref(pod)}: {why}")
                continue
            snapshot.logs[ref(pod)] = snapshot.logs.get(ref(pod), "") + found


def log_of(api: ApiClient, pod: Json, container: str = "", *, tail: int, previous: bool = False) -> str:
    """
    Raises:
        ApiException: there is none, or no kubelet answers.
    """
    path = f"/api/v1/namespaces/{namespace(pod)}/pods/{name(pod)}/log"
    query = {
        "tailLines": tail,
        "container": container or text(containers(pod)[:1], 0, "name"),
        "previous": str(previous).lower(),
    }
    answer = api.call_api(
        path,
        "GET",
        query_params=list(query.items()),
        auth_settings=["BearerToken"],
        header_params={"Accept": "*/*"},
        _preload_content=False,
        _return_http_data_only=True,
        _request_timeout=30,
    )
    return answer.read().decode("utf-8", "replace")  # type: ignore[no-any-return]
