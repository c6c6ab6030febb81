"""All rules over one snapshot: pure, and the same whatever the order of the objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from ch08_kubernetes.cluster.rest import Json
from ch08_kubernetes.doctor import containers, gangs, images, infrastructure, logs, placement, services, workloads
from ch08_kubernetes.doctor.facts import Facts
from ch08_kubernetes.doctor.findings import Finding, Rule, ordered

RULES: list[Rule] = [
    *placement.RULES, *images.RULES, *containers.RULES, *workloads.RULES, *gangs.RULES, *infrastructure.RULES,
    *services.RULES, *logs.RULES,
]  # fmt: skip


def diagnose(
    objects: Iterable[Json], now: datetime | None = None, logs: Mapping[str, str] | None = None
) -> list[Finding]:
    """What is wrong, root causes first, each followed by what it causes. Nothing for a healthy cluster.

    Args:
        objects: of all kinds, as `kubectl get -o json` prints them.
        now: when they were so; the latest time that any of them names, if None.
        logs: last lines of containers, by Pod/namespace/name.
    """
    facts = Facts(objects, now, logs)
    return ordered(finding for rule in RULES for finding in rule(facts))
