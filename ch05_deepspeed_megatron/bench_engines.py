"""DeepSpeed, FSDP and Megatron-Core on one model in one run: the same step, then memory, speed, bytes, saving.

You learn   how to compare engines that have their own optimizers, schedules and process groups: prove that they compute
            the same, weigh each alone, let them take turns; what tensor parallelism sends that sharding does not
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/bench_engines.py --width 384 --layers 6
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/bench_engines.py --preset small \
                --batch-size 16 --seq-len 1024 --dtype bf16
Cluster     srun python ch05_deepspeed_megatron/bench_engines.py --preset 1b --layers 4 --seq-len 1024 --dtype bf16
You see     chapter 4's table with two rows more. On a CPU the ratios are about gloo and torch's kernels: Megatron-Core
            runs without its fused kernels, DeepSpeed without its streams. Figures about engines are a GPU's

It is chapter 4's compare_zero.py, which says how it measures, with Megatron-Core among the contestants (engines.py).
"""

from __future__ import annotations

from ch04_fsdp import compare_zero, contestants
from ch05_deepspeed_megatron.engines import ENGINES
from common import script

contestants.MORE |= ENGINES
COMPARED = ("ddp", "fsdp-grad", "fsdp-full", "zero-1", "zero-2", "zero-3", *ENGINES)


def main(argv: list[str] | None = None) -> dict:
    return compare_zero.compare_all(__doc__, __file__, argv, COMPARED)


if __name__ == "__main__":
    script.run(main)
