"""Is it the same computation? Megatron-Core's layouts against one process of transformers, gradient by gradient.

You learn   that tensor, sequence and pipeline parallelism change where a gradient comes about and not what it is; which
            sums Megatron leaves to one function, finalize_model_grads, and what a training looks like without them
Laptop      python ch05_deepspeed_megatron/megatron_parity.py
A fault     python ch05_deepspeed_megatron/megatron_parity.py --option norms-not-summed --ranks 2
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/megatron_parity.py --option tp2+sp+zero1
Cluster     srun python ch05_deepspeed_megatron/megatron_parity.py --option tp2+pp2+sp+zero1
You see     chapter 2's table, a row a layout: the largest relative error of a gradient, of the norm and of the weights
            after two steps, about 1e-6; for a fault the parameters that it spoils

Megatron's merged matrices are split, and the shards put together, into the names that transformers has. The norm is the
one that Megatron's optimizer clips by. In each cell the worst of accumulation 1 and 4, tied and untied embeddings, some
parameters frozen or none, a whole last micro-batch and one that does not divide by the ranks; rows are ragged.
"""

from __future__ import annotations

import argparse

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.harness import Outcome
from ch02_hardware_parallelism.parity import whole_numbers
from ch04_fsdp.parity import verdict
from ch05_deepspeed_megatron.megatron_strategies import OPTIONS, PLANTED, RaggedLlama, option
from ch05_deepspeed_megatron.parity import cases
from common import dist, script


def compare(args: argparse.Namespace, names: list[str]) -> list[Outcome]:
    """On the ranks that torchrun or srun started, else on CPU ranks started here."""
    launch = dist.read_launch()
    classes = [option(name) for name in names]
    if launch.launcher == "python":
        wanted = [case for n in args.ranks for case in cases([n], args.accumulation)]
        return harness.check(classes, wanted, RaggedLlama(), timeout_s=1800, in_turn=args.quick)
    with dist.session(args.device) as ctx:
        return harness.check_here(
            classes, cases([launch.world_size], args.accumulation), RaggedLlama(), ctx, in_turn=args.quick
        )


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--option", default="all", help=f"all, or comma separated, as {', '.join(OPTIONS[-3:])}; or a "
                        f"planted fault: {', '.join(PLANTED)}")  # fmt: skip
    parser.add_argument("--ranks", type=whole_numbers, default=[2, 4], help="how many, comma separated")
    parser.add_argument("--accumulation", type=whole_numbers, default=[1, 4], help="micro-batches a step")
    parser.add_argument("--quick", action="store_true", help="each option in one of the cases, in turn")
    args = parser.parse_args(argv)
    names = OPTIONS if args.option == "all" else args.option.split(",")
    for name in names:
        option(name)
    if max(args.ranks) > 8:
        raise script.UserError(f"--ranks {max(args.ranks)} is more than this is made for; take 1 to 8")
    script.start(__file__, args)
    return verdict(compare(args, names))


if __name__ == "__main__":
    script.run(main)
