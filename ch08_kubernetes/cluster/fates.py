"""What becomes of a pod on a fake node: a script of steps, each a status as a kubelet reports it.

A pod runs, is ready, and, if it is one that ends (restartPolicy Never or OnFailure), succeeds. Annotations change that:

    book/fate          one of FATES; also later, on a running pod: kubectl annotate pod NAME book/fate=OOMKilled
    book/ready-after   seconds until it is ready: image pull, weights, warm-up
    book/run-for       seconds until one that ends has ended
    book/stops-after   seconds that it takes to stop when told to
    book/logs          what its containers have printed, for kubectl logs

Reasons, messages and phases are the kubelet's own (kubernetes/kubernetes, pkg/kubelet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ch08_kubernetes.cluster.nodes import now
from ch08_kubernetes.cluster.rest import Json

FATE, READY_AFTER, RUN_FOR, STOPS_AFTER = "book/fate", "book/ready-after", "book/run-for", "book/stops-after"
LOGS = "book/logs"
WAITING = {  # reason: (what the event says, its message)
    "ImagePullBackOff": ("Failed", 'Failed to pull image "{image}": rpc error: code = NotFound desc = not found'),
    "CreateContainerConfigError": ("Failed", 'Error: secret "{name}" not found'),
    "ContainerCreating": ("FailedMount", 'MountVolume.SetUp failed for volume "{name}": timed out'),
}
ENDED = {"OOMKilled": 137, "Error": 1, "CrashLoopBackOff": 1}  # exit code
REFUSED = {
    "Evicted": "The node was low on resource: ephemeral-storage.",
    "UnexpectedAdmissionError": "Allocate failed due to requested number of devices unavailable for nvidia.com/gpu. "
    "Requested: 1, Available: 0, which is unexpected",
}
RUNS, NEVER_READY, NEVER_STOPS = "Runs", "NeverReady", "NeverStops"
FATES = (RUNS, NEVER_READY, NEVER_STOPS, *WAITING, *ENDED, *REFUSED)


@dataclass(frozen=True)
class Step:
    """after_s seconds after the one before, this status (a strategic merge patch), and an event (reason, message)."""

    after_s: float
    status: Json
    event: tuple[str, str] | None = None


def seconds(pod: Json, annotation: str, otherwise: float) -> float:
    try:
        return max(0.0, float(annotations(pod)[annotation]))
    except (KeyError, ValueError):
        return otherwise


def annotations(pod: Json) -> dict[str, str]:
    return pod["metadata"].get("annotations") or {}


def plan(pod: Json, ip: str, ready_after_s: float, run_for_s: float) -> list[Step]:
    """The steps for a pod that a node has just been given, or whose fate was changed.

    Args:
        ip: the pod's address.
        ready_after_s, run_for_s: where no annotation says otherwise.
    """
    fate = annotations(pod).get(FATE, "")
    ends = pod["spec"].get("restartPolicy", "Always") != "Always"
    waits = seconds(pod, READY_AFTER, ready_after_s)
    started = pod["status"].get("startTime") or now()
    base = {"hostIP": "127.0.0.1", "podIP": ip, "podIPs": [{"ip": ip}], "startTime": started}

    def status(phase: str, state: Json, *, ready: bool = False, restarts: int = 0, last: Json | None = None) -> Json:
        of_all = {"ready": ready, "restartCount": restarts, "started": "running" in state, "state": state}
        containers = [_container(c, of_all | ({"lastState": last} if last else {})) for c in pod["spec"]["containers"]]
        inits = [
            _container(c, {"ready": True, "restartCount": 0, "state": {"terminated": _ended("Completed", 0, started)}})
            for c in pod["spec"].get("initContainers", [])
        ]
        found = base | {"phase": phase, "conditions": _conditions(phase, ready), "containerStatuses": containers}
        return found | ({"initContainerStatuses": inits} if inits else {})

    creating = Step(0, status("Pending", {"waiting": {"reason": "ContainerCreating"}}))
    running = {"running": {"startedAt": now()}}
    starts = Step(
        0, status("Running", running), ("Started", f"Started container {pod['spec']['containers'][0]['name']}")
    )
    if fate in REFUSED:
        return [Step(0, {"phase": "Failed", "reason": fate, "message": REFUSED[fate]}, (fate, REFUSED[fate]))]
    if fate in WAITING:
        return [_held_up(pod, fate, status)]
    if fate in ENDED:
        reason = fate if fate == "OOMKilled" else "Error"
        ended = {"terminated": _ended(reason, ENDED[fate], started)}
        if pod["spec"].get("restartPolicy") == "Never":
            return [creating, starts, Step(0, status("Failed", ended))]
        back_off = {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}
        crashing = status("Running", {"waiting": back_off}, restarts=5, last=ended)
        return [creating, starts, Step(0, crashing, ("BackOff", "Back-off restarting failed container"))]
    if fate and fate not in FATES:
        message = f"{FATE} is {fate}; known are {', '.join(FATES)}"
        return [Step(0, status("Pending", {"waiting": {"reason": "UnknownFate", "message": message}}))]
    if fate == NEVER_READY:
        unready = ("Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503")
        return [creating, starts, Step(0, status("Running", running), unready)]
    steps = [creating, starts, Step(waits, status("Running", running, ready=True))]
    if ends and fate == "":
        done = {"terminated": _ended("Completed", 0, started)}
        steps.append(Step(seconds(pod, RUN_FOR, run_for_s), status("Succeeded", done)))
    return steps


def _held_up(pod: Json, reason: str, status: Any) -> Step:
    container = pod["spec"]["containers"][0]
    event, message = WAITING[reason]
    said = message.format(image=container.get("image"), name=container["name"])
    return Step(0, status("Pending", {"waiting": {"reason": reason, "message": said}}), (event, said))


def _container(container: Json, state: Json) -> Json:
    image = container.get("image", "")
    return {"name": container["name"], "image": image, "imageID": "", **state}


def _ended(reason: str, code: int, started: str) -> Json:
    return {"reason": reason, "exitCode": code, "startedAt": started, "finishedAt": now()}


def _conditions(phase: str, ready: bool) -> list[Json]:
    why = {"reason": "PodCompleted" if phase == "Succeeded" else "ContainersNotReady"}
    states = {"Initialized": phase != "Pending", "ContainersReady": ready, "Ready": ready}
    return [
        {"type": kind, "status": str(state), "lastTransitionTime": now(), **({} if state else why)}
        for kind, state in states.items()
    ]
