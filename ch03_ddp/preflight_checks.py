"""The verdicts of preflight.py: each check reads the nodes' facts and says what is wrong with whom, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ch03_ddp.preflight_facts import INWARD, Facts

OK, WARN, BROKEN = "ok", "warn", "BROKEN"
SHM_GIB, DISK_GIB, OPEN_FILES = 1.0, 10.0, 4096  # below them a warning


@dataclass(frozen=True)
class Check:
    """One line of the report. BROKEN stops a job or makes it wrong; `fix` says what to do."""

    topic: str
    verdict: str
    found: str
    fix: str = ""


def all_checks(nodes: Sequence[Facts], ranks: Sequence[Facts], *, cuda: bool, clock_bound_ms: float) -> list[Check]:
    """What the reports say; an `ok` line for each topic with nothing wrong."""
    topics = {
        "versions": same_versions(ranks),
        "GPUs": same_gpus(nodes, cuda),
        "interface": interfaces(nodes, cuda) if len(nodes) > 1 else iter(()),
        "clock": clocks(nodes, clock_bound_ms),
        "limits": limits(nodes),
        "RDMA": (Check("RDMA", WARN, f"{node.host}: {line}") for node in nodes for line in node.attention),
    }
    found: list[Check] = []
    for topic, checks in topics.items():
        found += list(checks) or [Check(topic, OK, summary(topic, nodes))]
    return found


def summary(topic: str, nodes: Sequence[Facts]) -> str:
    first = nodes[0]
    if topic == "versions":
        return f"python {first.versions['python']}, torch {first.versions['torch']}, commit {first.versions['commit']}"
    if topic == "interface":
        return f"{first.interface}, MTU {first.mtu}" if len(nodes) > 1 else "one node: loopback will do"
    if topic == "clock":
        return f"all within {max(abs(n.clock_ms) + n.clock_pm_ms for n in nodes):.1f} ms of rank 0's"
    return {"GPUs": f"{len(first.gpus)} a node", "limits": "enough on all nodes"}.get(topic, "nothing to see to")


def odd_ones(values: Sequence[object]) -> tuple[object, list[int]]:
    """The most common value (of equals, the first) and the places that have another."""
    common = Counter(map(repr, values)).most_common(1)[0][0]
    usual = next(value for value in values if repr(value) == common)
    return usual, [place for place, value in enumerate(values) if value != usual]


def same_versions(ranks: Sequence[Facts]) -> Iterator[Check]:
    for name in sorted({name for rank in ranks for name in rank.versions}):
        usual, odd = odd_ones([rank.versions.get(name) for rank in ranks])
        for host in sorted({ranks[place].host for place in odd}):
            theirs = next(ranks[place].versions.get(name) for place in odd if ranks[place].host == host)
            found = f"{host} has {name} {theirs or '(none)'}, the others {usual or '(none)'}"
            advice = "check out one commit" if name == "commit" else "install the same (make setup)"
            yield Check("versions", BROKEN, found, f"{advice} on all nodes, or share one folder")


def same_gpus(nodes: Sequence[Facts], cuda: bool) -> Iterator[Check]:
    usual, odd = odd_ones([node.gpus for node in nodes])
    for place in odd:
        found = f"{nodes[place].host} has {counted(nodes[place].gpus)}, the others {counted(usual)}"
        yield Check(
            "GPUs", BROKEN if cuda else WARN, found, "see nvidia-smi there; leave the node out, or ask for equal ones"
        )
    for node in nodes:
        if cuda and len(node.gpus) < node.local_world_size > 1:
            found = f"{node.host} has {len(node.gpus)} GPUs for {node.local_world_size} ranks"
            yield Check("GPUs", BROKEN, found, "start one rank a GPU")


def counted(gpus: object) -> str:
    count = Counter(gpus) if isinstance(gpus, list) else Counter()
    return ", ".join(f"{number} x {name}" for name, number in count.items()) or "no GPU"


def interfaces(nodes: Sequence[Facts], cuda: bool) -> Iterator[Check]:
    for node in nodes:
        variables = {"GLOO_SOCKET_IFNAME": node.gloo} | ({"NCCL_SOCKET_IFNAME": node.nccl} if cuda else {})
        for name, said in variables.items():
            yield from chosen(node, name, said) if said is not None else ()
        if INWARD.match(node.interface):
            found = f"{node.host}: the way to the other nodes leaves through {node.interface} ({node.address})"
            yield Check("interface", BROKEN, found, "give MASTER_ADDR and the hosts' names addresses of the network")
        loops = [address for address in node.own_name_is if address.startswith("127.") or address == "::1"]
        if node.gloo is None and (loops or not node.own_name_is):
            found = f"{node.host}: its own name means {loops[0] if loops else 'nothing'}, and gloo listens there"
            yield Check("interface", BROKEN, found, f"set GLOO_SOCKET_IFNAME={node.interface}, or correct /etc/hosts")
    for what in ("mtu", "speed_mbit"):
        usual, odd = odd_ones([getattr(node, what) for node in nodes])
        for place in odd:
            node = nodes[place]
            found = f"{node.host}: {node.interface} has {what} {getattr(node, what)}, the others {usual}"
            yield Check(
                "interface", WARN, found, "large messages may get lost, or all wait for the slow one: make equal"
            )


def chosen(node: Facts, variable: str, said: str) -> Iterator[Check]:
    """gloo takes names; NCCL also beginnings of names, =exact ones, and ^those to leave out."""
    nccl = variable.startswith("NCCL")
    if nccl and said.startswith("^"):
        return
    exact = not nccl or said.startswith("=")
    for name in said.removeprefix("=").split(","):
        there = [i for i in node.interfaces if i == name or (not exact and i.startswith(name))]
        if not there:
            found = f"{node.host}: {variable}={said}, and there is no {name}; it has {', '.join(node.interfaces)}"
            yield Check("interface", BROKEN, found, f"set it to {node.interface} there, or unset it")
        elif all(INWARD.match(i) for i in there):
            found = f"{node.host}: {variable}={said}, which leads to no other node"
            yield Check("interface", BROKEN, found, f"set it to {node.interface} there, or unset it")


def clocks(nodes: Sequence[Facts], bound_ms: float) -> Iterator[Check]:
    for node in nodes:
        if abs(node.clock_ms) - node.clock_pm_ms > bound_ms:
            found = f"{node.host}: its clock is {node.clock_ms:+.0f} ms (± {node.clock_pm_ms:.0f}) off rank 0's"
            yield Check("clock", WARN, found, "logs and traces will not line up, certificates may fail: start chrony")


def limits(nodes: Sequence[Facts]) -> Iterator[Check]:
    for node in nodes:
        if node.shm_gib < SHM_GIB:
            found, fix = (
                f"/dev/shm holds {node.shm_gib:.2f} GiB",
                "NCCL and data loaders need it: --shm-size=16g for docker",
            )
            yield Check("limits", BROKEN if node.shm_gib < 0.03 else WARN, f"{node.host}: {found}", fix)
        if node.disk_gib < DISK_GIB:
            verdict = BROKEN if node.disk_gib < 0.5 else WARN
            found = f"{node.host}: {node.disk_gib:.1f} GiB are free where the job writes"
            yield Check("limits", verdict, found, "make room, or write elsewhere")
        if node.open_files < OPEN_FILES:
            found = f"{node.host}: {node.open_files} open files a process"
            verdict = BROKEN if node.open_files < 256 else WARN
            yield Check("limits", verdict, found, "ulimit -n 65536: each rank, loader and file takes some")


def unreachable(hosts: Sequence[str], failures: Sequence[tuple[int, int, str]]) -> list[Check]:
    """The pairs whose connection failed: (from, to, why) by node."""
    fix = "open the ports above 1024 between the nodes (firewall, security group), and check the route"
    return [Check("connect", BROKEN, f"{hosts[a]} -> {hosts[b]}: {why}", fix) for a, b, why in failures]


def unresolved(hosts: Sequence[str], failures: Sequence[tuple[int, int]]) -> list[Check]:
    fix = "torchrun c10d needs the names: add them to DNS or /etc/hosts, or pass --local-addr"
    return [Check("names", WARN, f"{hosts[a]} does not know the name {hosts[b]}", fix) for a, b in failures]
