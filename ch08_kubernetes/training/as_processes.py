"""A training Job's pods as processes on this machine: the very command and environment, without a cluster.

You learn   what a pod of a multi-node job is given, and what happens when one is told to leave: a checkpoint, a
            replacement, and the same weights at the end
Laptop      python -m ch08_kubernetes.training.as_processes
            python -m ch08_kubernetes.training.as_processes --leave 1
GPU node    kubectl apply -k ch08_kubernetes/training/overlays/single-gpu
Cluster     kubectl apply -k ch08_kubernetes/training/overlays/8xh100
You see     both pods' lines, RESULT of rank 0 as the job's own; with --leave a pod that ends with 143 and comes again

Changed are only the names that a cluster's network and volumes give: the Service and POD_IP become 127.0.0.1, eth0
becomes lo, the claim's mount a folder of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ch08_kubernetes.lint.objects import Pod, mapping, pods, read, rendered
from common import process, script
from common.ranks import free_port

Json = dict[str, Any]
CHECKOUT = Path(__file__).parents[2]
OVERLAY = CHECKOUT / "ch08_kubernetes/training/overlays/dev"


def job(folder: Path) -> Pod:
    """The pod template of the one Job that kustomize makes of a folder.

    Raises:
        UserError: there is none, or several.
    """
    objects, faults = read(folder, rendered(folder))
    found = [pod for owner in objects if owner.kind == "Job" for pod in pods(owner)]
    if faults or len(found) != 1:
        raise script.UserError(f"{folder} makes {len(found)} Jobs; name an overlay with one, as {OVERLAY.name}")
    return found[0]


class Places:
    """What the names in a manifest are on this machine."""

    def __init__(self, pod: Pod, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        mounts = pod.containers[0].get("volumeMounts", [])
        self.mounts = [mount["mountPath"] for mount in mounts if mount["mountPath"] != "/dev/shm"]

    def here(self, text: str) -> str:
        for mount in self.mounts:
            text = text.replace(mount, str(self.folder / mount.strip("/")))
        return text

    def environment(self, pod: Pod, index: int) -> dict[str, str]:
        """The container's own, and the index that the Job controller adds."""
        known = {"status.podIP": "127.0.0.1", "metadata.name": f"{pod.owner.name}-{index}"}
        found = {"JOB_COMPLETION_INDEX": str(index)}
        for entry in pod.containers[0].get("env", []):
            name, value = entry["name"], entry.get("value")
            if value is None:
                field = mapping(mapping(entry.get("valueFrom")).get("fieldRef")).get("fieldPath", "")
                value = known.get(field, "")
            if name == "RDZV_ENDPOINT":
                value = f"127.0.0.1:{self.port}"
            if name.endswith("_SOCKET_IFNAME"):
                value = value.replace("eth0", "lo")
            if name != "XDG_CACHE_HOME":  # the cache here has the tokenised text already
                found[name] = self.here(value)
        return found


def start(pod: Pod, places: Places, index: int, on_line: Callable[[str], None]) -> process.Child:
    container = pod.containers[0]
    words = [*container["command"], *(places.here(str(word)) for word in container.get("args", []))]
    env = places.environment(pod, index) | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    return process.Child(words, env=env, cwd=CHECKOUT, on_line=on_line)


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("overlay", nargs="?", type=Path, default=OVERLAY, help="a folder with kustomization.yaml")
    parser.add_argument("--leave", type=script.at_least(0), metavar="INDEX", help="tell this pod to leave, once")
    parser.add_argument("--timeout-s", type=script.positive, default=300)
    args = parser.parse_args(argv)
    run = script.start(__file__, args)
    pod = job(args.overlay)
    size = int(pod.owner.spec.get("completions", 1))
    if args.leave is not None and args.leave >= size:
        raise script.UserError(f"the Job has the pods 0 to {size - 1}; take --leave {size - 1}")
    places = Places(pod, run.path("volumes"), free_port())
    deadline = time.monotonic() + args.timeout_s

    def show(index: int) -> Callable[[str], None]:
        return lambda line: print(f"{pod.owner.name}-{index} | {line}", flush=True)

    codes: dict[int, list[int]] = {index: [] for index in range(size)}
    children = {index: start(pod, places, index, show(index)) for index in range(size)}
    try:
        if args.leave is not None:
            while not any(places.folder.rglob("step-*/meta.json")):  # a first checkpoint: it trains
                if time.monotonic() > deadline:
                    raise script.UserError(f"no checkpoint in {args.timeout_s:g} s; see the pods' lines above")
                time.sleep(0.05)
            children[args.leave].process.terminate()  # as the kubelet does: the first process of the pod alone
        while waiting := [index for index in range(size) if not codes[index] or codes[index][-1]]:
            for index in waiting:
                code = children[index].process.poll()
                if code is None:
                    continue
                codes[index].append(code)
                if code:  # the Job controller makes a pod with the same index
                    if len(codes[index]) > pod.owner.spec.get("backoffLimit", 6):
                        raise script.CheckFailed(f"pod {index} has ended with {codes[index]}; see its lines above")
                    children[index].stop(1)
                    children[index] = start(pod, places, index, show(index))
            if time.monotonic() > deadline:
                raise script.UserError(f"the pods run longer than {args.timeout_s:g} s; see their lines above")
            time.sleep(0.05)
        ended = {index: child.wait(5) for index, child in children.items()}
    finally:
        for child in children.values():
            child.stop(1)
    results = [done.result for done in ended.values() if done.result]
    if len(results) != 1:
        raise script.CheckFailed(f"{len(results)} pods printed a RESULT, one must; see their lines above")
    codes_of = {str(index): said for index, said in codes.items()}
    return {"pods": size, "exit_codes": codes_of, "replaced": sum(map(len, codes.values())) - size, **results[0]}


if __name__ == "__main__":
    script.run(main)
