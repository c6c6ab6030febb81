"""Chapter 1: the parsers on recorded machines, the advice, bad input, and the two scripts as a reader starts them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_intro.topology import Machine, advise, detect, link_rank, sysfs
from ch01_intro.topology import nvml as nvml_source
from ch01_intro.topology.advise import assign_nics, split_into_groups
from ch01_intro.topology.draw import draw_png, text_tree
from ch01_intro.topology.model import Gpu, Nic, NumaNode, format_cpu_list, parse_cpu_list
from ch01_intro.topology.network import ATTENTION, OK, findings, node_gbps, rdma_mtu, ring_allreduce_seconds
from ch01_intro.topology.parse import parse_gpu_query, parse_lscpu, parse_topo, pci_address
from common.script import UserError

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests/fixtures/topology"
MACHINES = sorted(path.name for path in FIXTURES.iterdir())


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def topo(name: str = "hgx_h100") -> str:
    return (FIXTURES / name / "topo.txt").read_text()


# ---------------------------------------------------------------- recorded machines


@pytest.mark.parametrize(
    ("name", "gpus", "nics", "numa", "cores", "pairs", "switch", "gpudirect", "group"),
    [
        ("hgx_h100", 8, 11, 2, 96, 28, True, "nvidia_peermem", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("dgx_a100", 8, 11, 8, 128, 28, True, None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("pcie_workstation", 4, 2, 1, 32, 0, False, None, [0, 1]),
        ("single_gpu", 1, 1, 1, 12, 0, None, None, []),
        ("cloud_vm_multi_nic", 4, 4, 1, 48, 0, False, "efa_nv_peermem", [0, 1, 2, 3]),
        ("cpu_only", 0, 3, 2, 64, 0, False, None, []),
        ("nvlink_pairs", 4, 3, 2, 64, 2, False, "dmabuf", [0, 1]),
        ("old_driver", 4, 1, 2, 20, 0, False, None, [0, 1]),
    ],
)
def test_machine_facts(
    name: str, gpus: int, nics: int, numa: int, cores: int, pairs: int, switch: bool, gpudirect: str, group: list[int]
) -> None:
    machine = detect(FIXTURES / name)
    assert machine.cpu is not None
    found = (len(machine.gpus), len(machine.nics), len(machine.numa_nodes), machine.cpu.cores, machine.nvlink_pairs)
    assert found == (gpus, nics, numa, cores, pairs)
    assert (machine.nvswitch, machine.gpudirect) == (switch, gpudirect)
    assert advise(machine).best_group == group


def test_every_fixture_has_asserted_facts() -> None:
    marks = test_machine_facts.pytestmark  # type: ignore[attr-defined]
    assert sorted(case[0] for case in marks[0].args[1]) == MACHINES


@pytest.mark.parametrize("name", MACHINES)
def test_json_round_trip(name: str) -> None:
    machine = detect(FIXTURES / name)
    assert Machine.from_json(machine.to_json()) == machine


def test_hgx_h100_links_and_numa() -> None:
    machine = detect(FIXTURES / "hgx_h100")
    assert machine.link("GPU0", "GPU7") == machine.link("GPU7", "GPU0") == "NV18"
    assert machine.link("GPU0", "mlx5_0") == "PIX"
    assert machine.link("GPU4", "mlx5_6") == "PIX"  # NIC6 through the legend
    assert machine.link("GPU4", "mlx5_0") == "SYS"
    assert [gpu.numa_node for gpu in machine.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert format_cpu_list(machine.gpus[7].cpus) == "48-95,144-191"
    assert machine.gpus[0].pci == "0000:18:00.0"
    assert machine.gpus[0].memory_mib == 81559
    by_name = {nic.name: nic for nic in machine.nics}
    assert (by_name["mlx5_0"].kind, by_name["mlx5_0"].rate_gbps, by_name["mlx5_0"].numa_node) == ("infiniband", 400, 0)
    assert (by_name["mlx5_4"].kind, by_name["mlx5_4"].netdev, by_name["mlx5_4"].roce_v2_gid) == ("roce", "ens4np0", 1)
    assert by_name["eno1"].kind == "ethernet"
    assert machine.socket_interface == "eno1"
    assert machine.numa_of(0).distances == {0: 10, 1: 21}  # type: ignore[union-attr]


def test_hgx_h100_advice_gives_each_gpu_its_own_nic() -> None:
    advice = advise(detect(FIXTURES / "hgx_h100"))
    assert [rank.nic for rank in advice.ranks] == [f"mlx5_{n}" for n in (0, 1, 2, 3, 6, 7, 8, 9)]
    assert {rank.nic_link for rank in advice.ranks} == {"PIX"}
    assert advice.ranks[5].command == "numactl --physcpubind=60-71,156-167 --membind=1"
    hcas = ",".join(f"mlx5_{n}:1" for n in (0, 1, 2, 3, 6, 7, 8, 9))
    assert advice.env == {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "NCCL_IB_HCA": f"={hcas}",
        "NCCL_SOCKET_IFNAME": "=eno1",
    }
    assert advice.warnings == []
    cpus = [cpu for rank in advice.ranks for cpu in rank.cpus]
    assert sorted(cpus) == list(range(192))  # every CPU once


def test_dgx_a100_old_columns_numa_and_a_reduced_port() -> None:
    machine = detect(FIXTURES / "dgx_a100")
    advice = advise(machine)
    assert [gpu.numa_node for gpu in machine.gpus] == [3, 3, 1, 1, 7, 7, 5, 5]
    assert machine.link("GPU0", "mlx5_1") == "PXB"
    assert {rank.nic for rank in advice.ranks} == {f"mlx5_{n}" for n in (0, 1, 2, 3, 6, 7, 8, 9)}
    text = "\n".join(advice.warnings)
    assert "mlx5_8 runs at 100 Gb/sec (2X HDR), its peers at 200 Gb/s" in text
    assert "mlx5_5: the port is not ACTIVE" in text
    assert "GPUDirect RDMA is not available" in text
    assert len(advice.warnings) == 3


def test_pairs_follow_nvlink_bridges() -> None:
    machine = detect(FIXTURES / "nvlink_pairs")
    advice = advise(machine)
    assert [(group.gpus, group.worst) for group in advice.groups[2]] == [((0, 1), "NV4"), ((2, 3), "NV4")]
    assert advice.groups[4][0].worst == "SYS"
    assert advice.best_size == 2
    assert machine.gpus[0].nvlinks_active == 4
    assert [rank.nic for rank in advice.ranks] == ["mlx5_0", "mlx5_0", "mlx5_1", "mlx5_1"]
    assert any("4 GPU pairs cross NUMA nodes" in warning for warning in advice.warnings)
    assert any("GPU2 (NODE to mlx5_1), GPU3" in warning for warning in advice.warnings)


def test_pcie_only_and_cloud_advice() -> None:
    workstation = advise(detect(FIXTURES / "pcie_workstation"))
    assert any("no NVLink" in warning for warning in workstation.warnings)
    assert any("no RDMA device" in warning for warning in workstation.warnings)
    assert "NCCL_IB_HCA" not in workstation.env
    assert {rank.nic for rank in workstation.ranks} == {"enp66s0f0"}  # the other port is down
    cloud = advise(detect(FIXTURES / "cloud_vm_multi_nic"))
    assert cloud.env["FI_PROVIDER"] == "efa"
    assert "NCCL_IB_HCA" not in cloud.env
    assert [rank.nic for rank in cloud.ranks] == ["rdmap0s29", "rdmap0s30"] * 2  # two GPUs a NIC


def test_old_driver_words() -> None:
    machine = detect(FIXTURES / "old_driver")
    assert machine.link("GPU0", "GPU2") == "SYS"  # printed as SOC
    assert machine.link("GPU0", "mlx5_0") == "PHB"
    assert [gpu.numa_node for gpu in machine.gpus] == [0, 0, 1, 1]  # no column for it: from the CPU lists


def test_single_gpu_without_affinity() -> None:
    matrix = parse_topo(topo("single_gpu"))
    assert (matrix.cpus, matrix.numa) == ({}, {})
    assert detect(FIXTURES / "single_gpu").gpus[0].numa_node == 0  # the only node there is


def test_cpu_only_advice() -> None:
    advice = advise(detect(FIXTURES / "cpu_only"))
    assert [rank.command for rank in advice.ranks] == [
        "numactl --physcpubind=0-31,64-95 --membind=0",
        "numactl --physcpubind=32-63,96-127 --membind=1",
    ]
    assert advice.env == {"OMP_NUM_THREADS": "32", "GLOO_SOCKET_IFNAME": "eno1"}
    assert advice.warnings == ["mlx5_0 has 8 of 16 PCIe lanes: reseat it or try another slot"]


def test_live_machine_notes_what_is_missing() -> None:
    machine = detect()
    assert set(machine.sources) == {"nvidia-smi topo", "nvidia-smi query", "nvml", "lscpu", "sysfs"}
    assert all(state == "ok" or state.startswith("not available: ") for state in machine.sources.values())
    assert machine.cpu is None or machine.cpu.cpus >= 1


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("change", "cpus", "numa"),
    [
        (lambda text: text, "0-47,96-143", 0),
        (lambda text: text.expandtabs(8), "0-47,96-143", 0),
        (lambda text: text.replace("\x1b[4m", "").replace("\x1b[0m", ""), "0-47,96-143", 0),
        (lambda text: text.replace("\n", "\r\n"), "0-47,96-143", 0),
        (lambda text: "root@node:~# nvidia-smi topo -m\n" + text, "0-47,96-143", 0),
        (lambda text: text.replace("\t0\t\tN/A", "\tN/A\t\tN/A"), "0-47,96-143", None),
        (lambda text: text.replace("\t0-47,96-143\t0\t\tN/A", "\t\t0\t\tN/A"), None, 0),
        (lambda text: text.replace("\t0-47,96-143\t0\t\tN/A", "\t0-47,96-143\t\t\tN/A"), "0-47,96-143", None),
        (lambda text: text.replace("\t0\t\tN/A", "\t0-1\t\tN/A"), "0-47,96-143", None),
        (lambda text: text.replace("\t0-47,96-143\t0\t\tN/A", "\t0-7\t\tN/A\t\tN/A"), "0-7", None),
    ],
    ids=[
        "as is",
        "spaces",
        "no colours",
        "CRLF",
        "prompt",
        "NUMA N/A",
        "CPUs empty",
        "NUMA empty",
        "two nodes",
        "wide tabs",
    ],
)
def test_forms_of_the_matrix(change: Any, cpus: str | None, numa: int | None) -> None:
    matrix = parse_topo(change(topo()))
    assert matrix.gpus == list(range(8))
    assert matrix.nics == [f"mlx5_{n}" for n in range(10)]
    assert matrix.links["GPU3", "mlx5_3"] == "PIX"
    assert len(matrix.links) == 18 * 17 // 2
    assert (format_cpu_list(matrix.cpus[0]) if 0 in matrix.cpus else None, matrix.numa.get(0)) == (cpus, numa)


def test_matrix_without_legend_keeps_numbers(tmp_path: Path) -> None:
    folder = copy_of("hgx_h100", tmp_path)
    (folder / "topo.txt").write_text(topo().split("NIC Legend")[0])
    machine = detect(folder)
    assert machine.link("GPU0", "NIC0") == "PIX"
    assert any("no NIC legend" in note for note in machine.notes)
    assert machine.link("GPU0", "mlx5_0") is None  # not guessed


def test_lscpu_forms() -> None:
    nested, _ = parse_lscpu((FIXTURES / "hgx_h100/lscpu.json").read_text())
    assert (nested.cores, nested.cpus, nested.sockets, nested.model) == (96, 192, 2, "Intel(R) Xeon(R) Platinum 8468")
    plain, nodes = parse_lscpu((FIXTURES / "old_driver/lscpu.txt").read_text())
    assert (plain.cores, plain.threads_per_core, nodes[1]) == (20, 2, (*range(10, 20), *range(30, 40)))
    arm, _ = parse_lscpu("Architecture: aarch64\nCPU(s): 8\nThread(s) per core: 1\nSocket(s): -\n")
    assert arm.cores == 8


def test_gpu_query_and_pci() -> None:
    assert parse_gpu_query("0, NVIDIA GB10, [N/A], 0000000F:01:00.0") == {0: ("NVIDIA GB10", None, "000f:01:00.0")}
    assert pci_address("00000000:1B:00.0") == "0000:1b:00.0"


# ---------------------------------------------------------------- bad input


def cut(line: int, text: str) -> str:
    return "\n".join(text.splitlines()[:line])


BAD_TOPO: dict[str, tuple[Any, str]] = {
    "empty": (lambda text: "", "the file is empty"),
    "blank": (lambda text: " \n\t\n", "the file is empty"),
    "garbage": (lambda text: "lorem ipsum\n" * 5, "no header line"),
    "driver error": (lambda text: "NVIDIA-SMI has failed because it couldn't communicate", "no header line"),
    "header only": (lambda text: cut(1, text), "18 columns but 0 rows, GPU0 is the first one missing"),
    "rows missing": (lambda text: cut(6, text), "18 columns but 5 rows, GPU5 is the first one missing"),
    "cut in a row": (lambda text: text[: text.index("\nGPU3\t") + 40], "row GPU3 has"),
    "cell missing": (lambda text: text.replace("GPU1\tNV18\t", "GPU1\t", 1), "row GPU1 has "),
    "cell too many": (lambda text: text.replace("GPU1\tNV18", "GPU1\tNV18\tNV18", 1), "row GPU1 has "),
    "asymmetric": (lambda text: text.replace("GPU0\t X \tNV18", "GPU0\t X \tNV12", 1), "GPU0-GPU1 is NV12"),
    "unknown kind": (lambda text: text.replace("GPU0\t X \tNV18", "GPU0\t X \tFOO", 1), "'FOO' between GPU0 and GPU1"),
    "diagonal": (lambda text: text.replace("GPU0\t X \t", "GPU0\tPIX\t", 1), "row GPU0 has 'PIX' in its own column"),
    "column lost": (lambda text: text.replace("GPU7\tNIC0", "NIC0", 1), "a row for GPU7 but no such column"),
    "row twice": (lambda text: text.replace("\nGPU1\t", "\nGPU0\t", 1), "two rows are named GPU0"),
    "foreign row": (lambda text: text.replace("\nGPU1\t", "\nGPU9\t", 1), "a row for GPU9 but no such column"),
    "column twice": (lambda text: text.replace("GPU6\tGPU7", "GPU6\tGPU6", 1), "twice in the header"),
    "unknown column": (lambda text: text.replace("GPU NUMA ID", "GPU NUMA ID\tMood", 1), "unknown column"),
    "legend cut": (lambda text: text[: text.index("  NIC9: ")], "NIC9 is missing in the NIC legend"),
    "legend twice": (lambda text: text.replace("NIC9: mlx5_9", "NIC9: mlx5_8"), "names one device twice"),
    "affinity": (lambda text: text.replace("0-47,96-143", "0-47;96", 1), "CPU Affinity '0-47;96' is no list"),
    "backwards": (lambda text: text.replace("0-47,96-143", "47-0", 1), "CPU Affinity '47-0' is no list"),
    "NVLink to a NIC": (
        lambda text: text.replace("NV18\tPIX", "NV18\tNV2", 1).replace("NIC0\tPIX", "NIC0\tNV2", 1),
        "NVLink joins GPUs only",
    ),
}


@pytest.mark.parametrize("case", BAD_TOPO)
def test_bad_matrix(case: str) -> None:
    change, expected = BAD_TOPO[case]
    broken = change(topo())
    assert broken != topo(), "the case changes nothing"
    with pytest.raises(UserError) as error:
        parse_topo(broken)
    message = str(error.value)
    assert expected in message
    assert message.endswith("save it again with: nvidia-smi topo -m > topo.txt")
    assert "\n" not in message


def test_any_lost_row_or_cell_is_noticed() -> None:
    """Take each row, and each link cell, out of each matrix: never another graph, always an error."""
    for name in ("hgx_h100", "nvlink_pairs", "cloud_vm_multi_nic", "old_driver"):
        lines = topo(name).splitlines()
        devices = 1 + max(
            n for n, line in enumerate(lines) if line.startswith(("GPU", "NIC", "mlx5")) and " X " in line
        )
        for n in range(1, devices):
            for text in [lines[:n] + lines[n + 1 :]] + [
                [*lines[:n], "\t".join(cells[:c] + cells[c + 1 :]), *lines[n + 1 :]]
                for cells in [lines[n].split("\t")]
                for c in range(devices)
            ]:
                with pytest.raises(UserError):
                    parse_topo("\n".join(text))


def test_ambiguous_affinity_is_refused() -> None:
    text = topo().expandtabs(8).replace("0-47,96-143", " " * 11, 1)
    with pytest.raises(UserError, match=r"row GPU0: '0' could be any of CPU Affinity, NUMA Affinity"):
        parse_topo(text)


BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "topo not UTF-8": ("topo.txt", b"GPU0\xff\xfe", "is not text in UTF-8"),
    "topo huge": ("topo.txt", b"x" * (2 << 20), "larger than 1 MiB"),
    "topo of another machine": ("topo.txt", topo("nvlink_pairs"), "the sources see different GPUs"),
    "lscpu JSON cut": ("lscpu.json", '{"lscpu": [{"field"', "not the JSON of lscpu -J"),
    "lscpu empty": ("lscpu.json", "", "no line CPU(s)"),
    "lscpu nodes": (
        "lscpu.json",
        "CPU(s): 8\nNUMA node(s): 2\nNUMA node0 CPU(s): 0-7\n",
        "says 2 NUMA nodes but lists 1",
    ),
    "gpus.csv": ("gpus.csv", "index, name\n", "cannot read the line"),
    "gpus.csv empty": ("gpus.csv", "", "no GPU in it"),
    "gpus.csv address": ("gpus.csv", "0, H100, 81559, nowhere", "is no PCI address"),
    "nvml.json": ("nvml.json", '[{"index": 0}]', "not a recording of NVML"),
    "IB rate": ("sys/class/infiniband/mlx5_0/ports/1/rate", "fast", "not a rate such as"),
    "IB state": ("sys/class/infiniband/mlx5_0/ports/1/state", "fine", "not a state such as"),
    "link layer": ("sys/class/infiniband/mlx5_0/ports/1/link_layer", "Carrier pigeon", "not InfiniBand or Ethernet"),
    "NUMA of a NIC": ("sys/class/infiniband/mlx5_0/device/numa_node", "left", "not a number"),
    "node CPUs": ("sys/devices/system/node/node0/cpulist", "0-", "not a CPU list"),
    "distances": ("sys/devices/system/node/node0/distance", "10 21 21", "not 2 distances"),
    "speed": ("sys/class/net/eno1/speed", "1e9", "not a number"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_in_a_recording(case: str, tmp_path: Path) -> None:
    file, content, expected = BAD_FILES[case]
    folder = copy_of("hgx_h100", tmp_path)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        detect(folder)
    assert expected in str(error.value)
    assert "; " in str(error.value), "says what to do"


def test_missing_numa_node_is_refused(tmp_path: Path) -> None:
    folder = copy_of("nvlink_pairs", tmp_path)
    (folder / "lscpu.json").unlink()
    shutil.rmtree(folder / "sys/devices/system/node/node1")
    (folder / "sys/devices/system/node/node0/distance").write_text("10\n")
    with pytest.raises(UserError, match="GPU2 is near NUMA node 1, which the kernel does not list"):
        detect(folder)


def test_folder_where_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "topo.txt").mkdir()
    with pytest.raises(UserError, match=r"nothing in .* can be read; write it again with --record"):
        detect(tmp_path)


def test_cpus_from_sysfs_when_lscpu_is_missing(tmp_path: Path) -> None:
    folder = copy_of("cpu_only", tmp_path)
    (folder / "lscpu.json").unlink()
    machine = detect(folder)
    assert machine.sources["lscpu"] == "not available: no lscpu.json or lscpu.txt in the folder"
    assert advise(machine).env["OMP_NUM_THREADS"] == "64"  # logical ones: what a core is, only lscpu tells


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"name": 1}', '{"name": "x", "unknown": 1, "cpu": null}'])
def test_bad_topology_json(text: str) -> None:
    with pytest.raises(UserError, match=r"not a topology\.json"):
        Machine.from_json(text)


# ---------------------------------------------------------------- any machine


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    """A random machine: up to 9 GPUs and 6 NICs with any symmetric links."""
    nodes = draw(st.integers(1, 4))
    cpus = [tuple(range(8 * n, 8 * n + 8)) for n in range(nodes)]
    count, nic_count = draw(st.integers(1, 9)), draw(st.integers(0, 6))
    homes = draw(st.lists(st.integers(0, nodes - 1), min_size=count, max_size=count))
    pcie = st.sampled_from(["PIX", "PXB", "PHB", "NODE", "SYS"])
    gpus = [Gpu(n, numa_node=home, cpus=cpus[home]) for n, home in enumerate(homes)]
    nics = [Nic(f"mlx5_{n}", "infiniband", 400.0, "active") for n in range(nic_count)]
    machine = Machine("random", gpus=gpus, nics=nics, numa_nodes=[NumaNode(n, c) for n, c in enumerate(cpus)])
    labels = [device.label for device in [*gpus, *nics]]
    for n, a in enumerate(labels):
        for b in labels[n + 1 :]:
            nvlink = st.integers(1, 18).map(lambda links: f"NV{links}")
            machine.links[a, b] = draw(nvlink | pcie if b.startswith("GPU") else pcie)
    return machine


def render(machine: Machine, tabs: bool, legend: bool) -> str:
    """The machine as nvidia-smi prints it, with NIC numbers and legend or (older) with names."""
    nics = [nic.name for nic in machine.nics]
    names = [gpu.label for gpu in machine.gpus] + nics
    shown = [gpu.label for gpu in machine.gpus] + ([f"NIC{n}" for n in range(len(nics))] if legend else nics)
    lines = ["\x1b[4m\t" + "\t".join([*shown, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"]) + "\x1b[0m"]
    for y, label in enumerate(shown):
        cells = [
            f" {machine.link(names[y], name)} " if name == names[y] else machine.link(names[y], name) for name in names
        ]
        tail = ["", "", "", ""]
        if y < len(machine.gpus):
            tail = [format_cpu_list(machine.gpus[y].cpus), str(machine.gpus[y].numa_node), "", "N/A"]
        lines.append("\t".join([label, *(str(cell) for cell in cells), *tail]))
    lines += ["", "Legend:", "", "  X    = Self", ""]
    lines += ["NIC Legend:", "", *(f"  NIC{n}: {nic}" for n, nic in enumerate(nics))] if legend and nics else []
    text = "\n".join(lines) + "\n"
    return text if tabs else text.expandtabs(8)


@settings(max_examples=60, deadline=None)
@given(machines(), st.booleans(), st.booleans())
def test_any_matrix_survives_the_round_trip(machine: Machine, tabs: bool, legend: bool) -> None:
    matrix = parse_topo(render(machine, tabs, legend))
    assert matrix.links == machine.links
    assert matrix.nics == [nic.name for nic in machine.nics]
    assert matrix.cpus == {gpu.index: gpu.cpus for gpu in machine.gpus}
    assert matrix.numa == {gpu.index: gpu.numa_node for gpu in machine.gpus}
    assert Machine.from_json(machine.to_json()) == machine


@settings(max_examples=40, deadline=None)
@given(machines())
def test_advice_holds_for_any_machine(machine: Machine) -> None:
    advice = advise(machine)
    for size, groups in advice.groups.items():
        members = [gpu for group in groups for gpu in group.gpus]
        assert len(members) == len(set(members)) == size * (len(machine.gpus) // size)
        for group in groups:
            kinds = [machine.link(f"GPU{a}", f"GPU{b}") for a in group.gpus for b in group.gpus if a != b]
            assert link_rank(group.worst) == min(map(link_rank, kinds))
    if machine.nics:
        for rank in advice.ranks:  # nobody is sent to a NIC that is farther than another one
            best = max(link_rank(machine.link(f"GPU{rank.gpu}", nic.name)) for nic in machine.nics)
            assert link_rank(rank.nic_link) == best
    assert all(rank.cpus for rank in advice.ranks)
    assert text_tree(machine, advice)


@settings(max_examples=80, deadline=None)
@given(st.text(alphabet=st.sampled_from("GPUNICX0123V\t\n -,"), max_size=200) | st.text(max_size=200))
def test_garbage_never_gives_a_traceback(text: str) -> None:
    for parser in (parse_topo, parse_lscpu, parse_gpu_query, Machine.from_json, nvml_source.from_json):
        with contextlib.suppress(UserError):
            parser(text)  # type: ignore[operator]


@given(st.sets(st.integers(0, 300)))
def test_cpu_lists_round_trip(cpus: set[int]) -> None:
    assert parse_cpu_list(format_cpu_list(tuple(sorted(cpus)))) == tuple(sorted(cpus))


# ---------------------------------------------------------------- the rules of the advice


def test_best_split_is_not_the_greedy_one() -> None:
    """0-1 is the best single pair, but taking it leaves 2-3 on SYS; 0-2 with 1-3 has no SYS."""
    machine = Machine("four", gpus=[Gpu(n) for n in range(4)])
    machine.links = {(f"GPU{a}", f"GPU{b}"): "SYS" for a in range(4) for b in range(a + 1, 4)}
    machine.links |= {("GPU0", "GPU1"): "NV4", ("GPU0", "GPU2"): "PIX", ("GPU1", "GPU3"): "PIX"}
    assert [group.gpus for group in split_into_groups(machine, 2)] == [(0, 2), (1, 3)]


def test_a_group_is_as_good_as_its_worst_link() -> None:
    """One NVLink does not make up for SYS to the other two: four GPUs on one host bridge are the better group."""
    machine = Machine("five", gpus=[Gpu(n) for n in range(5)])
    machine.links = {(f"GPU{a}", f"GPU{b}"): "PHB" for a in range(4) for b in range(a + 1, 4)}
    machine.links |= {("GPU0", "GPU4"): "NV4", **{(f"GPU{n}", "GPU4"): "SYS" for n in (1, 2, 3)}}
    assert [(group.gpus, group.worst) for group in split_into_groups(machine, 4)] == [((0, 1, 2, 3), "PHB")]


@pytest.mark.parametrize(
    ("count", "kinds", "expected"),
    [
        (8, ["NV8"], True),  # 56 plugs a GPU
        (4, ["NV18"], True),  # 54
        (4, ["NV4"], None),  # 12: joined directly, or two of many behind a switch
        (2, ["NV18"], None),
        (4, ["NV4", "SYS"], False),  # a switch would join every pair alike
        (4, ["PHB"], False),
    ],
)
def test_nvswitch_from_the_matrix_alone(count: int, kinds: list[str], expected: bool | None, tmp_path: Path) -> None:
    machine = Machine("n", gpus=[Gpu(n, numa_node=0, cpus=(0,)) for n in range(count)])
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    machine.links = {(f"GPU{a}", f"GPU{b}"): kinds[(a + b) % len(kinds)] for a, b in pairs}
    (tmp_path / "topo.txt").write_text(render(machine, tabs=True, legend=False))
    assert detect(tmp_path).nvswitch is expected


def test_nics_are_matched_not_grabbed() -> None:
    """GPU0 could use either NIC, GPU1 only mlx5_0: GPU0 has to make room."""
    machine = Machine("two", gpus=[Gpu(0), Gpu(1)])
    machine.nics = [Nic(f"mlx5_{n}", "infiniband", 400.0, "active") for n in range(2)]
    machine.links = {("GPU0", "mlx5_0"): "PIX", ("GPU0", "mlx5_1"): "PIX"}
    machine.links |= {("GPU1", "mlx5_0"): "PIX", ("GPU1", "mlx5_1"): "SYS", ("GPU0", "GPU1"): "NV18"}
    assert {gpu: nic.name for gpu, nic in assign_nics(machine).items()} == {0: "mlx5_1", 1: "mlx5_0"}


def test_sixteen_gpus_with_two_islands() -> None:
    """More than eight GPUs: not every split is tried, but two NVLink islands of eight are found."""
    machine = Machine("sixteen", gpus=[Gpu(n) for n in range(16)])
    pairs = [(a, b) for a in range(16) for b in range(a + 1, 16)]
    machine.links = {(f"GPU{a}", f"GPU{b}"): "NV6" if a % 2 == b % 2 else "SYS" for a, b in pairs}
    islands = [tuple(range(0, 16, 2)), tuple(range(1, 16, 2))]
    assert [(group.gpus, group.worst) for group in split_into_groups(machine, 8)] == [(i, "NV6") for i in islands]


def test_unknown_numa_node_means_no_binding(tmp_path: Path) -> None:
    """A virtual machine with two NUMA nodes whose driver says nothing about affinity."""
    folder = copy_of("single_gpu", tmp_path)
    (folder / "lscpu.txt").write_text("CPU(s): 8\nNUMA node(s): 2\nNUMA node0 CPU(s): 0-3\nNUMA node1 CPU(s): 4-7\n")
    shutil.rmtree(folder / "sys/devices")
    advice = advise(detect(folder))
    assert advice.ranks[0].command == ""
    assert any("the NUMA node of GPU0 is unknown" in warning for warning in advice.warnings)


def test_a_much_slower_nic_is_no_equal() -> None:
    machine = Machine("two", gpus=[Gpu(0), Gpu(1)])
    machine.nics = [Nic("eth0", rate_gbps=1.0, state="active"), Nic("eth1", rate_gbps=25.0, state="active")]
    assert {nic.name for nic in assign_nics(machine).values()} == {"eth1"}


# ---------------------------------------------------------------- NVML


class FakeNvml:
    """nvidia-ml-py as far as it is used: GPUs on a switch or joined in pairs, one NVLink of GPU0 down."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus: int, links: int, switch: bool) -> None:
        self.gpus, self.links, self.switch, self.opened = gpus, links, switch, 0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H100"  # bytes in older bindings

    def nvmlDeviceGetPciInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{16 + handle:02X}:00.0")

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCpuAffinity(self, handle: int, words: int) -> list[int]:
        return [0b1111] + [0] * (words - 2) + [1 << 63]

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= self.links:
            raise self.NVMLError("no such link")
        return int(not (handle == 0 and link == 0))

    def nvmlDeviceGetNvLinkRemoteDeviceType(self, handle: int, link: int) -> int:
        return 2 if self.switch else 0

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> SimpleNamespace:
        return SimpleNamespace(busId="00000000:05:00.0" if self.switch else f"00000000:{16 + (handle ^ 1):02X}:00.0")

    def nvmlDeviceGetTopologyCommonAncestor(self, handle: int, other: int) -> int:
        return 40 if handle // 2 == other // 2 else 50


