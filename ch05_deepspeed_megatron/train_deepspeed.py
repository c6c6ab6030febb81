"""Train a transformer with DeepSpeed: chapters 3 and 4's script on its engine, the strategy in a JSON file.

You learn   what deepspeed.initialize takes over (sharding, accumulation, clipping, loss scale) and what it leaves to
            you (the loss's divisor, the schedule, checkpoints that survive a kill); what each line of a config does
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/train_deepspeed.py
Stages      ... train_deepspeed.py --deepspeed-config ch05_deepspeed_megatron/configs/zero3.json
GPU node    deepspeed --no_local_rank ch05_deepspeed_megatron/train_deepspeed.py --preset 1b --batch-size 4 \
                --seq-len 2048 --lr 3e-4 --deepspeed-config ch05_deepspeed_megatron/configs/zero3.json
Cluster     sbatch ch03_ddp/launch/train.sbatch ch05_deepspeed_megatron/train_deepspeed.py --preset 8b \
                --deepspeed-config ch05_deepspeed_megatron/configs/zero3.json
You see     the losses of train_fsdp.py, to rounding, in every stage; the hash of the weights on all ranks; tokens/s
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ch01_intro import training
from ch03_ddp import preemption, step
from ch03_ddp.report import Report
from ch03_ddp.train_ddp import open_feed
from ch04_fsdp import export, weights, zero_peers
from ch04_fsdp.options import agree, check_out, of_all_ranks
from ch05_deepspeed_megatron import checkpoints, engine, options
from common import dist, script


class EngineReport(Report):
    """What a rank cannot do alone, all do together."""

    zero: object  # the engine, for the float32 weights that its optimizer holds

    def weights_sha256(self, model: nn.Module) -> str:
        return weights.sha256_of(engine.whole_weights(self.zero))

    def save_model(self, model: nn.Module) -> None:
        if self.args.out:
            whole = engine.whole_weights(self.zero)
            export.export(model, self.corpus.tokenizer(), self.out / "model", self.ctx, whole)

    def sample(self, model: nn.Module) -> None:
        if self.args.sample_tokens:
            self.show_sample(model, to_the_end=True)


def main(argv: list[str] | None = None) -> dict:
    args = options.parse(__doc__, argv)
    settings = options.settings(args)
    run = script.start(__file__, args)
    out: Path = args.out or run.folder
    corpus = training.load_corpus(args)
    with dist.session(args.device, threads=args.threads) as ctx:
        if args.out:
            check_out(args.out, ctx)
        made_by = options.of_a_resume(args, corpus, ctx, settings)
        keeper = checkpoints.Keeper(out / "checkpoints", made_by, ctx, keep=args.keep)
        source = keeper.find(args)
        agree(ctx, source, made_by | {"DeepSpeed config": settings} | of_all_ranks(args, ctx))
        options.check_memory(args, settings, ctx)
        model = engine.build(
            args.preset, settings, ctx, seq_len=args.seq_len, seed=args.seed, dropout=args.dropout
        )  # fmt: skip
        if args.compile:
            step.compile_layers(model)
        zero = engine.initialize(model, settings, ctx)
        script.seed_everything(args.seed + 1 + ctx.rank)  # from here on each rank has a random stream of its own
        first, position = keeper.load(source, zero) if source else (0, 0)
        feed = open_feed(args, corpus, ctx, position)
        report = EngineReport(args, corpus, ctx, out, first, source)
        report.zero = zero
        preempted = preemption.Preemption(args.preempt_signals, ctx)

        leave = None
        for number in range(first + 1, args.steps + 1):
            lr = training.learning_rate(number - 1, args.steps, args.lr, args.warmup)
            engine.set_learning_rate(zero, lr)
            preempted.ask()
            with report.timer.phase("data"):
                batch = next(feed)
            with report.timer.phase("forward_backward"):
                loss = zero_peers.backward(zero, batch.micro_batches, batch.tokens, ctx.world_size)
            with report.timer.phase("optimizer"):
                zero_peers.update(zero)
            report.step(number, loss, lr, batch)

            leave = preempted.answer()
            last = bool(leave) or number == args.steps
            validated = args.val_every and number % args.val_every == 0 and not last
            val_loss = report.validate(model, number) if validated else None
            due = args.save_every and number % args.save_every == 0
            if args.out and (last or due or validated):
                report.flush()  # what a checkpoint has passed must not be missing from the losses
                keeper.save(number, zero, batch.position, val_loss)
                report.pause()
            if leave:
                break

        result = report.finish(model, preempted=bool(leave))
        if ctx.is_main:
            result |= {
                "stage": engine.stage_of(settings),
                "offload": {what: engine.device_of(settings, what) for what in ("optimizer", "param")},
            }
            if leave:
                result["requeued"] = preemption.requeue(leave)
        ctx.barrier("report written")
        return result


if __name__ == "__main__":
    script.run(main)
