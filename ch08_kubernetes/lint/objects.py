"""The objects in manifests: read strictly, with the line each begins on, and the pods inside them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from common.script import UserError

UNITS = {"": 1, "m": Decimal("0.001"), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
KUSTOMIZATION = "kustomization.yaml"


@dataclass(frozen=True)
class Finding:
    """One fault: where, which rule, what is wrong and what to do, on one line."""

    where: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}: {' '.join(self.message.split())}"


@dataclass(frozen=True)
class Object:
    """A Kubernetes object, or (kind "") another mapping such as Helm values; line counts from 1."""

    path: Path
    line: int
    data: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.data.get("kind", ""))

    @property
    def group(self) -> str:
        version = str(self.data.get("apiVersion", ""))
        return version.rpartition("/")[0]

    @property
    def name(self) -> str:
        return str(self.metadata.get("name", "?"))

    @property
    def metadata(self) -> dict[str, Any]:
        return mapping(self.data.get("metadata"))

    @property
    def namespace(self) -> str:
        return str(self.metadata.get("namespace", ""))

    @property
    def spec(self) -> dict[str, Any]:
        return mapping(self.data.get("spec"))

    def finding(self, rule: str, message: str) -> Finding:
        return Finding(f"{self.path}:{self.line}", rule, f"{self.kind or 'values'}/{self.name}: {message}")


@dataclass(frozen=True)
class Pod:
    """A pod or a pod template inside an object. `path` are the keys that lead to it."""

    owner: Object
    path: tuple[str, ...]
    metadata: dict[str, Any]
    spec: dict[str, Any]

    @property
    def labels(self) -> dict[str, str]:
        return mapping(self.metadata.get("labels"))

    @property
    def annotations(self) -> dict[str, str]:
        return mapping(self.metadata.get("annotations"))

    @property
    def containers(self) -> list[dict[str, Any]]:
        return self.spec.get("containers") or []

    @property
    def serves(self) -> bool:
        """It answers requests: it is kept running, and a container has a port."""
        kept = self.owner.kind in ("Deployment", "StatefulSet", "LeaderWorkerSet")
        return kept and any(c.get("ports") for c in self.containers)

    def gpus(self) -> int:
        return sum(int(quantity(limits(c).get("nvidia.com/gpu", 0))) for c in self.containers)

    def finding(self, rule: str, message: str) -> Finding:
        return self.owner.finding(rule, message)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def limits(container: dict[str, Any], which: str = "limits") -> dict[str, Any]:
    return mapping(mapping(container.get("resources")).get(which))


def quantity(value: Any) -> Decimal:
    """A Kubernetes quantity ("500m", "64Gi", 8) as a number: cores, bytes, devices.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(value))
    if not match or match[2] not in UNITS:
        raise UserError(f"{value!r} is no quantity; write it like 8, 500m or 64Gi")
    return Decimal(match[1]) * UNITS[match[2]]


def pods(owner: Object) -> Iterator[Pod]:
    """The pods in an object, wherever their templates are: Job, JobSet, LeaderWorkerSet, RayCluster, ..."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterator[Pod]:
        if isinstance(node, dict):
            spec = node.get("spec")
            if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
                yield Pod(owner, path, mapping(node.get("metadata")), spec)
            for key, inner in node.items():
                yield from walk(inner, (*path, str(key)))
        elif isinstance(node, list):
            for index, inner in enumerate(node):
                yield from walk(inner, (*path, str(index)))

    yield from walk(owner.data, ())


def repeated_key(node: yaml.Node | None) -> yaml.Node | None:
    """A key that a mapping has twice: YAML's readers take the last one in silence."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            name = str(key.value)  # of a key that is no scalar, its nodes
            if name in seen and name != "<<":
                return key  # type: ignore[no-any-return]
            seen.add(name)
            if found := repeated_key(value):
                return found
    elif isinstance(node, yaml.SequenceNode):
        return next((found for inner in node.value if (found := repeated_key(inner))), None)
    return None


def read(path: Path, text: str | None = None) -> tuple[list[Object], list[Finding]]:
    """The objects in a file (or in `text`, as if it were that file), and what is wrong with its YAML.

    Raises:
        UserError: the file cannot be read.
    """
    if text is None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} ({error}); name a YAML or JSON file, or a folder of them") from None
    found: list[Object] = []
    faults: list[Finding] = []
    loader = yaml.SafeLoader(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            if key := repeated_key(node):
                line = key.start_mark.line + 1
                faults.append(Finding(f"{path}:{line}", "yaml", f"the key {key.value!r} is there twice; remove one"))
            data = loader.construct_document(node)
            line = node.start_mark.line + 1
            if isinstance(data, dict):
                items = data.get("items") if data.get("kind") == "List" else [data]
                if isinstance(items, list) and all(isinstance(item, dict) for item in items):
                    found += [Object(path, line, item) for item in items]
                else:
                    faults.append(Finding(f"{path}:{line}", "yaml", "a List has no list of objects; write items"))
            elif data is not None:
                faults.append(Finding(f"{path}:{line}", "yaml", "the document is no mapping; write fields"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        faults.append(Finding(f"{path}:{line}", "yaml", f"{getattr(error, 'problem', error)}; mend the YAML"))
    return found, faults


def rendered(folder: Path, timeout_s: float = 60) -> str:
    """What `kubectl kustomize` makes of a folder.

    Raises:
        UserError: kubectl is not there, or refuses the folder.
    """
    if shutil.which("kubectl") is None:
        raise UserError(f"{folder} is rendered with kubectl kustomize, and kubectl is not here; install kubectl")
    command = ["kubectl", "kustomize", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if made.returncode:
        raise UserError(f"kubectl kustomize {folder} fails ({made.stderr.strip()[:400]}); mend {KUSTOMIZATION}")
    return made.stdout


def files(paths: list[Path]) -> list[Path]:
    """Manifests to read, and folders to render with kustomize (whose own files are then not read by themselves).

    Raises:
        UserError: a path does not exist, or has no manifest in it.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no {path}; name a manifest or a folder of them")
        if path.is_file():
            found.append(path)
            continue
        built = {at.parent for at in path.rglob(KUSTOMIZATION)}
        inside = [
            at
            for pattern in ("*.yaml", "*.yml", "dashboards/*.json")
            for at in path.rglob(pattern)
            if at.is_file() and not built.intersection(at.parents)
        ]
        # A component or a base of resources only: kustomize renders it through the overlays that use it.
        found += sorted([*inside, *(at for at in built if "kind: Component" not in (at / KUSTOMIZATION).read_text())])
    if not found:
        raise UserError(f"no manifest in {', '.join(map(str, paths))}; name a folder with *.yaml in it")
    return found
