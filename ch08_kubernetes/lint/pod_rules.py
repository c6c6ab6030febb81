"""What goes wrong in one pod of an AI workload though the API server takes it.

Times that only the author knows stand in the template's annotations, in seconds: how long the model takes to load
(MODEL_LOAD), the longest answer (LONGEST_STREAM), and how long a checkpoint takes (CHECKPOINT).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from ch08_kubernetes.lint.objects import Finding, Pod, limits, mapping, quantity

PREFIX = "distributed-ai.example/"
MODEL_LOAD = PREFIX + "model-load-seconds"
LONGEST_STREAM = PREFIX + "longest-stream-seconds"
CHECKPOINT = PREFIX + "checkpoint-seconds"
GPU = "nvidia.com/gpu"
# Set by the controllers, before the template's own variables.
INJECTED = {"LeaderWorkerSet": ("LWS_LEADER_ADDRESS", "LWS_GROUP_SIZE", "LWS_WORKER_INDEX")}
SHELLS = ("sh", "bash", "/bin/sh", "/bin/bash")
Rule = Callable[[Pod], Iterator[Finding]]


def is_gpu(resource: str) -> bool:
    """A whole GPU, a shared one or a MIG slice."""
    return resource == GPU or resource == GPU + ".shared" or resource.startswith("nvidia.com/mig-")


def gpu_request(pod: Pod) -> Iterator[Finding]:
    """GPUs cannot be overcommitted: a limit, and a request only if it is the same."""
    for container in pod.containers:
        asked, allowed = limits(container, "requests"), limits(container)
        for name in sorted({*asked, *allowed}):
            if not is_gpu(name) or (name in allowed and asked.get(name, allowed[name]) == allowed[name]):
                continue
            what = f"requests {asked.get(name)} and limits {allowed.get(name, 'none')} of {name}"
            yield pod.finding("gpu-request", f"container {container.get('name')} {what}; set the same limit")


def uses_gpu(pod: Pod) -> bool:
    return any(is_gpu(name) for container in pod.containers for name in limits(container))


def shared_memory(pod: Pod) -> Iterator[Finding]:
    """/dev/shm is 64 MiB by default, too little for NCCL and data loaders; a larger one counts as the pod's memory."""
    volumes = {volume.get("name"): mapping(volume.get("emptyDir")) for volume in pod.spec.get("volumes") or []}
    for container in pod.containers:
        mounts = {m.get("mountPath"): m.get("name") for m in container.get("volumeMounts") or []}
        name, memory = container.get("name"), limits(container).get("memory")
        if "/dev/shm" not in mounts:
            if quantity(limits(container).get(GPU, 0)) > 1:
                yield pod.finding(
                    "shm", f"container {name} has several GPUs and the 64 MiB /dev/shm; mount an emptyDir of Memory"
                )
            continue
        volume = volumes.get(mounts["/dev/shm"], {})
        size = volume.get("sizeLimit")
        if volume.get("medium") != "Memory":
            yield pod.finding("shm", f"/dev/shm of {name} is on the node's disk; set emptyDir.medium: Memory")
        elif size is None:
            yield pod.finding("shm", f"/dev/shm of {name} has no sizeLimit: half of the node's memory; set one")
        elif memory is None:
            yield pod.finding(
                "shm", f"container {name} has /dev/shm of {size} and no memory limit; set one that holds both"
            )
        elif quantity(memory) < 2 * quantity(size):
            yield pod.finding(
                "shm",
                f"/dev/shm ({size}) counts in {name}'s memory limit ({memory}); set the limit to twice it or more",
            )


def memory_limit(pod: Pod) -> Iterator[Finding]:
    """Without a memory limit one loader takes the node down; without a CPU request the GPU waits for its loaders."""
    if not uses_gpu(pod):
        return
    for container in pod.containers:
        if not any(is_gpu(name) for name in limits(container)):
            continue
        if "memory" not in limits(container):
            yield pod.finding("memory", f"container {container.get('name')} has a GPU and no memory limit; set one")
        if "cpu" not in limits(container, "requests") and "cpu" not in limits(container):
            yield pod.finding(
                "memory", f"container {container.get('name')} has a GPU and requests no CPU; request some"
            )


