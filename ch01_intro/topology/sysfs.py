"""What the Linux kernel tells in /sys and /proc about NUMA nodes, NICs, GPUs on the PCI bus and GPUDirect RDMA.

Layouts: Documentation/ABI/stable/sysfs-devices-node, stable/sysfs-class-infiniband, testing/sysfs-class-net and
testing/sysfs-bus-pci in the Linux source. The root is a parameter: "/" on a live machine, a folder with the same
files for a recorded one (`FILES` lists what is read, so that a recording holds just that).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from common.script import UserError

from .model import Nic, NumaNode, parse_cpu_list

# What `record` copies. A device's own PCI data is read through its `uevent`, not through symbolic links,
# so that a recording survives zip files and Git on any system.
FILES = (
    "sys/devices/system/node/node[0-9]*/cpulist",
    "sys/devices/system/node/node[0-9]*/distance",
    "sys/devices/system/node/node[0-9]*/meminfo",
    "sys/class/infiniband/*/ports/*/rate",
    "sys/class/infiniband/*/ports/*/state",
    "sys/class/infiniband/*/ports/*/link_layer",
    "sys/class/infiniband/*/ports/*/gids/*",
    "sys/class/infiniband/*/ports/*/gid_attrs/types/*",
    "sys/class/infiniband/*/ports/*/counters/link_downed",
    "sys/class/infiniband/*/ports/*/hw_counters/out_of_sequence",
    "sys/class/infiniband/*/ports/*/hw_counters/np_ecn_marked_roce_packets",
    "sys/class/infiniband/*/device/uevent",
    "sys/class/infiniband/*/device/numa_node",
    "sys/class/infiniband/*/device/current_link_width",
    "sys/class/infiniband/*/device/max_link_width",
    "sys/class/infiniband/*/device/net/*/dev_port",
    "sys/class/net/*/device/uevent",
    "sys/class/net/*/device/numa_node",
    "sys/class/net/*/device/vendor",
    "sys/class/net/*/device/current_link_width",
    "sys/class/net/*/device/max_link_width",
    "sys/class/net/*/bonding/mode",
    "sys/class/net/*/speed",
    "sys/class/net/*/operstate",
    "sys/class/net/*/mtu",
    "sys/bus/pci/drivers/nvidia-nvswitch/*:*/numa_node",
    "sys/module/nvidia_peermem/initstate",
    "sys/module/nv_peer_mem/initstate",
    "sys/module/efa_nv_peermem/initstate",
    "proc/driver/nvidia/version",
    "proc/sys/kernel/osrelease",
    "proc/meminfo",
    "proc/self/limits",
    "proc/net/route",
)
PARAVIRTUAL_DRIVERS = ("virtio_net", "ena", "gve", "hv_netvsc", "vmxnet3", "vif", "xen_netfront")
PEER_MEMORY_MODULES = ("nvidia_peermem", "nv_peer_mem", "efa_nv_peermem")
MAX_BYTES = 1 << 20


def read(path: Path) -> str | None:
    """A small text file without the last newline; None if it is absent or the kernel refuses (speed of a down port)."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError:
        return None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path} is larger than 1 MiB, which no such file is; record the machine again with --record")
    try:
        return data.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; record the machine again with --record") from None


def _number(path: Path) -> int | None:
    text = read(path)
    if text is None or text == "":
        return None
    if not re.fullmatch(r"-?\d+", text.strip()):
        raise _corrupt(path, text, "a number")
    return int(text)


def _corrupt(path: Path, text: str, expected: str) -> UserError:
    return UserError(f"{path} holds {text[:40]!r}, not {expected}; record the machine again with --record")


