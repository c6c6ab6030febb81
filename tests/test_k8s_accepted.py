"""Chapter 8: every manifest is taken by a real API server, and what only a server sees is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ch08_kubernetes import accept
from ch08_kubernetes.cluster.apply import objects
from ch08_kubernetes.cluster.rest import find
from ch08_kubernetes.lint.objects import files

if TYPE_CHECKING:
    from ch08_kubernetes.cluster.local import LocalCluster

Json = dict[str, Any]
CHAPTER = Path(accept.__file__).parent


def test_every_manifest_is_accepted(cluster: LocalCluster) -> None:
    paths = files([CHAPTER])
    expected = [body for path in paths for body in objects(path) if accept.sent_to_server(body)]
    reports, refused = accept.accept(cluster.client(), paths)
    assert refused == []
    done = [name for report in reports.values() for name in report.done if "CustomResourceDefinition/" not in name]
    assert len(done) == len(expected) > 60
    # What the old server does not know is named, so that nobody takes it for checked.
    training = reports[CHAPTER / "training/overlays/8xh100"]
    assert training.dropped == {
        "Job/training/train": ["spec.completionMode", "spec.podFailurePolicy", "spec.podReplacementPolicy"]
    }
    serving = reports[CHAPTER / "inference/vllm.yaml"]
    assert serving.conversions["PodDisruptionBudget/inference/vllm"] == ["policy/v1 -> policy/v1beta1"]
    scaling = [notes for report in reports.values() for notes in report.conversions.values()]
    assert ["autoscaling/v2 -> autoscaling/v2beta2"] in scaling
    assert find(cluster.client(), "/apis/apps/v1/namespaces/inference/deployments/vllm") is None  # a dry run


def changed(name: str, kind: str, change: Any) -> Json:
    body = copy.deepcopy(next(body for body in objects(CHAPTER / name) if body["kind"] == kind))
    change(body["spec"])
    return body


def container(spec: Json) -> Json:
    return spec["template"]["spec"]["containers"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "kind", "change", "says"),
    [
        ("inference/vllm.yaml", "Deployment", lambda s: s["selector"]["matchLabels"].update(app="vlm"),
         "`selector` does not match template `labels`"),
        ("inference/vllm.yaml", "Deployment", lambda s: container(s)["resources"]["requests"].update({"nvidia.com/gpu": 2}),
         "must be equal to nvidia.com/gpu limit"),
        ("inference/vllm.yaml", "Deployment", lambda s: container(s)["volumeMounts"][0].update(name="modles"), "Not found"),
        ("inference/vllm.yaml", "Deployment", lambda s: container(s)["resources"]["limits"].update(memory="48GiB"),
         "quantities must match"),
        ("inference/vllm.yaml", "Service", lambda s: s["ports"].append(dict(s["ports"][0])), "Duplicate value"),
        ("scheduling/gang.yaml", "Job", lambda s: s["template"]["spec"].update(restartPolicy="Always"), "restartPolicy"),
        ("scheduling/kueue.yaml", "ClusterQueue", lambda s: s.update(queueingStrategy="Fastest"), "queueingStrategy"),
        ("training/operators/jobset.yaml", "JobSet", lambda s: s["failurePolicy"].update(maxRestarts="five"), "maxRestarts"),
    ],
)  # fmt: skip
def test_the_server_refuses_what_does_not_fit_together(
    tmp_path: Path, cluster: LocalCluster, name: str, kind: str, change: Any, says: str
) -> None:
    import yaml

    path = tmp_path / "planted.yaml"
    path.write_text(yaml.safe_dump(changed(name, kind, change)), encoding="utf-8")
    _, (refused,) = accept.accept(cluster.client(), [path])
    assert refused.startswith(f"{path}: {kind}/")
    assert says in refused
