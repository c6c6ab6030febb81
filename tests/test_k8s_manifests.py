"""Chapter 8's manifests and their checker: all are clean, and each rule catches a manifest that is wrong in one place."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from common import process, script

pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: make setup")
pytest.importorskip("promql_parser", reason="needs promql-parser: make setup")

from ch03_ddp import options as ddp_options
from ch04_fsdp import options as fsdp_options
from ch08_kubernetes.lint import __main__ as lint
from ch08_kubernetes.lint import cel_rules, group_rules, objects, pod_rules, promql, schemas, trim_crds
from ch08_kubernetes.lint.names_of import declared, samples
from ch08_kubernetes.training import rank

CHAPTER = Path(__file__).resolve().parents[1] / "ch08_kubernetes"
kustomize = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")

# A manifest of the chapter, one change to it, and the rule that must see it.
BAD = [
    ("inference/vllm.yaml", "maxSurge: 1", "maxSurge: 1\n      maxSurge: 2", "yaml"),
    ("inference/vllm.yaml", "terminationGracePeriodSeconds:", "terminationGracePeriodSecond:", "schema"),
    ("inference/vllm.yaml", "policy/v1", "policy/v1beta1", "schema"),
    ("training/operators/jobset.yaml", "maxRestarts: 5", "maxRestart: 5", "schema"),
    ("training/operators/jobset.yaml", "backoffLimit: 0", "backofLimit: 0", "schema"),
    ("training/operators/trainjob.yaml", "numNodes: 4", "numNodes: four", "schema"),
    ("training/operators/rayjob.yaml", "ray.io/v1\n", "ray.io/v1alpha1\n", "schema"),
    ("scheduling/kueue.yaml", "cohortName: gpu-pool", "cohort: gpu-pool", "schema"),
    ("scheduling/kueue.yaml", "  cohortName: gpu-pool\n", "", "cel"),
    ("scheduling/kueue.yaml", "    - nodeLabel: kubernetes.io/hostname\n", "    - nodeLabel: kubernetes.io/hostname\n"
     "    - nodeLabel: x\n", "cel"),
    ("scheduling/kueue.yaml", "operator: Exists\n", "operator: Exists\n      value: x\n", "cel"),
    ("scheduling/kueue.yaml", "name: speech\nspec", "name: speech\n  namespace: x\nspec", "schema"),
    ("setup/gpu-operator-values.yaml", "maxParallelUpgrades: 1", "maxParalelUpgrades: 1", "schema"),
    ("inference/vllm.yaml", 'cpu: "8"\n', 'cpu: "8"\n              nvidia.com/gpu: 2\n', "gpu-request"),
    ("inference/vllm.yaml", "sizeLimit: 8Gi", "sizeLimit: 40Gi", "shm"),
    ("inference/vllm.yaml", "            sizeLimit: 8Gi\n", "", "shm"),
    ("inference/vllm.yaml", "medium: Memory", "medium: ''", "shm"),
    ("inference/lws-vllm.yaml", "              - name: shm\n                mountPath: /dev/shm\n", "", "shm"),
    ("scheduling/placement.yaml", "limits: {memory: 2Gi, ", "limits: {", "memory"),
    ("scheduling/placement.yaml", 'requests: {cpu: "1", memory: 2Gi}', "requests: {memory: 2Gi}", "memory"),
    ("inference/lws-vllm.yaml", "--nnodes=$(LWS_GROUP_SIZE)", "--nnodes=$LWS_GROUP_SIZE", "variable"),
    ("inference/lws-vllm.yaml", "--nnodes=$(LWS_GROUP_SIZE)", "--nnodes=$(GROUP_SIZE)", "variable"),
    ("inference/vllm.yaml", "value: /models/hub", "value: $MODELS/hub", "variable"),
    ("inference/vllm.yaml", "failureThreshold: 60", "failureThreshold: 59", "start-up"),
    ("inference/vllm.yaml", "          startupProbe:\n            httpGet:\n              path: /health\n              port: http\n"
     "            periodSeconds: 10\n            timeoutSeconds: 5\n            failureThreshold: 60\n", "", "start-up"),
    ("inference/vllm.yaml", 'distributed-ai.example/model-load-seconds: "600"', "x: y", "start-up"),
    ("inference/vllm.yaml", "httpGet:\n              path: /health\n              port: http\n            periodSeconds: 5",
     "tcpSocket:\n              port: http\n            periodSeconds: 5", "probe"),
    ("inference/vllm.yaml", "terminationGracePeriodSeconds: 330", "terminationGracePeriodSeconds: 314", "grace"),
    ("inference/vllm.yaml", "seconds: 15", "seconds: 0", "grace"),
    ("training/operators/jobset.yaml", "terminationGracePeriodSeconds: 420", "terminationGracePeriodSeconds: 299", "grace"),
    ("inference/vllm.yaml", "- key: nvidia.com/gpu\n", "- key: nvidia.com/gpus\n", "toleration"),
    ("inference/vllm.yaml", "vllm-openai:v0.32.0", "vllm-openai:latest", "image"),
    ("inference/vllm.yaml", "vllm-openai:v0.32.0", "vllm-openai", "image"),
    ("inference/vllm.yaml", "- name: HF_TOKEN\n              valueFrom:\n                secretKeyRef:\n                  name: hub-token\n"
     "                  key: token", "- name: HF_TOKEN\n              value: hf_abc", "secret"),
    ("training/operators/jobset.yaml", "value: =eth0", "value: lo", "network"),
    ("training/operators/jobset.yaml", "nvidia.com/gpu: 8\n", "nvidia.com/gpu: 8\n                      rdma/hca: 1\n", "network"),
    ("inference/vllm.yaml", "spec:\n  # No replicas here: autoscaling/ sets them, and an apply would set them back.\n  selector:\n"
     "    matchLabels:\n      app: vllm", "spec:\n  selector:\n    matchLabels:\n      app: vlm", "selector"),
    ("inference/vllm.yaml", "          labelSelector:\n            matchLabels:\n              app: vllm",
     "          labelSelector:\n            matchLabels:\n              app: other", "selector"),
    ("inference/vllm.yaml", "targetPort: http", "targetPort: web", "service"),
    ("inference/vllm.yaml", "spec:\n  selector:\n    app: vllm", "spec:\n  selector:\n    app: vlm", "service"),
    ("scheduling/gang.yaml", "  publishNotReadyAddresses: true\n", "", "service"),
    ("scheduling/gang.yaml", "clusterIP: None", "type: ClusterIP", "service"),
    ("inference/vllm.yaml", "maxUnavailable: 1 # drains", "maxUnavailable: 0 # drains", "pdb"),
    ("inference/lws-vllm.yaml", "minAvailable: 1", "minAvailable: 2", "pdb"),
    ("inference/lws-vllm.yaml", "  minAvailable: 1\n  selector:\n    matchLabels:\n      leaderworkerset.sigs.k8s.io/name: vllm-large\n"
     '      leaderworkerset.sigs.k8s.io/worker-index: "0"', "  minAvailable: 3\n  selector:\n    matchLabels:\n"
     "      leaderworkerset.sigs.k8s.io/name: vllm-large", "pdb"),
    ("autoscaling/hpa-resource.yaml", "    kind: Deployment\n    name: router", "    kind: Deployment\n    name: ruter", "autoscaler"),
    ("autoscaling/hpa-resource.yaml", "spec:\n  selector:\n    matchLabels:\n      app: router\n  template",
     "spec:\n  replicas: 2\n  selector:\n    matchLabels:\n      app: router\n  template", "autoscaler"),
    ("inference/vllm.yaml", "claimName: models", "claimName: model", "reference"),
    ("scheduling/kueue.yaml", "clusterQueue: speech", "clusterQueue: vision", "queue"),
    ("scheduling/kueue.yaml", "metadata:\n  name: h100", "metadata:\n  name: h200", "queue"),
    ("scheduling/kueue.yaml", "  cohortName: gpu-pool\n", "", "queue"),
    ("scheduling/kueue.yaml", '            - {name: cpu, nominalQuota: "96"}\n', "", "queue"),
    ("autoscaling/keda-prometheus.yaml", "query: sum(vllm:num_requests_waiting", "query: (vllm:num_requests_waiting", "promql"),
    ("autoscaling/keda-prometheus.yaml", "query: sum(", "query: sum by (pod) (", "promql"),
    ("autoscaling/keda-prometheus.yaml", "query: sum(", "query: sum((", "promql"),
    ("autoscaling/keda-prometheus.yaml", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "promql"),
    ("autoscaling/prometheus-adapter-values.yaml", "sglang:num_queue_reqs", "sglang:num_waiting_reqs", "promql"),
    ("monitoring/rules.yaml", "rate(vllm:num_preemptions_total[5m])", "vllm:num_preemptions_total", "promql"),
    ("monitoring/rules.yaml", "sum by (model_name, le) (rate(vllm:time", "sum by (model_name) (rate(vllm:time", "promql"),
    ("monitoring/rules.yaml", "expr: model:vllm_time_to_first_token_seconds:p95_5m", "expr: model:vllm_ttft:p95_5m", "promql"),
    ("monitoring/dashboards/serving.json", "vllm:generation_tokens_total{", "vllm:tokens_total{", "promql"),
    ("autoscaling/keda-prometheus.yaml", "activationThreshold", "activationTreshold", "keda"),
    ("autoscaling/keda-redis.yaml", "        listName: prompts\n", "", "keda"),
]  # fmt: skip
POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n"
NEEDED = {  # files that a manifest refers to
    "inference": ["inference/common.yaml"],
    "scheduling": ["scheduling/priorities.yaml", "scheduling/kueue.yaml"],
    "training": ["training/base/checkpoints.yaml"],
}


def faults(tmp_path: Path, name: str, old: str = "", new: str = "") -> list[objects.Finding]:
    """What the checker says of a manifest with a change, in a folder with what it refers to."""
    text = (CHAPTER / name).read_text(encoding="utf-8")
    assert not old or old in text, f"{name} has no {old!r} any more"
    for needed in {name, *NEEDED.get(name.split("/")[0], [])}:
        (tmp_path / Path(needed).name).write_text((CHAPTER / needed).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / Path(name).name).write_text(text.replace(old, new) if old else text, encoding="utf-8")
    return lint.check(sorted(tmp_path.iterdir()))[1]


@kustomize
def test_the_chapters_manifests_are_clean() -> None:
    found, findings = lint.check([CHAPTER])
    assert not [str(f) for f in findings]
    kinds = {owner.kind for owner in found}
    assert {"Job", "JobSet", "TrainJob", "RayJob", "LeaderWorkerSet", "ScaledObject", "PrometheusRule"} <= kinds
    assert len([q for owner in found for q in promql.queries(owner)]) > 40  # the dashboards' too


@kustomize
def test_overlays_add_up() -> None:
    """What kustomize makes of the base: GPUs, the fabric, and one environment for both pods."""

    def job(overlay: str) -> objects.Pod:
        found, _ = lint.load(CHAPTER / "training/overlays" / overlay)
        return next(pod for owner in found if owner.kind == "Job" for pod in objects.pods(owner))

    assert {name: job(name).gpus() for name in ("dev", "single-gpu", "8xh100", "rdma")} == {
        "dev": 0, "single-gpu": 1, "8xh100": 8, "rdma": 8,
    }  # fmt: skip
    env = {entry["name"]: entry.get("value") for entry in job("rdma").containers[0]["env"]}
    assert env["NCCL_IB_HCA"] == "mlx5"
    assert env["NPROC_PER_NODE"] == "8"
    assert env["NNODES"] == str(job("rdma").owner.spec["completions"])
    single = job("single-gpu")
    assert {e["name"]: e.get("value") for e in single.containers[0]["env"]}["NNODES"] == "1"
    assert single.owner.spec["completions"] == single.owner.spec["parallelism"] == 1


@pytest.mark.parametrize(("name", "old", "new", "rule"), BAD)
def test_a_fault_is_found(tmp_path: Path, name: str, old: str, new: str, rule: str) -> None:
    before = {f.rule for f in faults(tmp_path, name)}
    assert not before
    found = faults(tmp_path, name, old, new)
    assert rule in {f.rule for f in found}, [str(f) for f in found]
    for line in map(str, found):
        assert re.fullmatch(r"\S+:\d+: [a-z-]+: .+; .+", line), line


def test_every_rule_has_a_fault_that_it_finds() -> None:
    rules = {"yaml", "schema", "cel", "promql", "keda", *pod_rules.RULES, *group_rules.RULES}
    assert rules == {case[3] for case in BAD}


def test_two_autoscalers_of_one_workload(tmp_path: Path) -> None:
    for name in (
        "inference/sglang.yaml",
        "inference/common.yaml",
        "autoscaling/hpa-custom.yaml",
        "autoscaling/keda-prometheus.yaml",
    ):
        text = (CHAPTER / name).read_text(encoding="utf-8").replace("    name: vllm\n", "    name: sglang\n")
        (tmp_path / Path(name).name).write_text(text, encoding="utf-8")
    assert [f.rule for f in lint.check([tmp_path])[1]] == ["autoscaler"]


def test_a_budget_is_counted_at_the_autoscalers_minimum(tmp_path: Path) -> None:
    """minAvailable 2 of at least 2 routers blocks every drain, however many run at noon."""
    text = (CHAPTER / "autoscaling/hpa-resource.yaml").read_text(encoding="utf-8")
    (tmp_path / "a.yaml").write_text(text.replace("maxUnavailable: 1", "minAvailable: 2"), encoding="utf-8")
    assert [f.rule for f in lint.check([tmp_path])[1]] == ["pdb"]
    (tmp_path / "a.yaml").write_text(text.replace("maxUnavailable: 1", "minAvailable: 1"), encoding="utf-8")
    assert not lint.check([tmp_path])[1]


# ---------------------------------------------------------------- PromQL


@pytest.mark.parametrize(
    ("query", "one"),
    [
        ("sum(up)", True),
        ("sum by () (up)", True),
        ("max(up) / count(up) > 0.5", True),
        ("sum(up) or vector(0)", True),
        ("clamp_min(sum(up), 1)", True),
        ("histogram_quantile(0.9, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[5m])))", True),
        ("up", False),
        ("sum by (pod) (up)", False),
        ("sum without (pod) (up)", False),
        ("topk(1, up)", False),
        ("sum(up) * on () group_right () up", False),
        ("clamp_min(up, 1)", False),
        ("histogram_quantile(0.9, sum by (le, pod) (rate(vllm:time_to_first_token_seconds_bucket[5m])))", False),
    ],
)
def test_one_series(query: str, one: bool) -> None:
    found = list(promql.faults(query, promql.known(), one=True))
    assert bool(found) is not one, found


def test_grafanas_variables_are_filled_in() -> None:
    assert not list(promql.faults('sum(rate(vllm:prompt_tokens_total{pod=~"$pod"}[$__rate_interval]))', promql.known()))


def test_names_of_samples_follow_the_source() -> None:
    source = 'a = Counter(name="e:x")\nb = self._histogram_cls(name="e:y")\nc = Gauge("e:z")\nd = Gauge(name=other)\nprint("e:w")'
    assert {n: k for k, n in declared(source, "e:")} == {"e:x": "counter", "e:y": "histogram", "e:z": "gauge"}
    assert samples("counter", "e:x") == samples("counter", "e:x_total") == ["e:x_total"]
    assert samples("histogram", "e:y") == ["e:y_bucket", "e:y_sum", "e:y_count"]
    assert samples("gauge", "e:z") == ["e:z"]


# ---------------------------------------------------------------- schemas, YAML and the command


def test_a_trimmed_schema_is_strict_and_keeps_its_pods() -> None:
    pod = {name: {} for name in ("containers", "initContainers", "restartPolicy", "nodeSelector")}
    made = trim_crds.trimmed({
        "type": "object", "description": "x", "required": ["n"],
        "properties": {"n": {"x-kubernetes-int-or-string": True}, "m": {"type": "string", "nullable": True},
                       "pod": {"type": "object", "properties": pod}},
    })  # fmt: skip
    assert made == {
        "type": "object", "required": ["n"], "additionalProperties": False,
        "properties": {"n": {"type": ["integer", "string"]}, "m": {"type": ["string", "null"]}, "pod": {"x-pod-spec": True}},
    }  # fmt: skip
    assert schemas.with_pods(made)["properties"]["pod"] == schemas.POD_SPEC


def test_cel_rules_see_defaults_and_errors_and_only_what_is_there() -> None:
    rule = {"rule": "self.kind == 'a' || has(self.size)", "message": "only a has no size"}
    of_list = {"rule": "self.all(x, x.kind != 'c')"}
    old = {"rule": "self == oldSelf", "message": "cannot be changed"}
    fields = {"kind": {"type": "string", "default": "a"}, "size": {"type": "integer"}}
    item = {"type": "object", "properties": fields, "x-kubernetes-validations": [rule, old]}
    items = {"type": "array", "items": item, "x-kubernetes-validations": [of_list]}
    schema = {"properties": {"list": items, "map": {"additionalProperties": item}}}
    assert cel_rules.broken(schema, {"list": [{}, {"kind": "b", "size": 1}], "map": {"x": {"kind": "a"}}}) == []
    assert cel_rules.broken(schema, {"list": [{}, {"kind": "b"}], "map": {"x": {"kind": "c"}}}) == [
        "list[1]: only a has no size; correct it", "map.x: only a has no size; correct it",
    ]  # fmt: skip
    (found,) = cel_rules.broken(schema, {"list": [{"kind": "c", "size": 1}]})
    assert found == "list: self.all(x, x.kind != 'c') does not hold; correct it"
    no_default = {"x-kubernetes-validations": [{"rule": "self.missing > 1"}]}
    assert "cannot be evaluated" in cel_rules.broken(no_default, {"other": 1})[0]


def test_a_check_changes_nothing() -> None:
    data: dict[str, object] = {}
    cel_rules.broken({"properties": {"kind": {"default": "a"}}}, data)
    assert data == {}


def test_every_custom_resource_says_where_it_is_from() -> None:
    for crd in schemas.custom().values():
        assert re.fullmatch(r"\S+/\S+ @ [0-9a-f]{40} : \S+", crd["source"])


@pytest.mark.parametrize(("text", "value"), [("8", 8), ("500m", 0.5), ("64Gi", 64 * 2**30), ("1.5G", 1.5e9), (2, 2)])
def test_quantities(text: object, value: float) -> None:
    assert objects.quantity(text) == value


def test_a_quantity_that_is_none() -> None:
    with pytest.raises(script.UserError, match="64GB"):
        objects.quantity("64GB")


def test_every_file_says_apply_check_clean() -> None:
    scripts = [path for path in CHAPTER.rglob("*.sh") if path.parent.name != "cluster"]  # that one is build.py's
    for path in [*CHAPTER.rglob("*.yaml"), *scripts, *CHAPTER.rglob("Dockerfile")]:
        head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True)[:20] if line.startswith("#"))
        part = re.search(r"see (kustomization\.yaml) for Apply / Check / Clean and prerequisites", head)
        assert part or all(re.search(rf"^# {word}\b", head, re.M) for word in ("Prerequisites", "Check")), path
        assert part or re.search(r"^# (Clean|Stop)\b", head, re.M), path
        assert part is None or (path.parent / part[1]).is_file(), path


def test_commands_in_heads_name_files_that_exist() -> None:
    for path in CHAPTER.rglob("*.yaml"):
        for name in re.findall(r"ch08_kubernetes/[\w/.-]+", path.read_text(encoding="utf-8")):
            assert (CHAPTER.parent / name.rstrip(".")).exists(), f"{path} names {name}"


def test_scripts_that_jobs_run_exist() -> None:
    for path in CHAPTER.rglob("*.yaml"):
        for name in re.findall(r"\b(ch\d\d_\w+/[\w/]+\.(?:py|sh))", path.read_text(encoding="utf-8")):
            assert (CHAPTER.parent / name).is_file(), f"{path} runs {name}"


@kustomize
def test_flags_that_jobs_pass_are_those_of_their_scripts() -> None:
    parsers = {"ch03_ddp/train_ddp.py": ddp_options.parse, "ch04_fsdp/train_fsdp.py": fsdp_options.parse}
    lines = set()
    for owner in lint.check([CHAPTER])[0]:
        commands = [c.get("args") or [] for pod in objects.pods(owner) for c in pod.containers]
        commands.append(owner.spec.get("entrypoint", "").partition("--gpus 1 ")[2].split())
        commands.append((owner.spec.get("trainer") or {}).get("args") or [])
        lines |= {tuple(map(str, command)) for command in commands if command and command[0] in parsers}
    assert len(lines) >= 8
    for name, *flags in lines:
        args = parsers[name]("", flags)
        assert args.out is None or args.save_every, f"{name} {' '.join(flags)} keeps nothing of a crash"


@pytest.mark.parametrize(
    ("made", "says"),
    [(None, "there is no"), ("empty", "no manifest in"), (b"\xff\xfe\x00", "cannot read")],
)
def test_a_path_that_cannot_be_checked(tmp_path: Path, made: object, says: str) -> None:
    path = tmp_path / "x.yaml"
    if isinstance(made, bytes):
        path.write_bytes(made)
    target = tmp_path if made == "empty" else path
    with pytest.raises(script.UserError, match=says):
        lint.check([target])


@pytest.mark.parametrize(
    "text",
    [
        "a: [1",
        "- 1\n- 2\n",
        "a: &x 1\n---\nb: *x\n",
        "kind: [1]\n",
        "kind: Pod\nspec: 3\n",
        "kind: List\n",
        "kind: List\nitems: [a, null]\n",
        "? [a, b]\n: 1\n",
        POD + "  containers: [foo]\n",
        POD + "  volumes: x\n",
        POD + "  containers: [{name: c, image: x:1, startupProbe: {failureThreshold: x}}]\n",
        POD + "  containers: [{name: c, image: 'x:1', resources: {limits: {nvidia.com/gpu: -1Gi, memory: -1Gi}}}]\n",
    ],
)
def test_yaml_that_is_wrong_is_a_finding_not_a_traceback(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    assert lint.check([tmp_path])[1]


def test_the_command_prints_a_line_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {"containers": [{"name": "c", "image": "x"}]}}), encoding="utf-8")  # fmt: skip
    with pytest.raises(script.CheckFailed, match="1 faults in 1 objects"):
        lint.main([str(tmp_path)])
    assert capsys.readouterr().out == (
        f"{tmp_path}/pod.yaml:1: image: Pod/p: image x has no fixed version; write a tag or a digest\n"
    )


# ---------------------------------------------------------------- one rank in a pod


def a_script(folder: Path, monkeypatch: pytest.MonkeyPatch, result: str) -> str:
    (folder / "a_script_of_a_test.py").write_text(
        f"def main(argv):\n    return {{'flags': argv}} | {result}\n", encoding="utf-8"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "a_script_of_a_test", raising=False)
    return "a_script_of_a_test.py"


def test_a_rank_that_left_with_another_pod_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With exit code 0 an Indexed Job would count its index as done."""
    name = a_script(tmp_path, monkeypatch, "{'preempted': True}")
    with pytest.raises(script.CheckFailed, match="told to stop") as caught:
        rank.main([name, "--steps", "3"])
    assert caught.value.result == {"flags": ["--steps", "3"], "preempted": True}
    monkeypatch.setenv("TOLD_TO_LEAVE", str(tmp_path / "told"))  # this pod, and not yet
    with pytest.raises(script.CheckFailed):
        rank.main([name])
    (tmp_path / "told").touch()
    assert rank.main([name])["preempted"]  # agent.sh ends with 143 in its stead


