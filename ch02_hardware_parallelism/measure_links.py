"""How fast every link of this machine is: to the GPUs, between them, their memory, the host's, and its processes.

You learn   what NVLink, PCIe and memory really carry, and which share of the theoretical rate that is
Laptop      python ch02_hardware_parallelism/measure_links.py
GPU node    python ch02_hardware_parallelism/measure_links.py          (one process; it measures all visible GPUs)
Cluster     srun --nodes=1 --ntasks=1 --gpus-per-node=8 python ch02_hardware_parallelism/measure_links.py
            (inside a node; between nodes: bench_collectives.py)
You see     a row a link: GB/s of 10^9 bytes, the median of the repeats with its quartiles, the theoretical rate of
            what the topology shows there, and the percentage. What cannot be measured here is listed with the reason.

No link gives programs its whole theoretical rate: packets have headers, memory is refreshed. Copies from pageable host
memory are slower than from pinned memory, since the driver copies them to a pinned buffer of its own first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from ch01_intro.topology import Machine, detect
from ch02_hardware_parallelism import cuda_links, host_links
from ch02_hardware_parallelism.links import Port, Row, plot, query_ports, text_table
from common import dist, script
from common.logs import get_logger

log = get_logger()


def find_ports() -> list[Port]:
    """What NVML says of the GPUs, nothing where it cannot be asked: then theoretical rates are unknown."""
    try:
        import pynvml
    except ImportError:
        log.warning("nvidia-ml-py is not installed: theoretical rates of PCIe and device memory stay unknown")
        return []
    try:
        return query_ports(pynvml)
    except pynvml.NVMLError as error:
        log.warning("NVML does not answer: theoretical rates of PCIe and device memory stay unknown", error=error)
        return []


def without_gpus(reason: str) -> list[Row]:
    """The rows of a machine with GPUs, each with why it is missing here."""
    rows = {"host <-> GPU": "PCIe", "GPU <-> GPU": "NVLink or PCIe", "GPU memory": "device"}
    return [Row(link, kind, skipped=reason) for link, kind in rows.items()]


def visible_gpus(choice: str) -> list[torch.device]:
    """Raises UserError if cuda was asked for and is not there."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise script.UserError("no CUDA device is visible; use --device cpu, or check nvidia-smi, CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count() if choice != "cpu" and torch.cuda.is_available() else 0
    return [torch.device("cuda", index) for index in range(count)]


def show_sweep(curve: Sequence[dict]) -> None:
    names = [name for name in curve[0] if name != "size_bytes"]
    print(f"\n{'bytes':>12}" + "".join(f"{name.removesuffix('_gb_per_s'):>10}" for name in names) + "   GB/s by size")
    for point in curve:
        print(f"{point['size_bytes']:12}" + "".join(f"{point[name]:10.2f}" for name in names))


def summary(rows: Sequence[Row]) -> dict:
    """The RESULT: the host's links by name, and of each kind of GPU link the slowest one."""
    picked = {
        "host_copy_gb_per_s": "host memory, copy", "host_triad_gb_per_s": "host memory, triad",
        "shared_memory_gb_per_s": "process -> process, shared memory",
        "tcp_loopback_gb_per_s": "process -> process, loopback TCP",
    }  # fmt: skip
    medians = {row.link: row.quartiles[1] for row in rows if row.rates}
    result = {name: medians[link] for name, link in picked.items()}
    for name, wanted in {
        "slowest_h2d_pinned": lambda link: link.startswith("host -> ") and link.endswith("pinned"),
        "slowest_d2h_pinned": lambda link: link.endswith("-> host, pinned"),
        "slowest_peer": lambda link: "GPU" in link.split(" -> ")[0] and "host" not in link and "->" in link,
        "slowest_gpu_copy": lambda link: link.endswith("memory, copy") and not link.startswith("host"),
    }.items():
        found = [rate for link, rate in medians.items() if wanted(link)]
        result[f"{name}_gb_per_s"] = min(found) if found else None
    return result


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--repeats", type=script.at_least(3), default=9)
    parser.add_argument("--gpu-mib", type=script.at_least(1), default=256, help="buffer of a copy to or from a GPU")
    parser.add_argument(
        "--host-mib", type=script.at_least(1), help="array in host memory (default: 256, or four times the caches)"
    )
    args = parser.parse_args(argv)
    launch = dist.read_launch()
    if launch.local_world_size > 1:
        raise script.UserError("several processes would measure at once; start one a node, with plain python")
    run = script.start(__file__, args)
    devices = visible_gpus(args.device)
    machine: Machine = detect()
    meter = cuda_links.Meter(args.repeats)
    rows = host_links.measure(machine, args.repeats, meter.wrong, args.host_mib and args.host_mib * 2**20)
    curve: list[dict] = []
    if devices:
        size = args.gpu_mib * 2**20
        rows = cuda_links.measure(machine, find_ports(), devices, size, meter) + rows
        curve = cuda_links.sweep(devices, meter, size)
    else:
        asked = "--device cpu was given" if args.device == "cpu" else "no CUDA device is visible"
        rows = without_gpus(asked) + rows
    print(text_table(rows))
    if curve:
        show_sweep(curve)
    if launch.rank == 0:
        with script.atomic_write(run.path("links.json")) as file:
            json.dump({"links": [row.as_json() for row in rows], "sweep": curve}, file, indent=1)
        plot(rows, run.path("links.png"))
    measured = sum(bool(row.rates) for row in rows)
    counts = {"gpus": len(devices), "numa_nodes": len(machine.numa_nodes)}
    result = {**counts, "measured": measured, "skipped": len(rows) - measured, "wrong": len(meter.wrong)}
    result |= summary(rows)
    if meter.wrong:
        message = f"{', '.join(meter.wrong)}: what arrived is not what was sent; between GPUs look at the IOMMU and ACS"
        raise script.CheckFailed(message, result)
    return result


if __name__ == "__main__":
    script.run(main)
