"""The bubble of DeepSpeed's pipeline, measured instruction by instruction beside (p-1)/(m+p-1), and what 1F1B saves.

You learn   that the share of time a stage idles follows from the number of micro-batches m and of stages p, and from
            nothing else while stages are equal; that GPipe idles as long as 1F1B and holds m activations instead of p
Laptop      torchrun --standalone --nproc-per-node=2 ch05_deepspeed_megatron/pipeline_bubble.py
GPU node    torchrun --standalone --nproc-per-node=gpu ch05_deepspeed_megatron/pipeline_bubble.py --width 2048 \
                --layers 32 --heads 16 --batch-size 8 --seq-len 1024 --micro-batches 2,4,8,16,32
Cluster     sbatch ch03_ddp/launch/train.sbatch ch05_deepspeed_megatron/pipeline_bubble.py --width 2048 --layers 64
You see     a row for each m: measured and by formula, a few per cent apart; micro-batches in flight on the first stage
            by both schedules; timeline.png, a row a stage

The formula takes all stages to be equally fast, and messages to cost nothing. So the model here is many equal layers
with a small vocabulary: a real one's head costs as much as several layers, and the stage that has it is the slow one.
Each rank needs a core of its own. Counted as busy is the time inside DeepSpeed's instructions ForwardPass and
BackwardPass; sends, receives and waiting are not. Of several steps the one with the median idle share counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as td

from ch02_hardware_parallelism.schedules import Op, bubble_formula, peak_live
from ch02_hardware_parallelism.timeline import Event, bubble, busy_s, draw
from ch04_fsdp import zero_peers
from ch05_deepspeed_megatron import pipeline_engine, pipeline_model
from common import dist, lm, script
from common.logs import get_logger
from common.script import at_least, comma_list

Timeline = list[list[Event]]  # by stage


def gpipe(engine: Any) -> Any:
    """All forwards, then all backwards, in DeepSpeed's own instructions: a schedule that it does not have."""
    from deepspeed.runtime.pipe import schedule as ds

    class GPipe(ds.TrainSchedule):  # type: ignore[misc]
        def num_pipe_buffers(self) -> int:
            return self.micro_batches

        def steps(self) -> Iterator[list[Any]]:
            first, last = self.stage_id == 0, self.stage_id == self.stages - 1
            for buffer in range(self.micro_batches):
                yield (
                    [ds.RecvActivation(buffer)] * (not first)
                    + [ds.LoadMicroBatch(buffer)] * (first or last)
                    + [ds.ForwardPass(buffer)]
                    + [ds.SendActivation(buffer)] * (not last)
                )
            for buffer in range(self.micro_batches):
                yield (
                    [ds.RecvGrad(buffer)] * (not last) + [ds.BackwardPass(buffer)] + [ds.SendGrad(buffer)] * (not first)
                )
            yield [ds.ReduceTiedGrads(), ds.ReduceGrads(), ds.OptimizerStep()]

    return GPipe(micro_batches=engine.micro_batches, stages=engine.num_stages, stage_id=engine.stage_id)


SCHEDULES = ("1f1b", "gpipe")


class Recorder:
    """Notes when each forward and each backward pass of this stage began and ended."""

    def __init__(self, engine: Any) -> None:
        from deepspeed.runtime.pipe import schedule as ds

        self.engine = engine
        self.events: list[Event] = []
        self.losses: dict[int, torch.Tensor] = {}
        self.own_schedule = engine._train_schedule
        engine._INSTRUCTION_MAP = dict(engine._INSTRUCTION_MAP)
        for instruction, kind in ((ds.ForwardPass, "forward"), (ds.BackwardPass, "backward")):
            does = engine._INSTRUCTION_MAP[instruction]
            engine._INSTRUCTION_MAP[instruction] = self._timed(does, kind)

    def _timed(self, does: Callable[..., None], kind: str) -> Callable[..., None]:
        def timed(engine: Any, buffer_id: int) -> None:
            if kind == "backward":
                engine.loss = self.losses.pop(buffer_id)
            begin = self.clock()
            does(engine, buffer_id)
            if kind == "forward":
                self.losses[buffer_id] = engine.loss  # the engine keeps one alone, enough for 1F1B and not for GPipe
            self.events.append(Event(begin, self.clock(), kind, sum(e.kind == kind for e in self.events)))

        return timed

    def clock(self) -> float:
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize()  # else it would be the time of queueing the kernels
        return time.perf_counter()

    def step(self, schedule: str, micro_batches: list[Any], tokens: int) -> list[Event]:
        """One training step. Times count from a barrier: the clocks of two machines have nothing in common."""
        self.engine._train_schedule = self.own_schedule if schedule == "1f1b" else lambda: gpipe(self.engine)
        self.events = []
        td.barrier()
        begin = time.perf_counter()
        pipeline_engine.step(self.engine, micro_batches, tokens)
        return [e._replace(begin_s=e.begin_s - begin, end_s=e.end_s - begin) for e in self.events]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--layers", type=at_least(1), default=8)
    parser.add_argument("--width", type=at_least(8), default=256)
    parser.add_argument("--heads", type=at_least(1), default=4)
    parser.add_argument("--vocab", type=at_least(2), default=64, help="small: the head belongs to one stage only")
    parser.add_argument("--batch-size", type=at_least(1), default=1, help="sequences a micro-batch")
    parser.add_argument("--seq-len", type=at_least(2), default=512)
    parser.add_argument("--micro-batches", type=comma_list(at_least(1)), default=[1, 2, 4, 8], help="comma separated")
    parser.add_argument("--repeats", type=at_least(1), default=7, help="steps, of which the median counts")
    args = parser.parse_args(argv)
    ranks = dist.read_launch().world_size
    if ranks < 2:
        raise script.UserError("one stage has no bubble; start two ranks or more with torchrun")
    if args.layers % ranks:
        raise script.UserError(f"--layers {args.layers} in {ranks} stages are unequal ones; take a multiple")
    if args.width % (2 * args.heads):
        raise script.UserError(f"--width {args.width} does not divide into {args.heads} heads of even width")
    return args