def variables(pod: Pod) -> Iterator[Finding]:
    """Kubernetes replaces $(VAR), and only where VAR is in env (for env itself: above it). $VAR is a shell's."""
    for container in [*pod.containers, *(pod.spec.get("initContainers") or [])]:
        name = container.get("name")
        known = set(INJECTED.get(pod.owner.kind, ()))
        for entry in container.get("env") or []:
            value = str(entry.get("value") or "")
            yield from _literals(pod, f"env {entry.get('name')} of {name}", value, known, container)
            known.add(entry.get("name"))
        command = [str(part) for part in container.get("command") or []]
        if command and command[0] in SHELLS:
            continue
        for part in [*command, *map(str, container.get("args") or [])]:
            yield from _literals(pod, f"an argument of {name}", part, known, container)


def _literals(pod: Pod, where: str, text: str, known: set[str], container: dict[str, Any]) -> Iterator[Finding]:
    if found := re.search(r"(?<!\$)\$\{?([A-Za-z_]\w*)\}?", text):
        yield pod.finding("variable", f"{where} has {found[0]}, which stays as it is; write $({found[1]})")
    for used in re.findall(r"(?<!\$)\$\(([A-Za-z_]\w*)\)", text):
        if used not in known and not container.get("envFrom"):
            yield pod.finding("variable", f"{where} has $({used}), not set above it; add {used} to env before")


def number(pod: Pod, annotation: str) -> int | None:
    text = str(pod.annotations.get(annotation, ""))
    return int(text) if text.isdecimal() else None


def budget_s(probe: dict[str, Any]) -> int:
    """Seconds until a probe has failed for good (Kubernetes' defaults: period 10 s, 3 failures)."""
    period = int(probe.get("periodSeconds", 10))
    return int(probe.get("initialDelaySeconds", 0)) + period * int(probe.get("failureThreshold", 3))


def start_up(pod: Pod) -> Iterator[Finding]:
    """A server that is killed while it loads its model loads it again, for ever."""
    if not (pod.serves and uses_gpu(pod)):
        return
    load = number(pod, MODEL_LOAD)
    if load is None:
        yield pod.finding("start-up", f"how long the model loads is not said; annotate the template with {MODEL_LOAD}")
        return
    for container in (c for c in pod.containers if c.get("ports")):
        probe = mapping(container.get("startupProbe"))
        if not probe:
            yield pod.finding("start-up", f"container {container.get('name')} has no startupProbe; give it {load} s")
        elif budget_s(probe) < load:
            yield pod.finding(
                "start-up",
                f"container {container.get('name')} is killed after {budget_s(probe)} s and loads for {load} s; "
                "raise startupProbe.failureThreshold",
            )


def probes(pod: Pod) -> Iterator[Finding]:
    """An open port says that a process listens, not that a model answers."""
    if not pod.serves:
        return
    for container in (c for c in pod.containers if c.get("ports")):
        ready = mapping(container.get("readinessProbe"))
        name = container.get("name")
        if not ready:
            yield pod.finding("probe", f"container {name} gets requests before it answers; add a readinessProbe")
        elif "tcpSocket" in ready:
            yield pod.finding("probe", f"container {name} is ready once its port is open; ask its HTTP health instead")


def stop_delay_s(container: dict[str, Any]) -> int:
    """Seconds that a preStop hook takes of the grace period."""
    hook = mapping(mapping(container.get("lifecycle")).get("preStop"))
    if "sleep" in hook:
        return int(hook["sleep"].get("seconds", 0))
    words = " ".join(map(str, mapping(hook.get("exec")).get("command") or []))
    found = re.search(r"\bsleep (\d+)", words)
    return int(found[1]) if found else 0