def _entries(folder: Path) -> list[Path]:
    """Sub-entries in natural order: mlx5_2 before mlx5_10."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return []
    return sorted(found, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


def numa_nodes(root: Path) -> list[NumaNode]:
    """Nodes from sys/devices/system/node: CPUs, memory, and the row of the distance table."""
    folders = [path for path in _entries(root / "sys/devices/system/node") if re.fullmatch(r"node\d+", path.name)]
    ids = [int(folder.name[4:]) for folder in folders]
    nodes = []
    for node, folder in zip(ids, folders, strict=True):
        cpu_text, distance_text = read(folder / "cpulist") or "", read(folder / "distance")
        try:
            cpus = parse_cpu_list(cpu_text)
        except ValueError:
            raise _corrupt(folder / "cpulist", cpu_text, "a CPU list such as 0-7") from None
        distances: dict[int, int] = {}
        if distance_text:
            if not re.fullmatch(r"[\d\s]+", distance_text) or len(distance_text.split()) != len(ids):
                raise _corrupt(folder / "distance", distance_text, f"{len(ids)} distances, one a node")
            distances = dict(zip(ids, map(int, distance_text.split()), strict=True))
        memory = re.search(r"MemTotal:\s+(\d+) kB", read(folder / "meminfo") or "")
        nodes.append(NumaNode(node, cpus, int(memory[1]) // 1024 if memory else None, distances))
    return nodes


def nics(root: Path) -> list[Nic]:
    """RDMA devices first, then the network interfaces that are not the IP side of one of them."""
    rdma = [_rdma_device(folder, root) for folder in _entries(root / "sys/class/infiniband")]
    behind = {nic.netdev for nic in rdma}
    folders = [folder for folder in _entries(root / "sys/class/net") if folder.name not in behind]
    return rdma + [_interface(folder) for folder in folders if _is_listed(folder, root)]


def _is_physical(folder: Path) -> bool:
    return (folder / "device").is_dir() or (folder / "bonding").is_dir()


def _is_listed(folder: Path, root: Path) -> bool:
    """Loopback, bridges and the like are left out; in a container the one interface is virtual but leads outside."""
    return _is_physical(folder) or folder.name == default_interface(root)


def _rdma_device(folder: Path, root: Path) -> Nic:
    """One device of /sys/class/infiniband, seen through its first active port (else its first port)."""
    device = _pci_facts(folder / "device")
    ports = [path for path in _entries(folder / "ports") if path.name.isdigit()]
    if not ports:
        raise UserError(f"{folder} has no ports/1; record the machine again with --record")
    states = [_port_state(port) for port in ports]
    port = ports[states.index("active") if "active" in states else 0]
    rate_text, layer = read(port / "rate"), read(port / "link_layer")
    rate = re.fullmatch(r"\s*([\d.]+) Gb/sec(?: \(.*\))?\s*", rate_text) if rate_text else None
    if rate_text and not rate:
        raise _corrupt(port / "rate", rate_text, "a rate such as '400 Gb/sec (4X NDR)'")
    kind = {"InfiniBand": "infiniband", "Ethernet": "roce"}.get((layer or "").strip())
    if device["driver"] == "efa" or (
        kind is None and layer is not None and layer.strip() in ("Unknown", "Unspecified")
    ):
        kind = "efa"  # EFA has no link layer of its own: the kernel prints Unknown
    if kind is None:
        raise _corrupt(port / "link_layer", layer or "", "InfiniBand or Ethernet")
    netdevs = _entries(folder / "device/net")
    netdev = netdevs[0].name if netdevs else None
    return Nic(
        name=folder.name,
        kind=kind,
        rate_gbps=float(rate[1]) if rate else None,
        state=states[ports.index(port)],
        port=int(port.name),
        rate_text=rate_text.strip() if rate_text else None,
        link_layer=layer,
        netdev=netdev,
        mtu=_number(root / "sys/class/net" / netdev / "mtu") if netdev else None,
        roce_v2_gid=_roce_v2_gid(port) if kind == "roce" else None,
        **device,  # type: ignore[arg-type]
    )


def _port_state(port: Path) -> str:
    """The file says `4: ACTIVE` (IB spec: 1 DOWN, 2 INIT, 3 ARMED, 4 ACTIVE); only ACTIVE carries data."""
    text = read(port / "state")
    if text is None:
        return "unknown"
    if not re.fullmatch(r"\d+: [A-Z_]+", text.strip()):
        raise _corrupt(port / "state", text, "a state such as '4: ACTIVE'")
    return "active" if text.startswith("4:") else "down"


def _roce_v2_gid(port: Path) -> int | None:
    """The GID index to use for routable RoCE: type `RoCE v2`, an IPv4-mapped address before any other."""
    indexes = []
    for entry in _entries(port / "gid_attrs/types"):
        gid = read(port / "gids" / entry.name) or ""
        if (read(entry) or "").strip() == "RoCE v2" and gid.strip("0:"):
            indexes.append((not gid.startswith("0000:0000:0000:0000:0000:ffff:"), int(entry.name)))
    return min(indexes)[1] if indexes else None


def _interface(folder: Path) -> Nic:
    device = _pci_facts(folder / "device")
    speed, state = _number(folder / "speed"), (read(folder / "operstate") or "unknown").strip()
    virtual = device["driver"] in PARAVIRTUAL_DRIVERS or not (
        (folder / "device").is_dir() or (folder / "bonding").is_dir()
    )
    return Nic(
        name=folder.name,
        kind="virtual" if virtual else "ethernet",
        rate_gbps=speed / 1000 if speed and speed > 0 else None,  # -1: the driver does not know
        state={"up": "active", "unknown": "unknown"}.get(state, "down"),
        netdev=folder.name,
        mtu=_number(folder / "mtu"),
        **device,  # type: ignore[arg-type]
    )


def _pci_facts(device: Path) -> dict[str, object]:
    """Driver, PCI address, NUMA node and PCIe lanes from a device's folder. The kernel says -1 for "no node known"."""
    uevent = dict(line.split("=", 1) for line in (read(device / "uevent") or "").splitlines() if "=" in line)
    numa = _number(device / "numa_node")
    width, widest = _number(device / "current_link_width"), _number(device / "max_link_width")
    return {
        "driver": uevent.get("DRIVER"),
        "pci": uevent.get("PCI_SLOT_NAME"),
        "numa_node": numa if numa is not None and numa >= 0 else None,
        "pcie_width": width or None,
        # 255 is what the kernel prints for a virtual function, which has no lanes of its own
        "pcie_width_max": widest if widest and widest != 255 else None,
    }


