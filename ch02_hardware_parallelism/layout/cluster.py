"""What the layouts run on: GPUs with their peak, memory and links, and the time of a collective between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ch02_hardware_parallelism.alpha_beta import AlphaBeta

GIB = 2**30
# Of a data sheet's link rate, what a large collective reaches: ring all-reduce of 16 GiB on 8 H200 at 367.6 of 450 GB/s
# (stas00/ml-engineering, network benchmarks).
LINK_EFFICIENCY = 0.8
# Seconds a hop of a ring, protocol "simple": hwLat of NCCL's src/graph/tuning.cc, 3.4 us by NVLink, 14 us by network.
INTRA_LATENCY_S, INTER_LATENCY_S = 3.4e-6, 14e-6
# CUDA context, NCCL's buffers, cuBLAS workspaces, fragmentation: assumed, not measured.
RUNTIME_BYTES = 2 * GIB


@dataclass(frozen=True)
class Gpu:
    """peak in FLOP/s (bf16, dense), memory in bytes as torch.cuda reports it, rates in bytes/s; the links' are of one
    GPU and one direction."""

    peak: float
    memory: float
    memory_rate: float
    intra: float
    inter: float
    efficiency: float


def _gpu(tflops: float, gib: float, memory_tb_s: float, intra_gb_s: float, inter_gb_s: float, efficiency: float) -> Gpu:
    return Gpu(tflops * 1e12, gib * GIB, memory_tb_s * 1e12, intra_gb_s * 1e9, inter_gb_s * 1e9, efficiency)


# The share of the peak at which a GPU trains where no communication is in the way. One source, and nothing tuned to the
# runs of published.toml: MFU of fms-fsdp's Llama 2 7B on 128 GPUs, compiled, whose communication FSDP hides
# (foundation-model-stack/fms-fsdp; PyTorch blog "Maximizing Training Throughput Using PyTorch FSDP and Torch.compile").
# A large matrix product alone reaches more, 794.5 of 989 TFLOP/s on an H100 (stas00/ml-engineering): a ceiling, not
# what a training step sustains.
HOPPER, AMPERE = 0.46, 0.68
# NVIDIA's data sheets of each GPU: peak, memory bandwidth, NVLink (half of the "total bandwidth", which counts both
# directions). Network: 400 Gb/s a GPU beside Hopper (DGX H100), 200 Gb/s beside Ampere (DGX A100). h100-96g is the
# HBM2e part of Meta's Grand Teton nodes, as torchtitan's benchmarks describe it.
GPUS = {
    "h100-80g": _gpu(989.4, 79.1, 3.35, 450, 50, HOPPER),
    "h100-96g": _gpu(989.4, 95.0, 2.4, 450, 50, HOPPER),
    "h200": _gpu(989.4, 139.8, 4.8, 450, 50, HOPPER),
    "a100-80g": _gpu(312, 79.2, 2.04, 300, 25, AMPERE),
    "a100-40g": _gpu(312, 39.4, 1.56, 300, 25, AMPERE),
}


@dataclass(frozen=True)
class Cluster:
    gpus: int
    gpus_per_node: int
    gpu: Gpu
    runtime_bytes: float = RUNTIME_BYTES
    intra_latency_s: float = INTRA_LATENCY_S
    inter_latency_s: float = INTER_LATENCY_S

    @classmethod
    def of(cls, gpu: str, gpus: int, gpus_per_node: int = 8) -> Cluster:
        return cls(gpus, min(gpus, gpus_per_node), GPUS[gpu])

    @classmethod
    def measured(cls, found: dict) -> Cluster:
        """The ranks of one machine, all on one node, from check_adviser.py's RESULT.

        The all_reduce's alpha and bandwidth become those of a hop and of a link: a ring of n ranks makes 2 (n - 1) hops
        and sends 2 (n - 1) / n of the message. One rank has no link to be measured.
        """
        ranks = found["world_size"]
        rate, alpha = math.inf, 0.0
        if ranks > 1:
            rate = found["allreduce_bytes_per_s"] * 2 * (ranks - 1) / ranks / LINK_EFFICIENCY
            alpha = found["allreduce_alpha_us"] * 1e-6 / (2 * (ranks - 1))
        gpu = Gpu(
            peak=found["matmul_flops_per_s"], memory=found["rank_memory_bytes"], memory_rate=found["triad_bytes_per_s"],
            intra=rate, inter=rate, efficiency=found["efficiency"],
        )  # fmt: skip
        return cls(ranks, ranks, gpu, runtime_bytes=0, intra_latency_s=alpha, inter_latency_s=alpha)

    def per_node(self, ranks: int, stride: int) -> int:
        """How many of a group's ranks share a node, if its neighbours are `stride` ranks apart."""
        return math.gcd(ranks, self.gpus_per_node // stride) if stride < self.gpus_per_node else 1

    def gather(self, ranks: int, per_node: int) -> AlphaBeta:
        """Time of an all_gather or reduce_scatter by its largest buffer (an all_reduce takes two of them).

        A ring: each rank sends (ranks - 1) / ranks of the buffer. Where the group spans nodes, the `per_node` ranks on
        a node bring as many NICs, and the ring is as slow as its slowest link.
        """
        if ranks == 1:
            return AlphaBeta(0.0, 0.0)
        nodes = ranks // per_node
        rate = self.gpu.intra if nodes == 1 else min(self.gpu.intra, per_node * self.gpu.inter)
        between = nodes if nodes > 1 else 0  # hops of the ring that leave a node
        alpha = between * self.inter_latency_s + max(0, ranks - 1 - between) * self.intra_latency_s
        return AlphaBeta(alpha, (ranks - 1) / ranks / (rate * LINK_EFFICIENCY))

    def send(self, stride: int, ranks: int) -> AlphaBeta:
        """Time of a message to the next pipeline stage, `stride` ranks away."""
        inside = self.per_node(ranks, stride) == ranks
        alpha = self.intra_latency_s if inside else self.inter_latency_s
        return AlphaBeta(alpha, 1 / ((self.gpu.intra if inside else self.gpu.inter) * LINK_EFFICIENCY))