def test_nvml_on_a_switch() -> None:
    fake = FakeNvml(gpus=4, links=18, switch=True)
    gpus = nvml_source.query(fake, cpu_count=128)
    assert fake.opened == 0
    assert gpus[1].cpus == (0, 1, 2, 3, 127)
    assert gpus[0].name == "NVIDIA H100"
    assert nvml_source.uses_switch(gpus) is True
    links = nvml_source.gpu_links(gpus)
    assert links["GPU1", "GPU2"] == "NV18"
    assert links["GPU0", "GPU1"] == "NV17"  # one of GPU0's is down
    assert nvml_source.from_json(nvml_source.to_json(gpus)) == gpus


def test_nvml_pairs_alone_give_a_graph(tmp_path: Path) -> None:
    gpus = nvml_source.query(FakeNvml(gpus=4, links=4, switch=False), cpu_count=8)
    (tmp_path / "nvml.json").write_text(nvml_source.to_json(gpus))
    machine = detect(tmp_path)
    assert machine.gpu_links() == {
        (0, 1): "NV3", (0, 2): "SYS", (0, 3): "SYS", (1, 2): "SYS", (1, 3): "SYS", (2, 3): "NV4",
    }  # fmt: skip
    assert machine.nvswitch is False
    assert any(warning.startswith("GPU0: 1 of 4 NVLinks are inactive") for warning in advise(machine).warnings)


