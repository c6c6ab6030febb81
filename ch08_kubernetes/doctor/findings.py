"""What rules find, and its order: a cause, then what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from ch08_kubernetes.doctor.facts import Facts

# From what can cause all else to what only suffers. A finding may follow from one further up alone.
ORDER: list[str] = """
webhook-down apiservice-down namespace-terminating
node-silent node-not-ready node-pressure gpu-not-seen gpu-labels-missing
quota-exceeded quota-needs-request limit-range pod-security priority-class-missing service-account-missing
webhook-unanswered namespace-closed refused
queue-missing no-queue-quota suspended
storage-class-missing no-storage-class volume-not-provisioned volume-claim-missing
service-selector service-missing
gang-deadlock preempted
node-selector untolerated-taint nodes-cordoned no-gpu-node larger-than-node fragmented-gpus no-free-gpus no-free-room
pod-placement no-scheduler unschedulable
image-name-invalid image-not-found image-pull-secret registry-unreachable registry-rate-limit image-pull
missing-config volume-multi-attach mount-failed command-not-found container-create
device-unavailable evicted
nccl-error cuda-out-of-memory address-in-use rendezvous-timeout cuda-driver name-not-resolved
liveness-kills oom-killed bus-error segfault aborted killed application-error
readiness-fails
terminating-finalizer terminating-stuck pods-on-dead-node
no-endpoints
backoff-limit deadline-exceeded pod-failure-policy
rendezvous-incomplete
rollout-stuck pdb-blocks-drain hpa-no-metrics hpa-no-target hpa-at-maximum
""".split()  # noqa: SIM905
RANKS = {cause: place for place, cause in enumerate(ORDER)}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong.

    Attributes:
        cause: one of ORDER.
        about: the objects that have it, as Kind/namespace/name.
        message: what is wrong, without the names in `about`.
        evidence: the field or event that says so, and its words.
        fix: a command, or a line of a manifest.
        needs: what explains this one, if there is a finding about it or one that gives it.
        gives: what this one explains, besides what is wrong with the objects in `about`.
        because: the cause that explains it; "" for a root cause.
        depth: how many causes lie before it; 0 for a root cause.
    """

    cause: str
    about: tuple[str, ...]
    message: str
    evidence: tuple[str, ...]
    fix: str
    needs: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()
    because: str = ""
    depth: int = 0

    def as_json(self) -> dict:
        fields = ("cause", "about", "message", "evidence", "fix", "because", "depth")
        return {field: getattr(self, field) for field in fields}


Rule = Callable[[Facts], Iterable[Finding]]


def grouped(found: Iterable[Finding]) -> list[Finding]:
    """The same trouble of several objects becomes one finding."""
    groups: dict[tuple[str, str, str], Finding] = {}
    for each in sorted(found, key=lambda f: (RANKS[f.cause], f.about, f.message)):
        key = (each.cause, each.message, each.fix)
        if there := groups.get(key):
            about = tuple(dict.fromkeys(there.about + each.about))
            needs = tuple(dict.fromkeys(there.needs + each.needs))
            gives = tuple(dict.fromkeys(there.gives + each.gives))
            groups[key] = replace(there, about=about, needs=needs, gives=gives)
        else:
            groups[key] = each
    return list(groups.values())


def ordered(found: Iterable[Finding]) -> list[Finding]:
    """Root causes by ORDER, each followed by its consequences, and theirs."""
    every = grouped(found)
    parents: dict[int, int | None] = {}
    for index, each in enumerate(every):
        causes = [i for i in range(index) if RANKS[every[i].cause] < RANKS[each.cause] and _explains(every[i], each)]
        parents[index] = causes[-1] if causes else None  # the nearest one: it has its own cause before it
    placed: list[Finding] = []

    def place(index: int, because: str, depth: int) -> None:
        placed.append(replace(every[index], because=because, depth=depth))
        for child in parents:
            if parents[child] == index:
                place(child, every[index].cause, depth + 1)

    for index, parent in parents.items():
        if parent is None:
            place(index, "", 0)
    return placed


def _explains(cause: Finding, consequence: Finding) -> bool:
    return not {*cause.about, *cause.gives}.isdisjoint(consequence.needs)


def concerning(findings: list[Finding], names: set[str]) -> list[Finding]:
    """The findings about these objects, and the causes that lead to them."""
    keep: set[int] = set()
    path: list[int] = []
    for index, each in enumerate(findings):
        path = [*path[: each.depth], index]
        if not names.isdisjoint(each.about):
            keep.update(path)
    return [findings[index] for index in sorted(keep)]


def inside(findings: list[Finding], space: str) -> list[Finding]:
    """Those about objects of a namespace, with their causes wherever these are."""
    about = {each for f in findings for each in f.about if each.count("/") == 2 and each.split("/")[1] == space}
    return concerning(findings, {*about, f"Namespace/{space}"})


def lines(findings: list[Finding], most: int = 4) -> Iterator[str]:
    """For people: root causes are numbered, consequences stand indented below."""
    count = 0
    for each in findings:
        count += each.depth == 0
        indent = "   " * each.depth
        mark = f"{count}. " if each.depth == 0 else "-> "
        about = ", ".join(each.about[:most]) + (f" and {len(each.about) - most} more" if len(each.about) > most else "")
        yield f"{indent}{mark}{each.cause}: {about}"
        yield f"{indent}   what      {each.message}"
        for evidence in each.evidence:
            yield f"{indent}   evidence  {evidence}"
        yield f"{indent}   fix       {each.fix}"