def config_of(args: argparse.Namespace) -> Any:
    config = lm.config("nano", args.seq_len)
    config.vocab_size, config.num_hidden_layers, config.tie_word_embeddings = args.vocab, args.layers, False
    config.hidden_size, config.intermediate_size = args.width, 11 * args.width // 4
    config.num_attention_heads = config.num_key_value_heads = args.heads
    config.head_dim = args.width // args.heads
    return config


def build(args: argparse.Namespace, ctx: dist.Context) -> Any:
    zero_peers.join(ctx.launch, ctx.device)
    module = pipeline_model.build(config_of(args), ctx.world_size, "type:decoderlayer")
    pipeline_model.initialize(module, args.seed)
    settings = {"train_micro_batch_size_per_gpu": args.batch_size, "steps_per_print": None}
    return pipeline_engine.initialize(module, torch.optim.SGD(module.parameters(), lr=1e-3), settings)


def measure(args: argparse.Namespace, recorder: Recorder, schedule: str, count: int) -> Timeline:
    """The median, by its idle share, of --repeats steps of `count` micro-batches, on every rank."""
    engine = recorder.engine
    engine.set_train_batch_size(count * args.batch_size)
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.batch_size, args.seq_len)
    batches = [(torch.randint(args.vocab, shape, generator=generator),) * 2 for _ in range(count)]
    tokens = count * args.batch_size * args.seq_len
    steps: list[Timeline] = []
    for _ in range(args.repeats):
        told: Timeline = [[]] * td.get_world_size()
        td.all_gather_object(told, recorder.step(schedule, batches, tokens))
        steps.append([[Event(*event) for event in stage] for stage in told])
    return sorted(steps, key=bubble)[len(steps) // 2]


def in_flight(stage: list[Event]) -> int:
    """The most micro-batches between the end of their forward and the end of their backward: activations held."""
    order: list[Op] = [(event.kind, event.chunk) for event in stage]
    return peak_live(order)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    run = script.start(__file__, args)
    with dist.session(args.device, threads=1) as ctx:
        if ctx.is_main and ctx.device.type == "cpu" and ctx.launch.local_world_size > script.usable_cores():
            get_logger().warning("more ranks than cores: stages wait for a core too, the bubble says nothing")
        recorder = Recorder(build(args, ctx))
        measure(args, recorder, "1f1b", 2)  # memory is allocated, connections are opened
        found = {
            schedule: [measure(args, recorder, schedule, count) for count in args.micro_batches]
            for schedule in SCHEDULES
        }
        ctx.barrier("measured")
        if not ctx.is_main:
            return {}
        formula = [bubble_formula(ctx.world_size, count) for count in args.micro_batches]
        measured = {schedule: [bubble(timeline) for timeline in found[schedule]] for schedule in SCHEDULES}
        busy = [sum(busy_s(timeline[stage]) for timeline in found["1f1b"]) for stage in range(ctx.world_size)]
        result = {
            "stages": ctx.world_size,
            "micro_batches": args.micro_batches,
            "bubble_formula": formula,
            **{f"bubble_{schedule}": measured[schedule] for schedule in SCHEDULES},
            "largest_deviation": max(abs(m / f - 1) for m, f in zip(measured["1f1b"], formula, strict=True)),
            "slowest_stage_over_mean": max(busy) * len(busy) / sum(busy),
            **{f"in_flight_{schedule}": [in_flight(t[0]) for t in found[schedule]] for schedule in SCHEDULES},
        }
        report(result)
        last = found["1f1b"][-1]
        title = f"DeepSpeed's 1F1B, {args.micro_batches[-1]} micro-batches: {bubble(last):.0%} of the time is idle"
        draw(last, title, run.path("timeline.png"))
        return result


def report(result: dict) -> None:
    print("idle share of {stages} stages (p), by micro-batches (m); m in flight on the first stage".format(**result))
    print("     m   (p-1)/(m+p-1)    1F1B   GPipe    in flight: 1F1B   GPipe")
    columns = ("micro_batches", "bubble_formula", "bubble_1f1b", "bubble_gpipe", "in_flight_1f1b", "in_flight_gpipe")
    for row in zip(*(result[name] for name in columns), strict=True):
        print("{:6} {:15.3f} {:7.3f} {:7.3f} {:18} {:7}".format(*row))
    print("largest deviation of 1F1B from the formula: {largest_deviation:.1%}".format(**result))
    print("the slowest stage is busy {slowest_stage_over_mean:.3f} times the mean".format(**result))


if __name__ == "__main__":
    script.run(main)