# ---------------------------------------------------------------- network findings


def verdicts(name: str) -> dict[str, str]:
    folder = FIXTURES / name
    return {finding.topic: finding.verdict for finding in findings(detect(folder), folder)}


def test_network_findings() -> None:
    hgx, cpu, cloud = verdicts("hgx_h100"), verdicts("cpu_only"), verdicts("cloud_vm_multi_nic")
    assert hgx["mlx5_0"] == hgx["mlx5_4 GID"] == hgx["GPUDirect RDMA"] == hgx["memlock"] == OK
    assert cpu["mlx5_0 MTU"] == cpu["mlx5_0 PFC/ECN"] == cpu["memlock"] == ATTENTION
    assert cpu["mlx5_1 MTU"] == cpu["mlx5_1 PFC/ECN"] == OK
    assert cloud["rdmap0s29"] == cloud["huge pages"] == OK
    assert verdicts("pcie_workstation")["RDMA"] == "absent"
    dgx = verdicts("dgx_a100")
    assert dgx["mlx5_5"] == dgx["mlx5_8"] == ATTENTION  # down; went down three times
    assert dgx["mlx5_9"] == OK


def test_gid_with_an_ipv4_address_is_preferred(tmp_path: Path) -> None:
    port = copy_of("cpu_only", tmp_path) / "sys/class/infiniband/mlx5_0/ports/1"
    (port / "gids/1").write_text("fe80:0000:0000:0000:0000:0000:0000:0001\n")
    for index, kind in ((2, "IB/RoCE v1"), (3, "RoCE v2")):
        (port / f"gids/{index}").write_text("0000:0000:0000:0000:0000:ffff:0a00:0001\n")
        (port / f"gid_attrs/types/{index}").write_text(kind + "\n")
    assert sysfs.nics(tmp_path / "cpu_only")[0].roce_v2_gid == 3


