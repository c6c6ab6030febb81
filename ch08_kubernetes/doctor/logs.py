"""What the last lines of a failed container tell: known signatures of distributed training and serving."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ch08_kubernetes.doctor.facts import Facts, ref, text
from ch08_kubernetes.doctor.findings import Finding

NCCL = "check NCCL_SOCKET_IFNAME (ip addr in the pod) and the network policy; run again with NCCL_DEBUG=INFO"
SIGNATURES = [  # cause, signature, what it means, fix; the first that matches decides
    (
        "cuda-out-of-memory",
        (
            r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED|No available "
            r"memory for the cache blocks"
        ),
        "the GPU's memory is full",
        "a smaller batch or --seq-len, more sharding or recompute; vLLM: --gpu-memory-utilization, --max-model-len",
    ),
    (
        "cuda-driver",
        (
            r"CUDA driver version is insufficient|no CUDA-capable device|Found no NVIDIA "
            r"driver|libcuda\.so\.1: cannot open"
        ),
        "CUDA finds no driver or no GPU in the container",
        (
            "request nvidia.com/gpu in limits; see the runtime class nvidia, and the driver's version "
            "against the image's CUDA"
        ),
    ),
    (
        "address-in-use",
        r"[Aa]ddress already in use|EADDRINUSE",
        "a port that it listens on is taken",
        "hostNetwork: false, or another port (--rdzv-endpoint, --port)",
    ),
    (
        "name-not-resolved",
        r"Temporary failure in name resolution|Name or service not known|gaierror|getaddrinfo failed",
        "the rendezvous host's name does not resolve",
        "a headless service of the pods' subdomain, with publishNotReadyAddresses: true and their labels",
    ),
    (
        "nccl-error",
        (
            r"NCCL error|ncclUnhandledCudaError|ncclSystemError|ncclRemoteError|unhandled system "
            r"error|ProcessGroupNCCL.*(timeout|Timeout)|Watchdog caught collective operation timeout"
        ),
        "NCCL cannot talk to another rank",
        NCCL,
    ),
    (
        "rendezvous-timeout",
        (
            r"RendezvousTimeoutError|RendezvousConnectionError|Timed out after \d+ seconds waiting for "
            r"clients|DistStoreError|The client socket has timed out"
        ),
        "the ranks did not meet in time",
        "see which rank is not there; the same --rdzv-id and --nnodes in all pods; RDZV_ENDPOINT reachable",
    ),
]


def signatures(facts: Facts) -> Iterator[Finding]:
    """The first known signature in a container's last lines."""
    for about, printed in sorted(facts.logs.items()):
        pod = facts.get(about)
        for cause, words, what, fix in SIGNATURES:
            line = next((one for one in printed.splitlines() if re.search(words, one)), None)
            if pod and line:
                yield Finding(
                    cause,
                    (ref(pod),),
                    what,
                    (f'log of {about}: "{line.strip()[:200]}"',),
                    fix,
                    (f"Lost/{text(pod, 'spec', 'nodeName')}",),
                )
                break


RULES = [signatures]
