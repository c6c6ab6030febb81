"""Train a transformer that no rank could hold: FSDP2 with every strategy, offload and recomputation behind a flag.

You learn   what sharding adds to chapter 3's script: a model that is planned before it has memory, weights that come
            and go layer by layer, a norm that is summed over ranks, checkpoints of which each rank writes its part
Laptop      torchrun --standalone --nproc-per-node=2 ch04_fsdp/train_fsdp.py
Strategies  ... train_fsdp.py --strategy grad, hybrid (--shard-ranks 2), replicate; --recompute block; --offload disk
GPU node    torchrun --standalone --nproc-per-node=gpu ch04_fsdp/train_fsdp.py --preset 1b --batch-size 4 \
                --seq-len 2048 --lr 3e-4 --recompute block --compile
Two hosts   python -m ch02_hardware_parallelism.virtual_cluster --hosts 2 --ranks-per-host 2 --launch torchrun -- \
                ch04_fsdp/train_fsdp.py --strategy hybrid --steps 20
Cluster     sbatch ch03_ddp/launch/train.sbatch ch04_fsdp/train_fsdp.py --preset 8b --strategy hybrid --recompute block
You see     the same losses and the same hash of the weights, to rounding, for every strategy; the memory that a rank
            holds go down to one N-th
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from ch01_intro import training
from ch03_ddp import preemption
from ch03_ddp.report import Report
from ch03_ddp.train_ddp import open_feed
from ch04_fsdp import checkpoints, disk, export, memory_cap, model, options, step, weights
from common import dist, script
from common.logs import get_logger

log = get_logger()


class ShardedReport(Report):
    """What a rank cannot do alone, all do together."""

    def evaluate(self, model: nn.Module) -> float:
        loss = super().evaluate(model)
        weights.reshard(model)
        return loss

    def weights_sha256(self, model: nn.Module) -> str:
        return weights.sha256(model)

    def save_model(self, model: nn.Module) -> None:
        if self.args.out:
            export.export(model, self.corpus.tokenizer(), self.out / "model", self.ctx)

    def sample(self, model: nn.Module) -> None:
        if self.args.sample_tokens:
            self.show_sample(model, to_the_end=True)
            weights.reshard(model)


def main(argv: list[str] | None = None) -> dict:
    args = options.parse(__doc__, argv)
    run = script.start(__file__, args)
    out = args.out or run.folder
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx, ExitStack() as limits:
        args.global_batch = args.global_batch or args.batch_size * ctx.world_size
        options.check_batch(args, ctx)
        options.agree(ctx, None, options.of_all_ranks(args, ctx))
        if args.out:
            options.check_out(args.out, ctx)
        sharding = options.sharding(args, ctx)
        keeper = checkpoints.Keeper(
            out / "checkpoints", options.settings(args, corpus, ctx), ctx, keep=args.keep, in_background=args.async_save
        )
        source = keeper.find(args)
        options.agree(ctx, source, keeper.settings)
        options.check_memory(args, sharding, ctx)
        limits.enter_context(memory_cap.limited(args.memory_cap_gib and args.memory_cap_gib * 2**30, ctx.device))
        wrapped = model.build(
            args.preset, sharding, ctx, seq_len=args.seq_len, seed=args.seed, dropout=args.dropout,
            offload_dir=options.offload_dir(args, run.folder, ctx),
        )  # fmt: skip
        inner = model.inner(wrapped)
        optimizer = model.make_optimizer(inner, args.lr)
        script.seed_everything(args.seed + 1 + ctx.rank)  # from here on each rank has a random stream of its own
        first, position = keeper.load(source, inner, optimizer) if source else (0, 0)
        disk.settle(inner, optimizer)
        feed = open_feed(args, corpus, ctx, position)
        report = ShardedReport(args, corpus, ctx, out, first, source)
        preempted = preemption.Preemption(args.preempt_signals, ctx)

        leave = None
        for number in range(first + 1, args.steps + 1):
            lr = training.learning_rate(number - 1, args.steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            preempted.ask()
            with report.timer.phase("data"):
                batch = next(feed)
            with report.timer.phase("forward_backward"):
                loss = step.backward(
                    wrapped, batch.micro_batches, batch.tokens, ctx.world_size, sharding, sync_each=args.sync_each
                )
            with report.timer.phase("optimizer"):
                step.update(wrapped, optimizer, args.clip)
            report.step(number, loss, lr, batch)

            leave = preempted.answer()
            last = bool(leave) or number == args.steps
            validated = args.val_every and number % args.val_every == 0 and not last
            val_loss = report.validate(inner, number) if validated else None
            due = args.save_every and number % args.save_every == 0
            if args.out and (last or due or validated):
                report.flush()  # what a checkpoint has passed must not be missing from the losses
                keeper.save(number, inner, optimizer, batch.position, val_loss)
                disk.leave(inner)
                report.pause()
            if leave:
                break

        keeper.wait()
        result = report.finish(inner, preempted=bool(leave))
        held = model.held_bytes(inner)
        if ctx.is_main:
            result |= {"strategy": args.strategy, "held_parameters_gib": held["parameters"] / 2**30}
            result |= disk.report(inner)
            if leave:
                result["requeued"] = preemption.requeue(leave)
        ctx.barrier("report written")
        return result


if __name__ == "__main__":
    script.run(main)
