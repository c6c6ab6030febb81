"""Published custom resource definitions, some MB of YAML, cut down to what a check of fields needs.

    python -m ch08_kubernetes.lint.trim_crds FOLDER        (FOLDER: the published files and a SOURCES.md beside them)

Descriptions, status and old versions go. A pod's spec inside becomes a reference: the checker takes the one
of the current Kubernetes version. What is left lies in crds/, a file a kind, with the commit that it was cut from.
Source of the format: apiextensions.k8s.io/v1, CustomResourceDefinition, structural schemas.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from common import script

CRDS = Path(__file__).parent / "crds"
KEPT = [
    "type",
    "enum",
    "pattern",
    "required",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-validations",
]
POD_SPEC = {"x-pod-spec": True}
TRIGGERS = ("prometheus", "redis", "redis-streams", "cpu", "memory", "cron")  # of KEDA's some seventy


def trimmed(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema as a strict JSON schema: fields that it does not name are errors."""
    fields = schema.get("properties", {})
    if {"containers", "initContainers", "restartPolicy", "nodeSelector"} <= set(fields):
        return dict(POD_SPEC)
    kept = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("default") is not None:
        kept["default"] = schema["default"]
    if "x-kubernetes-validations" in kept:
        rules = kept["x-kubernetes-validations"]
        kept["x-kubernetes-validations"] = [{k: r[k] for k in ("rule", "message") if k in r} for r in rules]
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if schema.get("nullable") and "type" in kept:
        kept["type"] = [*([kept["type"]] if isinstance(kept["type"], str) else kept["type"]), "null"]
    if fields:
        kept["properties"] = {name: trimmed(inner) for name, inner in fields.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = trimmed(schema["additionalProperties"])
    if "items" in schema:
        kept["items"] = trimmed(schema["items"])
    # Alternatives repeat fields of the schema around them: they are not strict themselves.
    kept |= {key: schema[key] for key in ("oneOf", "anyOf", "allOf", "not") if key in schema}
    return kept


def cut(definition: dict[str, Any], source: str) -> dict[str, Any]:
    """The storage version of a definition: group, version, kind, scope, schema, and where it is from."""
    spec = definition["spec"]
    version = next(v for v in spec["versions"] if v["storage"])
    if spec["group"] == "kueue.x-k8s.io":  # stored as v1beta1 still, written as v1beta2
        version = next(v for v in spec["versions"] if v["name"] == "v1beta2")
    schema = trimmed(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = {"type": "object"}
    found = {"source": source, "group": spec["group"], "version": version["name"], "kind": spec["names"]["kind"]}
    return found | {"scope": spec["scope"], "schema": schema}


def triggers(published: dict[str, Any]) -> dict[str, Any]:
    """KEDA's triggers: the names of all parameters and of those that must be set in the metadata."""
    found = {}
    for scaler in published["scalers"]:
        if scaler["type"] in TRIGGERS:
            parameters = [p for p in scaler.get("parameters", []) if p.get("metadataVariableReadable")]
            needed = {
                p["name"]
                for p in parameters
                if not (p.get("optional") or "default" in p or p.get("triggerAuthenticationVariableReadable"))
            }
            found[scaler["type"]] = {"names": sorted({p["name"] for p in parameters}), "needed": sorted(needed)}
    return found


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folder", type=Path)
    folder = made.parse_args(argv).folder
    try:
        sources = dict(re.findall(r"^\* (\S+) — (.+)$", (folder / "SOURCES.md").read_text(encoding="utf-8"), re.M))
    except OSError as error:
        sys.exit(f"error: cannot read {folder}/SOURCES.md ({error.strerror}); name the folder of the published files")
    for name, source in sources.items():
        if not name.endswith(".yaml"):
            continue
        published = yaml.load((folder / name).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        found = cut(published, source)
        with script.atomic_write(CRDS / f"{found['kind'].lower()}.{found['group']}.json") as file:
            file.write(json.dumps(found, separators=(",", ":"), sort_keys=True) + "\n")
    scalers = json.loads((folder / "keda-scalers-schema.json").read_text(encoding="utf-8"))
    with script.atomic_write(CRDS / "keda-triggers.json") as file:
        file.write(json.dumps({"source": sources["keda-scalers-schema.json"]} | triggers(scalers), indent=1) + "\n")


if __name__ == "__main__":
    main()
