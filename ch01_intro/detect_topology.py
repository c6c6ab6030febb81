"""The topology of one machine: which GPUs are joined by what, which NIC is near which GPU, where each rank should run.

You learn   to read the link matrix (NV#, PIX, PXB, PHB, NODE, SYS), why a tensor-parallel group is as good as its worst
            link, why the NIC and the CPU cores of a rank should be near its GPU, and how to ask NCCL for that
Laptop      python ch01_intro/detect_topology.py
            python ch01_intro/detect_topology.py --from tests/fixtures/topology/hgx_h100
GPU node    python ch01_intro/detect_topology.py
            python ch01_intro/detect_topology.py --record my_node      # a folder of text files: read it, then send it
Cluster     srun --ntasks-per-node=1 --nodes=1 python ch01_intro/detect_topology.py
You see     the machine as a tree, its link matrix, the advised groups, NIC and numactl command of each rank, the NCCL
            variables, warnings (links down, no NIC nearby, GPUDirect missing); topology.json, .txt and .png in the run
            folder. Without nvidia-smi, lscpu or sysfs it says what is not available and goes on.

Sources: nvidia-smi topo -m, NVML, lscpu, /sys and /proc. Nothing is changed and nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ch01_intro.topology import Advice, Machine, advise, detect, record
from ch01_intro.topology.draw import draw_png, text_tree
from common import logs, script
from common.script import UserError, atomic_write

log = logs.get_logger()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument(
        "--from", dest="recorded", type=Path, metavar="DIR", help="analyse a machine that --record wrote into DIR"
    )
    parser.add_argument("--record", type=Path, metavar="DIR", help="also write this machine's sources into a new DIR")
    args = parser.parse_args(argv)
    if args.recorded and args.record:
        raise UserError("--record records this machine, --from reads another one; pass one of them")
    return args


def main(argv: list[str] | None = None) -> dict[str, object]:
    args = parse_args(argv)
    # Detect before the run folder exists: bad input leaves nothing behind.
    machine = detect(args.recorded)
    advice = advise(machine)
    recorded = record(args.record) if args.record and logs.env_rank() == 0 else {}
    run = script.start(__file__, args)
    for name, state in recorded.items():
        log.info("recorded", source=name, state=state)
    if logs.env_rank() == 0:
        text = text_tree(machine, advice)
        print(text)
        with atomic_write(run.path("topology.txt")) as file:
            file.write(text)
        with atomic_write(run.path("topology.json")) as file:
            file.write(machine.to_json())
        draw_png(machine, advice, run.path("topology.png"))
    return figures(machine, advice)


def figures(machine: Machine, advice: Advice) -> dict[str, object]:
    """The RESULT of this script."""
    up = [nic for nic in machine.nics if nic.state != "down"]
    return {
        "machine": machine.name,
        "gpus": len(machine.gpus),
        "nics": len(machine.nics),
        "rdma_nics": sum(nic.rdma for nic in machine.nics),
        "numa_nodes": len(machine.numa_nodes),
        "cores": machine.cpu.cores if machine.cpu else None,
        "nvlink_pairs": machine.nvlink_pairs,
        "sys_pairs": sum(kind == "SYS" for kind in machine.gpu_links().values()),
        "nvswitch": machine.nvswitch,
        "best_tp_size": advice.best_size,
        "best_tp_group": advice.best_group,
        "gpudirect_rdma": machine.gpudirect,
        "nic_gbps_max": max((nic.rate_gbps for nic in up if nic.rate_gbps), default=None),
        "ranks_bound": sum(bool(rank.command) for rank in advice.ranks),
        "warnings": len(advice.warnings),
        "sources": [name for name, state in machine.sources.items() if state == "ok"],
    }


if __name__ == "__main__":
    script.run(main)
