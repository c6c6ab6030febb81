"""From the graph to decisions: which GPUs form a tensor-parallel group, which NIC serves which rank, where it runs.

The rules, in the order in which they decide:

  groups    tensor parallelism waits for an all-reduce in every layer, so a group is as good as its worst link;
            the GPUs are split into groups of 2, 4 and 8 so that the worst links are as good as they can be
  NIC       the closest by link kind, then one on the same NUMA node; equals share the GPUs evenly, and a NIC counts as
            an equal down to half the best rate: alone on it, a GPU still gets what half of the fast one would give
  CPUs      each rank gets its part of the cores of its GPU's NUMA node, and memory from that node

NCCL variables: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/env.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from statistics import mode

from .model import PCIE_RANK, Gpu, Machine, Nic, cpu_ranges, format_cpu_list, link_rank

GROUP_SIZES = (2, 4, 8)
LOCAL = PCIE_RANK["PXB"]  # below one host bridge: a NIC or a peer GPU is reached without the CPU
EXHAUSTIVE_GPUS = 8  # up to here every split into groups is tried


@dataclass(frozen=True)
class Group:
    """A tensor-parallel group of GPU indexes and the kind of its worst link."""

    gpus: tuple[int, ...]
    worst: str


@dataclass(frozen=True)
class RankPlan:
    """Where one local rank runs: its GPU, its NIC, its cores; `command` is the prefix that binds it."""

    rank: int
    gpu: int | None
    nic: str | None
    nic_link: str | None
    numa_node: int | None
    cpus: tuple[int, ...]
    command: str


@dataclass
class Advice:
    groups: dict[int, list[Group]] = field(default_factory=dict)  # by group size
    best_size: int = 1
    why: str = ""
    ranks: list[RankPlan] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def best_group(self) -> list[int]:
        """The GPUs of the best tensor-parallel group of the advised size; empty if there is no such group."""
        return list(self.groups[self.best_size][0].gpus) if self.best_size > 1 else []


def advise(machine: Machine) -> Advice:
    """Advice for one machine. A machine without GPUs gets ranks for CPU training."""
    advice = Advice()
    if machine.gpus:
        _tensor_parallel(machine, advice)
        _gpu_ranks(machine, advice)
    else:
        _cpu_ranks(machine, advice)
    _environment(machine, advice)
    advice.warnings = list(_warnings(machine, advice))
    return advice


# ---------------------------------------------------------------- tensor-parallel groups


def split_into_groups(machine: Machine, size: int) -> list[Group]:
    """The GPUs in groups of `size`, best group first; GPUs that fill no group are left out.

    With up to 8 GPUs every split is tried and the one with the best worst link wins (ties: the best sum of all links,
    then one NUMA node a group). With more, the best group is taken again and again.
    """
    indexes = [gpu.index for gpu in machine.gpus]
    node = {gpu.index: gpu.numa_node for gpu in machine.gpus}
    kinds = machine.gpu_links()

    def score(group: tuple[int, ...]) -> tuple[int, int, int]:
        ranks = [link_rank(kinds.get(pair)) for pair in combinations(group, 2)]
        return min(ranks), sum(ranks), -len({node[index] for index in group})

    if len(indexes) <= EXHAUSTIVE_GPUS:

        def total(split: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
            scores = [score(group) for group in split]
            return (min(s[0] for s in scores), *(sum(column) for column in zip(*scores, strict=True)))

        best = max(_splits(tuple(indexes), size), key=total, default=())
    else:
        left, chosen = indexes, []
        while len(left) >= size:
            chosen.append(max(combinations(left, size), key=score))
            left = [index for index in left if index not in chosen[-1]]
        best = tuple(chosen)
    groups = []
    for group in sorted(best, key=score, reverse=True):
        pairs = [kinds.get(pair) for pair in combinations(group, 2)]
        groups.append(Group(group, min(pairs, key=link_rank) or "unknown"))
    return groups


def _splits(indexes: tuple[int, ...], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every way to split sorted indexes into groups of `size`; what is left over is every possible rest."""
    if len(indexes) < size:
        yield ()
        return
    if len(indexes) % size:  # some GPU stays out
        for out in indexes:
            yield from _splits(tuple(i for i in indexes if i != out), size)
        return
    for others in combinations(indexes[1:], size - 1):
        group = (indexes[0], *others)
        for rest in _splits(tuple(i for i in indexes if i not in group), size):
            yield (group, *rest)