def test_a_rank_that_is_done_has_its_scripts_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = a_script(tmp_path, monkeypatch, "{'preempted': False}")
    assert rank.main([name]) == {"flags": [], "preempted": False}


@pytest.mark.parametrize("name", ["missing.py", "", "/etc/passwd"])
def test_a_rank_without_its_script(name: str) -> None:
    with pytest.raises(script.UserError, match="there is no script"):
        rank.main([name])


# What agent.sh needs of torchrun: the command behind --no-python as a child, and again when it has failed.
TORCHRUN = """#!/usr/bin/env bash
while [ "$1" != --no-python ]; do shift; done
shift
trap '' INT
for attempt in 0 1; do
    echo "attempt $attempt"
    "$@" && exit 0
done
exit 1
"""
SCRIPT = """
import signal, threading
told = threading.Event()
def main(flags):
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    print("training", flush=True)
    if flags == ["--wait"] and not told.wait(60):
        raise SystemExit(7)
    print("saved", flush=True)
    return {"preempted": told.is_set()}
"""


def agent(folder: Path, flags: str, on_line: Callable[[str], None] | None = None) -> process.Child:
    """agent.sh as a pod's first process, with a stand-in for torchrun."""
    (folder / "torchrun").write_text(TORCHRUN, encoding="utf-8")
    (folder / "torchrun").chmod(0o755)
    (folder / "a_script.py").write_text(SCRIPT, encoding="utf-8")
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {"NNODES": "1", "RDZV_ENDPOINT": "localhost:1", "PATH": path, "PYTHONPATH": f"{CHAPTER.parent}:{folder}"}
    command = ["bash", str(CHAPTER / "training/agent.sh"), "a_script.py", *flags.split()]
    return process.Child(command, env=env, cwd=folder, on_line=on_line)


def test_a_pod_that_is_told_to_leave_saves_and_does_not_count_as_done(tmp_path: Path) -> None:
    training = threading.Event()
    with agent(tmp_path, "--wait", lambda line: training.set() if "training" in line else None) as child:
        assert training.wait(60), child.err
        child.process.terminate()  # as the kubelet does: the first process alone
        assert child.process.wait(60) == 143
    said = "".join(child.out)
    assert said.count("training") == said.count("saved") == 1, said  # saved, and not started again


def test_a_pod_whose_script_is_done_ends_with_0(tmp_path: Path) -> None:
    with agent(tmp_path, "") as child:
        assert child.process.wait(60) == 0, child.err
    assert "saved\n" in child.out


def test_an_agent_without_its_rendezvous_says_so(tmp_path: Path) -> None:
    command = ["env", "-u", "RDZV_ENDPOINT", "NNODES=1", "bash", str(CHAPTER / "training/agent.sh"), "x.py"]
    with process.Child(command) as child:
        assert child.process.wait(60) != 0
    assert "where do they meet" in "".join(child.err)
