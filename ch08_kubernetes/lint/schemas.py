"""Fields and types: the schemas of the current Kubernetes version and of published custom resources, both strict.

Core kinds come from PyPI's kubernetes-validate, which carries the OpenAPI definitions of each Kubernetes version;
custom resources from crds/ (see trim_crds). The API server itself drops unknown fields; here they are errors, since a
field that is dropped is a limit that does not hold.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import referencing
from referencing.jsonschema import DRAFT202012

from ch08_kubernetes.lint import cel_rules
from ch08_kubernetes.lint.objects import Finding, Object

KUBERNETES = "1.37"
CRDS = Path(__file__).parent / "crds"
CORE = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
POD_SPEC = {"$ref": f"{DEFINITIONS}#/$defs/io.k8s.api.core.v1.PodSpec"}
# Read by tools, not sent to an API server: kind's and kustomize's own files.
OF_TOOLS = {"kind.x-k8s.io", "kustomize.config.k8s.io", "kubescheduler.config.k8s.io"}
# Helm values of the GPU Operator follow its ClusterPolicy; these keys the chart has besides.
OF_THE_CHART = {("devicePlugin", "config"): {"create", "data"}, ("mig", ""): set(), ("dcgmExporter", ""): {"service"}}
SECTIONS = ("driver", "toolkit", "devicePlugin", "dcgmExporter", "dcgm", "gfd", "mig", "migManager", "validator")


@functools.cache
def registry() -> referencing.Registry:
    contents = json.loads((CORE / "_definitions.json").read_text(encoding="utf-8"))
    return referencing.Registry().with_resource(DEFINITIONS, DRAFT202012.create_resource(contents))


@functools.cache
def custom() -> dict[tuple[str, str], dict[str, Any]]:
    """Custom resources by group and kind."""
    loaded = [json.loads(at.read_text(encoding="utf-8")) for at in sorted(CRDS.glob("*.*.json"))]
    return {(crd["group"], crd["kind"]): crd | {"schema": with_pods(crd["schema"])} for crd in loaded}


def with_pods(node: Any) -> Any:
    """A trimmed schema with the current pod spec where its reference stands."""
    if isinstance(node, dict):
        return POD_SPEC if node.get("x-pod-spec") is True else {key: with_pods(inner) for key, inner in node.items()}
    return [with_pods(inner) for inner in node] if isinstance(node, list) else node


def core(owner: Object) -> dict[str, Any] | None:
    version = str(owner.data.get("apiVersion", ""))
    group, _, number = version.rpartition("/")
    name = f"{owner.kind.lower()}-{group.partition('.')[0] + '-' if group else ''}{number}.json"
    if not (CORE / name).is_file():
        return None
    found: dict[str, Any] = json.loads((CORE / name).read_text(encoding="utf-8"))
    return found


def check(owner: Object) -> Iterator[Finding]:
    if not owner.kind:
        yield from check_values(owner)
        return
    if owner.group in OF_TOOLS:
        return
    version = owner.data.get("apiVersion")
    if crd := custom().get((owner.group, owner.kind)):
        if version != f"{crd['group']}/{crd['version']}":
            yield owner.finding("schema", f"apiVersion is {version}; write {crd['group']}/{crd['version']}")
            return
        schema = crd["schema"]
        if crd["scope"] == "Cluster" and owner.namespace:
            yield owner.finding("schema", f"a {owner.kind} is in no namespace; remove metadata.namespace")
    else:
        schema = core(owner)
        if schema is None:
            yield owner.finding("schema", f"Kubernetes {KUBERNETES} has no {owner.kind} in {version}; write one it has")
            return
    if not owner.metadata.get("name") and not owner.metadata.get("generateName"):
        yield owner.finding("schema", "metadata.name is missing; name it")
    faults = list(errors(owner, schema, owner.data))
    yield from faults
    if crd and not faults:
        for message in cel_rules.broken(schema, owner.data):
            yield owner.finding("cel", message)


def errors(owner: Object, schema: dict[str, Any], data: Any, prefix: str = "") -> Iterator[Finding]:
    validator = jsonschema.Draft202012Validator(schema, registry=registry())
    for error in sorted(validator.iter_errors(data), key=lambda e: [str(part) for part in e.absolute_path]):
        at = prefix + ".".join(str(part) for part in error.absolute_path)
        yield owner.finding("schema", f"{at or 'the object'}: {error.message[:200]}; write what the API has")


def check_values(owner: Object) -> Iterator[Finding]:
    """Helm values of the GPU Operator, section by section, against the ClusterPolicy that the chart fills from them."""
    if "gpu-operator" not in owner.path.name:
        return
    policy = custom()["nvidia.com", "ClusterPolicy"]["schema"]["properties"]["spec"]["properties"]
    for section, value in owner.data.items():
        if section not in SECTIONS:
            continue
        for error in jsonschema.Draft202012Validator(policy[section], registry=registry()).iter_errors(value):
            at = ".".join(str(part) for part in error.absolute_path)
            extra = OF_THE_CHART.get((section, at), set())
            if (
                error.validator == "additionalProperties"
                and set(error.instance) - set(error.schema["properties"]) <= extra
            ):
                continue
            if error.validator == "required":  # the chart has defaults
                continue
            yield owner.finding("schema", f"{section}.{at}: {error.message[:200]}; write what ClusterPolicy has")