def _tensor_parallel(machine: Machine, advice: Advice) -> None:
    """The largest group size whose worst link is NVLink; without NVLink, the largest below one host bridge."""
    known = machine.gpu_links()
    count = len(machine.gpus)
    if count == 1:
        advice.why = "one GPU: nothing to pair; a larger model needs quantisation, offload or another node"
        return
    if len(known) < count * (count - 1) // 2:
        advice.why = "the GPU links are unknown (no matrix, no NVML): no group can be recommended"
        return
    advice.groups = {size: split_into_groups(machine, size) for size in GROUP_SIZES if size <= count}
    for wanted, reason in (
        (101, "every pair in the group is joined by NVLink ({worst}), so the all-reduce of each layer stays off PCIe"),
        (LOCAL, "no NVLink; the group shares PCIe bridges ({worst}) and does not go through the CPU"),
        (PCIE_RANK["PHB"], "no NVLink; {worst} is the best path: prefer data or pipeline parallelism if it fits"),
    ):
        sizes = [size for size, groups in advice.groups.items() if link_rank(groups[0].worst) >= wanted]
        if sizes:
            advice.best_size = max(sizes)
            advice.why = reason.format(worst=advice.groups[advice.best_size][0].worst)
            return
    worst = advice.groups[2][0].worst
    advice.why = f"the best pair is joined by {worst} only: keep a model on one GPU, use data or pipeline parallelism"


# ---------------------------------------------------------------- a NIC and cores for each rank


def usable_nics(machine: Machine) -> list[Nic]:
    """NICs that can carry NCCL traffic: RDMA devices that are not down, else network interfaces that are not down."""
    up = [nic for nic in machine.nics if nic.state != "down"]
    return [nic for nic in up if nic.rdma] or up


def assign_nics(machine: Machine) -> dict[int, Nic]:
    """GPU index → NIC. Among a GPU's equally good NICs the choice evens out how many GPUs share one.

    A matching with the smallest possible load: first one GPU a NIC, then two, and so on (augmenting paths).
    """
    nics = usable_nics(machine)
    if not nics:
        return {}

    def closeness(gpu: Gpu, nic: Nic) -> tuple[int, bool]:
        same_node = gpu.numa_node is not None and gpu.numa_node == nic.numa_node
        return link_rank(machine.link(gpu.label, nic.name)), same_node

    best: dict[int, list[Nic]] = {}
    for gpu in machine.gpus:
        top = max(closeness(gpu, nic) for nic in nics)
        nearest = [nic for nic in nics if closeness(gpu, nic) == top]
        fastest = max(nic.rate_gbps or 0.0 for nic in nearest)
        best[gpu.index] = [nic for nic in nearest if (nic.rate_gbps or 0.0) >= fastest / 2]
    load: dict[str, list[int]] = {nic.name: [] for nic in nics}

    def place(gpu: int, capacity: int, tried: set[str]) -> bool:
        for nic in sorted(best[gpu], key=lambda nic: (len(load[nic.name]), -(nic.rate_gbps or 0.0))):
            name = nic.name
            if name in tried:
                continue
            tried.add(name)
            if len(load[name]) < capacity:
                load[name].append(gpu)
                return True
            for other in list(load[name]):
                if place(other, capacity, tried):  # the other GPU found a NIC of its own: its seat is free
                    load[name].remove(other)
                    load[name].append(gpu)
                    return True
        return False

    for index in best:
        capacity = 1
        while not place(index, capacity, set()):
            capacity += 1
    by_name = {nic.name: nic for nic in nics}
    chosen = {gpu: by_name[name] for name, gpus in load.items() for gpu in gpus}
    return dict(sorted(chosen.items()))


