"""Rules for jobs whose pods need each other: a rank that is not there, gangs that block each other."""

from __future__ import annotations

from collections.abc import Iterator

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor.facts import (
    Facts,
    at,
    is_gpu,
    listed,
    meets_others,
    name,
    namespace,
    number,
    owner,
    phase,
    rank,
    ref,
    requests,
    table,
    text,
)
from ch08_kubernetes.doctor.filters import barriers, selected, waiting
from ch08_kubernetes.doctor.findings import Finding
from ch08_kubernetes.doctor.workloads import finished


def gangs(facts: Facts) -> list[tuple[Json, list[Json]]]:
    """Jobs whose pods need each other, with those that are there."""
    found = []
    for job in facts.all("Job"):
        indexed = at(job, "spec", "completionMode") == "Indexed"
        pods = sorted(facts.pods_of[ref(job)], key=lambda p: (text(p, "metadata", "creationTimestamp"), name(p)))
        template = table(job, "spec", "template")
        if number(job, "spec", "parallelism") > 1 and not finished(job) and (indexed or meets_others(template)):
            found.append((job, pods))
    return found


def deadlock(facts: Facts) -> Iterator[Finding]:
    """Gangs that each hold a part of the GPUs that all wait for: none will ever start."""
    half = []
    for job, pods in gangs(facts):
        placed = [p for p in pods if text(p, "spec", "nodeName") and phase(p) in ("Pending", "Running")]
        without = [p for p in waiting(facts) if owner(p) == ref(job)]
        if placed and without:
            half.append((job, placed, without))
    for job, placed, without in half:
        others = [
            other
            for other, theirs, _ in half
            if other is not job and any(_would_do(facts, held, p) for held in theirs for p in without)
        ]
        both = [
            o for o in others if any(_would_do(facts, h, p) for h in placed for j, _, w in half if j is o for p in w)
        ]
        if both:
            names = tuple(sorted(ref(each) for each in (job, *both)))
            parts = "; ".join(f"{ref(j)} has {len(p)} of {len(p) + len(w)} pods" for j, p, w in half if ref(j) in names)
            evidence = tuple(
                f"{ref(p)} holds {text(p, 'spec', 'nodeName')}" for j, ps, _ in half if ref(j) in names for p in ps
            )
            yield Finding(
                "gang-deadlock",
                names,
                f"each holds GPUs that the other waits for, and none can start: {parts}",
                evidence[:6],
                (
                    f"kubectl -n {namespace(job)} delete job {names[-1].rpartition('/')[2]}, and start "
                    "it when the other is done; gangs by Kueue (scheduling/gang.yaml) do not end here"
                ),
                (),
                tuple(f"Deadlock/{each}" for each in names),
            )


def _would_do(facts: Facts, held: Json, pod: Json) -> bool:
    """Whether the place of one pod would be good for another, as far as GPUs go."""
    node = facts.get(f"Node/{text(held, 'spec', 'nodeName')}")
    gpus = {k: v for k, v in requests(pod).items() if is_gpu(k) and v}
    if node is None or not gpus or not selected(pod, node) or barriers(pod, node):
        return False
    free, gained = facts.free(node), requests(held)
    return all(free.get(k, 0) + gained.get(k, 0) >= v and gained.get(k, 0) > 0 for k, v in gpus.items())


def incomplete(facts: Facts) -> Iterator[Finding]:
    """A job of several ranks of which some run and wait for the one that does not."""
    for job, pods in gangs(facts):
        of_rank = ranks(job, pods)
        total = number(job, "spec", "parallelism")
        runs = sorted(r for r, p in of_rank.items() if phase(p) == "Running" and _up(p))
        done = [r for r, p in of_rank.items() if phase(p) == "Succeeded"]
        absent = [r for r in range(total) if r not in runs and r not in done]
        if not runs or not absent:
            continue
        lacking = []
        for r in absent:
            pod = of_rank.get(r)
            lacking.append(f"rank {r} " + (f"({name(pod)}: {state(pod)})" if pod else "(no pod)"))
        indexed = at(job, "spec", "completionMode") == "Indexed"
        message = f"{len(runs)} of {total} ranks run and wait in the rendezvous for {', '.join(lacking[:6])}" + (
            "" if indexed else "; ranks by order of creation, as the job is not Indexed"
        )
        needs = tuple(ref(of_rank[r]) for r in absent if r in of_rank)
        evidence = tuple(f"{ref(of_rank[r])} status.phase: {phase(of_rank[r])}" for r in absent if r in of_rank) or (
            f"{ref(job)} status.active: {number(job, 'status', 'active')}",
        )
        yield Finding(
            "rendezvous-incomplete",
            (ref(job),),
            message,
            evidence[:4],
            "mend what keeps these ranks; torchrun gives up after its own timeout (--rdzv-conf join_timeout)",
            (*needs, ref(job)),
        )


def _up(pod: Json) -> bool:
    return all(table(s, "state", "running") for s in listed(pod, "status", "containerStatuses"))


def state(pod: Json) -> str:
    """The most that is known of why a pod does not run, in a word."""
    for status in listed(pod, "status", "containerStatuses"):
        for kind in ("waiting", "terminated"):
            if reason := text(status, "state", kind, "reason"):
                return reason
    return text(pod, "status", "reason") or phase(pod) or "unknown"


def ranks(job: Json, pods: list[Json]) -> dict[int, Json]:
    """Each rank's newest pod. A Job that is not Indexed gives none: then the order of creation stands for it."""
    found: dict[int, Json] = {}
    if at(job, "spec", "completionMode") == "Indexed" or any(rank(p) for p in pods):
        for pod in pods:
            if rank(pod).isdigit():
                found[int(rank(pod))] = pod
        return found
    living = [p for p in pods if phase(p) != "Failed"]
    return dict(enumerate(living))


RULES = [deadlock, incomplete]
