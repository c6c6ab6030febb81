"""Train a transformer with Megatron-Core: tensor, sequence, pipeline and data parallelism behind four flags.

You learn   what Megatron-Core is asked for and what it does: a model cut by layout, its 1F1B schedule, gradients that
            are summed in several places and divided in one, an optimizer spread over the replicas, checkpoints that any
            other layout reads
Laptop      torchrun --standalone --nproc-per-node=4 ch05_deepspeed_megatron/train_megatron.py --tp 2 --pp 2
Layouts     ... --tp 2 --sequence-parallel; --pp 4 --micro-batches 8; --tp 2 (and two replicas); none (four of them)
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/train_megatron.py --preset 1b --tp 2 \\
                --sequence-parallel --batch-size 2 --seq-len 2048 --lr 3e-4 --micro-batches 4 --overlap
Two hosts   python -m ch02_hardware_parallelism.virtual_cluster --hosts 2 --ranks-per-host 2 --launch torchrun -- \\
                ch05_deepspeed_megatron/train_megatron.py --tp 2 --pp 2 --steps 20
Cluster     sbatch ch05_deepspeed_megatron/launch/megatron_3d.sbatch 8b-tp8 --out runs/job --resume auto
You see     the same losses, to rounding, for every layout of the same --global-batch; what a rank holds of the weights
            go down to 1 / (tp x pp), of the optimizer's state by the replicas too; --out ends as a Hugging Face folder
"""

from __future__ import annotations

from ch01_intro import training
from ch03_ddp import preemption
from ch03_ddp.train_ddp import open_feed
from ch04_fsdp import options as fsdp_options
from ch04_fsdp import weights
from ch05_deepspeed_megatron import megatron_convert, megatron_model, megatron_options, megatron_step
from ch05_deepspeed_megatron.megatron_checkpoints import Keeper
from ch05_deepspeed_megatron.megatron_report import MegatronReport
from common import dist, lm, script
from common.logs import get_logger

log = get_logger()


def main(argv: list[str] | None = None) -> dict:
    args, layout, config = megatron_options.parse(__doc__, argv)
    run = script.start(__file__, args)
    out = args.out or run.folder
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx, layout.groups(ctx, args.seed + 1):
        settings = fsdp_options.settings(args, corpus, ctx) | {"optimizer_states": args.optimizer_states}
        if args.out:
            fsdp_options.check_out(args.out, ctx)
        keeper = Keeper(out / "checkpoints", settings, ctx, keep=args.keep)
        source = keeper.find(args)
        fsdp_options.agree(ctx, source, keeper.settings | fsdp_options.of_all_ranks(args, ctx))
        megatron_options.check_memory(args, config, layout, ctx)
        dtype = training.compute_dtype(args.dtype, ctx.device)
        model = megatron_model.build(config, layout, ctx, dtype=dtype, dropout=args.dropout)
        if lm.is_preset(args.preset):
            megatron_convert.initialize(model, args.seed, ctx)
        else:
            megatron_convert.load(model, weights.checkpoint_files(args.preset), ctx)
        sharded = args.optimizer_states == "sharded"
        ddp, optimizer = megatron_model.wrap(
            model, ctx, lr=args.lr, clip=args.clip, distributed_optimizer=sharded, overlap=args.overlap
        )
        script.seed_everything(args.seed + 1 + ctx.rank)  # from here on each rank has a random stream of its own
        first, position = keeper.load(source, ddp, optimizer) if source else (0, 0)
        replica = layout.replica(ctx)
        feed = open_feed(args, corpus, replica, position)  # the ranks of a replica take the same sequences
        report = MegatronReport(args, corpus, ctx, out, first, source)
        preempted = preemption.Preemption(args.preempt_signals, ctx)

        leave = None
        for number in range(first + 1, args.steps + 1):
            lr = training.learning_rate(number - 1, args.steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            preempted.ask()
            with report.timer.phase("data"):
                batch = next(feed)
                micro_batches = megatron_step.even(batch.micro_batches, args.batch_size if layout.pp > 1 else 0)
            with report.timer.phase("forward_backward"):
                loss = megatron_step.backward(ddp, micro_batches, batch.tokens)
            with report.timer.phase("optimizer"):
                megatron_step.update(optimizer)
            report.step(number, loss, lr, batch)

            leave = preempted.answer()
            last = bool(leave) or number == args.steps
            validated = args.val_every and number % args.val_every == 0 and not last
            val_loss = report.validate(ddp, number) if validated else None
            due = args.save_every and number % args.save_every == 0
            if args.out and (last or due or validated):
                report.flush()  # what a checkpoint has passed must not be missing from the losses
                keeper.save(number, ddp, optimizer, batch.position, val_loss)
                report.pause()
            if leave:
                break

        result = report.finish(ddp, preempted=bool(leave))
        held = ctx.gather(megatron_model.held_bytes(model, optimizer))
        if ctx.is_main:
            result |= {"tp": layout.tp, "pp": layout.pp, "dp": replica.world_size}
            result |= {f"held_{kind}_gib": max(rank[kind] for rank in held) / 2**30 for kind in held[0]}
            if leave:
                result["requeued"] = preemption.requeue(leave)
        ctx.barrier("report written")
        return result


if __name__ == "__main__":
    script.run(main)