def _share(cpus: tuple[int, ...], part: int, parts: int) -> tuple[int, ...]:
    """The `part`-th of `parts` shares. Each run of numbers is cut by itself, so that the two threads of a core
    (which the kernel numbers 0-47 and 96-143, say) stay together."""
    runs = cpu_ranges(cpus)
    if any(last - first + 1 < parts for first, last in runs):
        return cpus[part * len(cpus) // parts : (part + 1) * len(cpus) // parts] or cpus
    shares: list[int] = []
    for first, last in runs:
        count = last - first + 1
        shares += range(first + part * count // parts, first + (part + 1) * count // parts)
    return tuple(shares)


def bind_command(node: int | None, cpus: tuple[int, ...]) -> str:
    """The prefix that binds a process; numactl sets cores and memory, taskset (when the node is unknown) cores only."""
    if not cpus:
        return ""
    if node is None:
        return f"taskset -c {format_cpu_list(cpus)}"
    return f"numactl --physcpubind={format_cpu_list(cpus)} --membind={node}"


def _gpu_ranks(machine: Machine, advice: Advice) -> None:
    nics = assign_nics(machine)
    for rank, gpu in enumerate(machine.gpus):
        home = machine.numa_of(gpu.numa_node)
        cpus = home.cpus if home else gpu.cpus
        near = [other.index for other in machine.gpus if (other.numa_node, other.cpus) == (gpu.numa_node, gpu.cpus)]
        mine = _share(cpus, near.index(gpu.index), len(near)) if cpus else ()
        nic = nics.get(gpu.index)
        link = machine.link(gpu.label, nic.name) if nic else None
        name = nic.name if nic else None
        command = bind_command(gpu.numa_node, mine)
        advice.ranks.append(RankPlan(rank, gpu.index, name, link, gpu.numa_node, mine, command))


def _cpu_ranks(machine: Machine, advice: Advice) -> None:
    """One rank a NUMA node, so that no rank reads another node's memory; on a single node one rank, or two to learn."""
    homes = [node for node in machine.numa_nodes if node.cpus]
    cores = machine.cpu.cores if machine.cpu else sum(len(node.cpus) for node in homes)
    if not cores:
        advice.why = "no GPU, and neither lscpu nor sysfs told about the CPUs: nothing can be advised"
        return
    for rank, node in enumerate(homes):
        command = bind_command(node.id if len(homes) > 1 else None, node.cpus)
        advice.ranks.append(RankPlan(rank, None, None, None, node.id, node.cpus, command))
    threads = max(1, cores // max(1, len(homes)))
    advice.env["OMP_NUM_THREADS"] = str(threads)
    if len(homes) > 1:
        advice.why = f"no GPU: {len(homes)} ranks, one a NUMA node, {threads} threads each (one a physical core), gloo"
    else:
        advice.why = (
            f"no GPU: one rank with {threads} threads is the fastest; to exercise distributed code run 2 ranks with "
            f"{max(1, threads // 2)} thread{'s' if threads > 3 else ''} each over gloo"
        )


# ---------------------------------------------------------------- environment and warnings


def _environment(machine: Machine, advice: Advice) -> None:
    used = [rank.nic for rank in advice.ranks if rank.nic]
    by_name = {nic.name: nic for nic in machine.nics}
    hcas = sorted({name for name in used if by_name[name].kind in ("infiniband", "roce")}, key=list(by_name).index)
    if advice.best_group:
        advice.env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # nvidia-smi's order; CUDA's own puts the fastest GPU first
        advice.env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, advice.best_group))
    if hcas:
        # "=" asks for these names exactly: a bare mlx5_1 is a prefix and would take mlx5_10 too
        advice.env["NCCL_IB_HCA"] = "=" + ",".join(f"{name}:{by_name[name].port or 1}" for name in hcas)
    if any(by_name[name].kind == "efa" for name in used):
        advice.env["FI_PROVIDER"] = "efa"  # read by libfabric, below the aws-ofi-nccl plugin
    if machine.socket_interface:
        name = "NCCL_SOCKET_IFNAME" if machine.gpus else "GLOO_SOCKET_IFNAME"
        advice.env[name] = ("=" if machine.gpus else "") + machine.socket_interface


def _warnings(machine: Machine, advice: Advice) -> Iterator[str]:
    """What costs speed, each with what to do about it."""
    links = machine.gpu_links()
    crossing = [pair for pair, kind in links.items() if kind == "SYS"]
    if crossing:
        i, j = crossing[0]
        yield (
            f"{len(crossing)} GPU pair{'s cross' if len(crossing) > 1 else ' crosses'} NUMA nodes over PCIe "
            f"(SYS, such as GPU{i}-GPU{j}): keep tensor parallel groups on one side"
        )
    if len(machine.gpus) > 1 and links and not machine.nvlink_pairs:
        yield (
            "no NVLink: tensor parallelism runs over PCIe, and every layer waits for it; check that peer access works "
            "with: nvidia-smi topo -p2p r"
        )
    for gpu in machine.gpus:
        if gpu.nvlinks_total and gpu.nvlinks_active is not None and 0 < gpu.nvlinks_active < gpu.nvlinks_total:
            down = gpu.nvlinks_total - gpu.nvlinks_active
            yield (
                f"{gpu.label}: {down} of {gpu.nvlinks_total} NVLinks are inactive, a fault unless bridges are missing; "
                "see nvidia-smi nvlink --status"
            )
    rdma = [nic for nic in machine.nics if nic.rdma]
    if machine.gpus and rdma:
        far = [
            f"GPU{rank.gpu} ({rank.nic_link or 'unknown'} to {rank.nic})"
            for rank in advice.ranks
            if rank.nic and link_rank(rank.nic_link) < LOCAL
        ]
        if far:
            level = "SYS" if all("SYS" in gpu for gpu in far) else "PHB"
            yield (
                f"no NIC below the same PCIe bridges for {', '.join(far)}: by default NCCL uses GPUDirect RDMA up to "
                f"PXB only; try NCCL_NET_GDR_LEVEL={level} and measure"
            )
        if machine.gpudirect is None:
            yield (
                "GPUDirect RDMA is not available: data between GPU and NIC is copied through host memory; load "
                "nvidia_peermem, or use the open kernel modules (DMA-BUF, Linux 5.12+)"
            )
    if len(machine.gpus) > 1 and not rdma:
        yield "no RDMA device: training over several nodes would run over TCP sockets"
    for nic in rdma:
        if nic.state == "down":
            yield f"{nic.name}: the port is not ACTIVE, so NCCL cannot use it; see the cable, the switch port, ibstat"
    yield from _reduced_rates(machine, advice)
    unbound = [f"GPU{rank.gpu}" for rank in advice.ranks if rank.gpu is not None and not rank.command]
    if unbound:
        yield f"the NUMA node of {', '.join(unbound)} is unknown (virtual machine?): no binding is suggested"
    yield from machine.notes


def _reduced_rates(machine: Machine, advice: Advice) -> Iterator[str]:
    """A NIC below what its peers run at, or with fewer PCIe lanes than it could have. A slow rank slows all of them."""
    used = {rank.nic for rank in advice.ranks}
    peers = [nic for nic in machine.nics if nic.name in used and nic.rate_gbps]
    usual = mode(nic.rate_gbps for nic in peers) if peers else None
    for nic in machine.nics:
        if nic.name in used and nic.rate_gbps and usual and nic.rate_gbps < usual:
            yield (
                f"{nic.name} runs at {nic.rate_text or nic.rate_gbps}, its peers at {usual:g} Gb/s: a reduced rate, "
                "often a cable; the slowest NIC sets the pace of an all-reduce"
            )
        if nic.pcie_width and nic.pcie_width_max and nic.pcie_width < nic.pcie_width_max:
            yield f"{nic.name} has {nic.pcie_width} of {nic.pcie_width_max} PCIe lanes: reseat it or try another slot"