def grace(pod: Pod) -> Iterator[Finding]:
    """The grace period begins with preStop; what is not done at its end is killed: an answer, or a checkpoint."""
    has = int(pod.spec.get("terminationGracePeriodSeconds", 30))
    delay = max((stop_delay_s(container) for container in pod.containers), default=0)
    for annotation, what in ((LONGEST_STREAM, "the longest answer"), (CHECKPOINT, "a checkpoint")):
        needed = number(pod, annotation)
        if needed is not None and has < delay + needed:
            yield pod.finding(
                "grace", f"{what} takes {needed} s after {delay} s of preStop, and the pod is killed after {has} s; "
                f"set terminationGracePeriodSeconds to {delay + needed} or more",
            )  # fmt: skip
    if pod.serves and uses_gpu(pod):
        if number(pod, LONGEST_STREAM) is None:
            yield pod.finding(
                "grace", f"how long the longest answer takes is not said; annotate the template with {LONGEST_STREAM}"
            )
        if delay == 0:
            yield pod.finding(
                "grace", "requests still come for seconds after SIGTERM, until all proxies know; add a preStop sleep"
            )


def toleration(pod: Pod) -> Iterator[Finding]:
    """GPU nodes carry the taint nvidia.com/gpu, so that other pods stay away."""
    tolerated = {str(t.get("key")) for t in pod.spec.get("tolerations") or []}
    everything = any(t.get("operator") == "Exists" and not t.get("key") for t in pod.spec.get("tolerations") or [])
    if uses_gpu(pod) and GPU not in tolerated and not everything:
        yield pod.finding("toleration", f"the pod wants a GPU and does not tolerate the taint {GPU}; add a toleration")


def image(pod: Pod) -> Iterator[Finding]:
    """What :latest is today is not what the next node pulls tomorrow."""
    for container in [*pod.containers, *(pod.spec.get("initContainers") or [])]:
        name = str(container.get("image", ""))
        last = name.rpartition("/")[2]
        if name and "@sha256:" not in name and (":" not in last or last.endswith(":latest")):
            yield pod.finding("image", f"image {name} has no fixed version; write a tag or a digest")


def secret(pod: Pod) -> Iterator[Finding]:
    """A secret in a manifest is in git, in etcd's history and in everybody's `kubectl get -o yaml`."""
    for container in pod.containers:
        for entry in container.get("env") or []:
            name = str(entry.get("name"))
            if re.search(r"(TOKEN|PASSWORD|SECRET|API_KEY)$", name) and entry.get("value"):
                yield pod.finding("secret", f"env {name} has its value in the manifest; take it from a secretKeyRef")


def network(pod: Pod) -> Iterator[Finding]:
    """NCCL's variables against the network that the pod has."""
    for container in pod.containers:
        env = {e.get("name"): str(e.get("value", "")) for e in container.get("env") or []}
        rdma = [
            name for name in limits(container) if name.startswith("rdma/") or "/sriov" in name or "infiniband" in name
        ]
        interface = env.get("NCCL_SOCKET_IFNAME", "")
        if interface.lstrip("=") in ("lo", "docker0"):
            yield pod.finding("network", f"NCCL_SOCKET_IFNAME={interface} reaches no other pod; a pod's is eth0")
        if rdma and env.get("NCCL_IB_DISABLE") == "1":
            yield pod.finding("network", f"the pod asks for {rdma[0]} and sets NCCL_IB_DISABLE=1; remove one")
        added = mapping(mapping(container.get("securityContext")).get("capabilities")).get("add") or []
        if rdma and "IPC_LOCK" not in added:
            yield pod.finding("network", "RDMA pins memory, which needs the capability IPC_LOCK; add it")


RULES: dict[str, Rule] = {
    "gpu-request": gpu_request, "shm": shared_memory, "memory": memory_limit, "variable": variables,
    "start-up": start_up, "probe": probes, "grace": grace, "toleration": toleration, "image": image,
    "secret": secret, "network": network,
}  # fmt: skip