def test_ring_formula() -> None:
    assert ring_allreduce_seconds(2 * 8.03e9, 2, 400) == pytest.approx(2 * 8.03e9 * 8 / 400e9)  # factor 2 (2-1)/2 = 1
    assert ring_allreduce_seconds(1e9, 8, 100) == pytest.approx(1.75 * 0.08)
    assert node_gbps(detect(FIXTURES / "hgx_h100")) == 3200
    assert node_gbps(detect(FIXTURES / "dgx_a100")) == 7 * 200 + 100
    assert node_gbps(detect(FIXTURES / "cloud_vm_multi_nic")) == 200
    assert [rdma_mtu(mtu) for mtu in (1500, 4191, 4192, 9000, 100)] == [1024, 2048, 4096, 4096, 0]


# ---------------------------------------------------------------- the scripts, as a reader starts them


def start(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "ch01_intro" / script), *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID", "WORLD_SIZE")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=cwd)


def result_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("RESULT ")
    return json.loads(last.removeprefix("RESULT "))  # type: ignore[no-any-return]


def test_detect_script_on_a_recorded_machine(tmp_path: Path) -> None:
    done = start("detect_topology.py", "--from", FIXTURES / "hgx_h100", "--run-dir", tmp_path / "run")
    result = result_of(done)
    assert (result["gpus"], result["best_tp_size"], result["nic_gbps_max"], result["warnings"]) == (8, 8, 400, 0)
    assert "rank 7: GPU7 mlx5_9 (PIX) numactl --physcpubind=84-95,180-191 --membind=1" in done.stdout
    assert 'export NCCL_SOCKET_IFNAME="=eno1"' in done.stdout
    assert Machine.from_json((tmp_path / "run/topology.json").read_text()) == detect(FIXTURES / "hgx_h100")
    assert (tmp_path / "run/topology.txt").read_text() in done.stdout
    assert (tmp_path / "run/topology.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((tmp_path / "run/result.json").read_text()) == result


def test_a_recording_of_this_machine_reads_back_the_same(tmp_path: Path) -> None:
    live = result_of(start("detect_topology.py", "--record", tmp_path / "mine", "--run-dir", tmp_path / "a"))
    again = result_of(start("detect_topology.py", "--from", tmp_path / "mine", "--run-dir", tmp_path / "b"))
    assert (live.pop("machine"), again.pop("machine")) == ("this machine", "mine")
    assert again.pop("warnings") <= live.pop("warnings")  # what this process may use is not recorded
    assert again == live
    done = start("detect_topology.py", "--record", tmp_path / "mine", "--run-dir", tmp_path / "c")
    assert done.returncode == 2
    assert "exists already and is not empty" in done.stderr


def test_a_recording_holds_no_addresses(tmp_path: Path) -> None:
    root = copy_of("cpu_only", tmp_path)
    (root / "proc/net/route").write_text("Iface\tDestination\tGateway\neno1\t00000000\t0102A8C0\n")
    gids = "sys/class/infiniband/mlx5_0/ports/1/gids"
    (root / gids / "1").write_text("0000:0000:0000:0000:0000:ffff:c0a8:0207\n")
    (root / "sys/class/net/veth1").mkdir()
    (root / "sys/class/net/veth1/mtu").write_text("1500\n")
    sysfs.record(tmp_path / "copy", root)
    assert (tmp_path / "copy" / gids / "1").read_text() == "0000:0000:0000:0000:0000:ffff:0000:0001\n"
    assert (tmp_path / "copy/proc/net/route").read_text() == "Iface\tDestination\neno1\t00000000\n"
    assert not (tmp_path / "copy/sys/class/net/veth1").exists()
    assert sysfs.nics(tmp_path / "copy") == sysfs.nics(root)


def test_network_script_live_and_recorded(tmp_path: Path) -> None:
    live = result_of(start("network_check.py", "--run-dir", tmp_path / "a"))
    assert 0 < live["loopback_rtt_us_p50"] < 1e5
    assert live["loopback_gib_per_s"] > 0.01
    done = start("network_check.py", "--from", FIXTURES / "hgx_h100", "--run-dir", tmp_path / "b")
    recorded = result_of(done)
    assert (recorded["fabric"], recorded["rdma_active"], recorded["node_gbps"]) == ("infiniband", 10, 3200)
    assert recorded["allreduce_8b_8_nodes_s_derived"] == pytest.approx(1.75 * 2 * 8.03e9 * 8 / 3.2e12)
    assert recorded["loopback_rtt_us_p50"] is None
    assert "Loopback TCP: skipped" in done.stdout


@pytest.mark.parametrize("script", ["detect_topology.py", "network_check.py"])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path / "missing", "no folder"),
        (lambda path: path, "holds none of topo.txt"),
        (lambda path: (path / "topo.txt").write_text("GPU0\tGPU1\n") and path, "2 columns but 0 rows"),
        (lambda path: (path / "topo.txt").write_bytes(b"\xff\xfe\x00") and path, "is not text in UTF-8"),
    ],
    ids=["missing", "empty", "truncated", "binary"],
)
def test_scripts_refuse_bad_input_in_one_line(script: str, make: Any, expected: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = start(script, "--from", make(tmp_path / "in"), "--run-dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert "; " in lines[0]
    assert not (tmp_path / "run").exists(), "bad input leaves nothing behind"


def test_scripts_need_neither_torch_nor_matplotlib_to_start() -> None:
    modules = "import sys, ch01_intro.detect_topology, ch01_intro.network_check"
    code = f"{modules}; print({{'torch', 'matplotlib', 'pynvml'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", MACHINES)
def test_texts_do_not_overlap_in_the_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw each machine and compare the boxes of all texts, in pixels."""
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k))[1])
    machine = detect(FIXTURES / name)
    draw_png(machine, advise(machine), tmp_path / "topology.png")
    figure = kept[0]
    texts = [text for axes in figure.axes for text in axes.texts if text.get_text()] + list(figure.texts)
    texts += [
        text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels()) if axes.axison
    ]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for n, (first, a) in enumerate(boxes):
        assert a.x0 >= 0, first
        assert a.x1 <= figure.bbox.width, first
        for second, b in boxes[n + 1 :]:
            wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert not (wide > 1 and high > 1), f"{first!r} overlaps {second!r}"