def default_interface(root: Path) -> str | None:
    """The interface of the IPv4 default route (destination 0) in proc/net/route."""
    for line in (read(root / "proc/net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 2 and fields[1] == "00000000":
            return fields[0]
    return None


def has_nvswitch(root: Path) -> bool:
    """NVSwitches as PCI devices (HGX and DGX of A100 and H100). In a VM they may be hidden: False proves nothing."""
    return any(":" in path.name for path in _entries(root / "sys/bus/pci/drivers/nvidia-nvswitch"))


def gpudirect(root: Path) -> str | None:
    """How a NIC can read GPU memory by itself: a peer-memory module, or DMA-BUF, or None.

    DMA-BUF needs Linux 5.12 and NVIDIA's open kernel modules; both can be read here, the NIC driver's support cannot.
    """
    for module in PEER_MEMORY_MODULES:
        if (root / "sys/module" / module).is_dir():
            return module
    driver = read(root / "proc/driver/nvidia/version") or ""
    kernel = re.match(r"(\d+)\.(\d+)", read(root / "proc/sys/kernel/osrelease") or "")
    if "Open Kernel Module" in driver and kernel and (int(kernel[1]), int(kernel[2])) >= (5, 12):
        return "dmabuf"
    return None


def record(target: Path, root: Path = Path("/")) -> int:
    """Copy what `FILES` names below `root` into `target`; the number of files. Addresses are left out.

    Of proc/net/route only interface and destination are kept. A GID of an Ethernet port holds the port's IP address:
    its last group of digits becomes 1, which leaves "is it there" and "is it IPv4" as they were.
    """
    copied = 0
    for pattern in FILES:
        for path in sorted(root.glob(pattern)):
            relative = path.relative_to(root)
            if relative.parts[:3] == ("sys", "class", "net") and not _is_listed(root / Path(*relative.parts[:4]), root):
                continue  # hundreds of them on a host with containers
            text = read(path) if os.access(path, os.R_OK) else None
            if text is None:
                continue
            if relative.name == "route":
                text = "\n".join("\t".join(line.split()[:2]) for line in text.splitlines())
            if relative.parent.name == "gids" and text.strip("0:"):
                text = ":".join([*text.split(":")[:6], "0000", "0001"])
            destination = target / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            destination.write_text(text + "\n", encoding="utf-8")
            copied += 1
    return copied
