"""Chapter 4: the memory plan. Saved tensors counted one by one, states byte by byte, the allocator followed through a step,
what chapter 2's ranks hold, and the scripts as a reader starts them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ch01_intro import memory, training
from ch02_hardware_parallelism import model as ch02_model
from ch02_hardware_parallelism.stages import Stage
from ch02_hardware_parallelism.tensor_parallel import TensorParallel
from ch04_fsdp import activations, plan_memory, recompute, step
from ch04_fsdp import model as models
from ch04_fsdp.budget import budget
from ch04_fsdp.setting import Setting, in_flight, layers_of, part
from ch04_fsdp.sharding import Sharding
from ch04_fsdp.walk import Step
from common import dist, lm, process, profiling
from common.script import UserError
from tests.inprocess import run_script as run
from tests.spawn import run_ranks, values

GIB = 2**30
RANDOM_STATE = 5056  # bytes that each recomputed region keeps to draw the same dropout again
SHAPES = {
    "nano": {"num_hidden_layers": 3},
    "grouped": {"num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 320, "intermediate_size": 512,
                "tie_word_embeddings": False},
}  # fmt: skip


def config(seq_len: int = 256, **changes: Any) -> Any:
    made = lm.config("nano", seq_len)
    for name, value in changes.items():
        setattr(made, name, value)
    made.head_dim = made.hidden_size // made.num_attention_heads
    return made


def build(made: Any, precision: str, choice: str) -> nn.Module:
    model = lm.build(made)
    if precision == "low":  # as FSDP's mixed precision has it: the weights are in 16 bits, and so is all between them
        model = model.bfloat16()
    recompute.wrap(model, choice)
    return model


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, precision: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        logits = model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")


def batch(made: Any, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(made.vocab_size, (rows, length + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", activations.PRECISIONS)
@pytest.mark.parametrize("choice", ["none", "every-2", "mlp", "block"])
def test_saved_tensors_are_as_many_bytes_as_the_formula_says(shape: str, precision: str, choice: str):
    made = config(**SHAPES[shape])
    model = build(made, precision, choice)
    with memory.SavedActivations(model) as saved:
        loss_of(model, *batch(made, 3, 40), precision)
    expected = activations.saved(made, 3, 40, precision, choice) + 4  # the number of tokens, which the loss keeps
    if choice == "block":  # the rotary angles are held, but as an argument of the layer: the hook does not see them
        expected -= 2 * 40 * made.head_dim * (2 if precision == "low" else 4)
    if precision == "autocast":  # its copies of the weights, of those products that are not recomputed
        layer, mlp = made.hidden_size * made.head_dim * 2 * 2, 3 * made.hidden_size * made.intermediate_size * 2
        layer *= made.num_attention_heads + made.num_key_value_heads
        numbers = range(made.num_hidden_layers)
        whole = {"none": len(numbers), "mlp": 0, "block": 0, "every-2": sum(n % 2 for n in numbers)}[choice]
        expected += whole * (layer + mlp) + (layer * len(numbers) if choice == "mlp" else 0)
        expected += 2 * made.hidden_size * made.vocab_size
    assert sum(saved.bytes_by_module.values()) == expected


@pytest.mark.parametrize("precision", ["fp32", "low"])
@pytest.mark.parametrize("choice", ["block", "mlp", "ops"])
def test_memory_after_forward_is_what_the_formula_keeps(precision: str, choice: str, tmp_path: Path):
    """Also for ops, which keeps tensors where no saved-tensor hook sees them: by what is allocated and not freed."""
    made = config(**SHAPES["grouped"])
    model, (inputs, targets) = build(made, precision, choice), batch(made, 3, 40)
    with profiling.trace(tmp_path / "trace.json", torch.device("cpu"), memory=True):
        loss = loss_of(model, inputs, targets, precision)
    held = sum(size for _, size in allocations(tmp_path / "trace.json"))
    regions = made.num_hidden_layers
    # the ids and targets were there before; the loss and the number of tokens are 4 bytes each
    expected = activations.saved(made, 3, 40, precision, choice) - inputs.nbytes - targets.nbytes + 8
    assert expected <= held <= expected + regions * (RANDOM_STATE + 512)
    assert loss.requires_grad


def allocations(path: Path) -> list[tuple[float, int]]:
    events = json.loads(path.read_text())["traceEvents"]
    return sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")


def test_formula_agrees_with_chapter_1():
    made = config(num_hidden_layers=3)
    for precision, dtype in (("fp32", torch.float32), ("autocast", torch.bfloat16)):
        theirs = sum(memory.activation_formula(made, 2, 64, dtype).values())
        copies = 2 * part(made, Setting()).matrices if precision == "autocast" else 0
        assert activations.saved(made, 2, 64, precision) + copies == theirs


# ---------------------------------------------------------------- states and the step


FOLLOWED_STEP, FOLLOWED_STEPS = "a step", 2


def least_peak(path: Path) -> int:
    """Bytes above what there was before: the most in a step, of the step that had least. gloo's threads let go of their
    copies of what has travelled when they come to run, which on a busy machine is late: a peak may only be too high."""
    events = json.loads(path.read_text())["traceEvents"]
    steps = [event for event in events if event.get("name") == FOLLOWED_STEP and event.get("cat") == "user_annotation"]
    assert len(steps) == FOLLOWED_STEPS
    moments, sizes = zip(*allocations(path), strict=True)
    live = np.cumsum(sizes)
    ends = [np.searchsorted(moments, [step["ts"], step["ts"] + step["dur"]]) for step in steps]
    return min(int(live[begin:end].max()) for begin, end in ends)


def follow(cells: list[tuple[dict[str, Any], dict[str, Any]]], folder: str) -> list[dict[str, int]]:
    """What each cell holds between steps, and the most that it allocates in its third: by the profiler's events."""
    found = []
    with dist.session("cpu", threads=1) as ctx:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # gloo's threads, which are there, go first
        for number, (shape, options) in enumerate(cells):
            options = dict(options)
            accumulate, sync_each = options.pop("accumulate", 1), options.pop("sync_each", False)
            made, sharding = config(**shape), Sharding(**options)
            wrapped = models.build(made, sharding, ctx, seq_len=128)
            model = models.inner(wrapped)
            optimizer = training.make_optimizer(model, 1e-3)
            data = batch(made, 4, 128)

            def one_step(wrapped=wrapped, optimizer=optimizer, data=data, sharding=sharding, n=accumulate, s=sync_each):
                step.backward(wrapped, [data] * n, n * 512 * ctx.world_size, ctx.world_size, sharding, sync_each=s)
                step.update(wrapped, optimizer, 1.0)

            one_step()  # makes the optimizer's state
            one_step()  # in its second step DDP builds its buckets anew
            states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
            local = [t.to_local() if hasattr(t, "to_local") else t for t in states]
            held = models.held_bytes(models.inner(wrapped))
            path = Path(folder) / f"{ctx.rank}-{number}.json"
            with profiling.trace(path, ctx.device, memory=True):
                for _ in range(FOLLOWED_STEPS):
                    with torch.profiler.record_function(FOLLOWED_STEP):
                        one_step()
            swing = least_peak(path)
            ddp = sharding.strategy == "replicate" and ctx.world_size > 1
            optimizer_bytes = sum(t.nbytes for t in local)
            buffers = sum(t.nbytes for t in model.buffers())
            buckets = held["parameters"] if ddp else 0
            between = held["parameters"] + optimizer_bytes + buffers + buckets
            found.append({"parameters": held["parameters"], "optimizer": optimizer_bytes, "buffers": buffers,
                          "peak": between + swing})  # fmt: skip
    return found


WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048}
APART = WIDE | {"tie_word_embeddings": False, "num_key_value_heads": 2, "vocab_size": 1024}
WORDS = WIDE | {"num_hidden_layers": 2, "vocab_size": 8192}
FOLLOWED: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    1: [(WIDE, {"strategy": "replicate", "dtype": torch.bfloat16}),
        (APART, {"strategy": "replicate", "recompute": "block"}), (APART, {"strategy": "full", "recompute": "ops"})],
    2: [(WIDE, {"strategy": "full"}), (APART, {"strategy": "full", "recompute": "mlp"}),
        (APART, {"strategy": "grad"}), (WORDS, {"strategy": "full", "recompute": "block"}),
        (WIDE, {"strategy": "replicate", "recompute": "every-2"}), (APART, {"strategy": "hybrid", "shard_ranks": 1}),
        (APART, {"strategy": "full", "dtype": torch.bfloat16, "prefetch": 2}),
        (APART, {"strategy": "full", "accumulate": 2}), (APART, {"strategy": "full", "accumulate": 2, "sync_each": True})],
}  # fmt: skip


@pytest.mark.parametrize("count", FOLLOWED)
def test_plan_equals_what_torch_allocates(count: int, tmp_path: Path):
    """States to the byte; the peak of a step within 1 % of the allocator's, on two ranks within 4 %."""
    for number, found in enumerate(values(run_ranks(follow, count, FOLLOWED[count], str(tmp_path), timeout_s=200))[0]):
        shape, options = FOLLOWED[count][number]
        setting = Setting(ranks=count, micro_batch=4, seq_len=128, device="cpu", **({"dtype": torch.float32} | options))
        plan = budget(config(**shape), setting)
        for kind in ("parameters", "optimizer", "buffers"):
            assert plan.between[kind] == found[kind], (kind, options)
        assert plan.peak == pytest.approx(found["peak"], rel=0.01 if count == 1 else 0.04), (
            options,
            plan.phase,
            plan.at_peak,
        )


def test_zero_is_the_papers():
    """Rajbhandari et al., arXiv:1910.02054, figure 1: 7.5 B parameters on 64 ranks: 120, 31.4, 16.6 and 1.9 GB."""
    made = lm.config("8b", 128)
    count = lm.parameter_count(made)
    for strategy, gigabytes in (("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)):
        walked = Step(made, Setting(strategy, ranks=64, seq_len=128, recompute="block"))
        walked.walk()
        live = walked.ledger.live
        states = live["parameters"] + live["gradients"] + live["optimizer"]
        assert states / count * 7.5 == pytest.approx(gigabytes, abs=0.06), strategy


def test_the_peak_moves_with_what_is_large():
    long = budget(lm.config("small", 4096), Setting("full", ranks=8, seq_len=4096, recompute="block"))
    assert long.phase == "loss"
    assert long.at_peak["temporaries"] == 2 * 4 * 4096 * 50304  # float32 logits' gradients, twice
    short = budget(lm.config("8b"), Setting("full", ranks=8, seq_len=128))
    assert short.phase.startswith("backward of")
    assert budget(lm.config("8b"), Setting("replicate", ranks=8)).between["gradients"] == 4 * lm.parameter_count(
        lm.config("8b")
    )


def test_each_remedy_takes_memory_away():
    made = lm.config("8b", 4096)
    base: dict[str, Any] = {"strategy": "full", "ranks": 8, "seq_len": 4096}
    plain = budget(made, Setting(**base)).peak
    for remedy in ({"recompute": "block"}, {"recompute": "mlp"}, {"recompute": "ops"}, {"recompute": "every-2"},
                   {"offload": "cpu"}, {"tp": 2}, {"pp": 2, "accumulate": 2}, {"ranks": 16}, {"optimizer": "sgd"},
                   {"seq_len": 2048}):  # fmt: skip
        assert budget(made, Setting(**(base | remedy))).peak < plain, remedy
    whole = budget(made, Setting(**base, accumulate=4)).peak
    assert budget(made, Setting(**base, accumulate=4, sync_each=True)).peak < whole


# ---------------------------------------------------------------- tensor and pipeline parallelism


def test_stages_are_those_of_chapter_2():
    shape = ch02_model.Shape(layers=7, tied=False)
    for stages in (1, 2, 3, 4, 7):
        held = [len(Stage(ch02_model.build(shape), stage, stages).blocks) for stage in range(stages)]
        assert held == [layers_of(stage, stages, 7) for stage in range(stages)]
    made = config(num_hidden_layers=7, tie_word_embeddings=False)
    setting = Setting(ranks=3, pp=3, accumulate=8)
    parts = [part(made, setting, stage) for stage in range(3)]
    assert sum(one.total for one in parts) == lm.parameter_count(made)
    assert [in_flight(setting, stage) for stage in range(3)] == [3, 2, 1]
    tied = [part(config(num_hidden_layers=7), setting, stage).total for stage in range(3)]
    assert sum(tied) == lm.parameter_count(made)  # a tied weight is on both ends


def test_tensor_parallel_ranks_hold_what_chapter_2_cuts():
    """What it cuts (attention, MLP, words) is divided, what it does not (norms) is whole: so it is in part()."""
    whole = ch02_model.build(ch02_model.Shape(tied=False))
    names = {name: p.numel() for name, p in whole.named_parameters() if p.dim() == 2 and "position" not in name}
    norms = {name: p.numel() for name, p in whole.named_parameters() if "norm" in name}
    cut = TensorParallel(whole, SimpleNamespace(rank=1, size=4), lambda p: torch.optim.SGD(p, lr=0.1))  # type: ignore[arg-type]
    held = {name: p.numel() for name, p in cut.model.named_parameters()}
    assert {name: held[name] * 4 for name in names} == names
    assert {name: held[name] for name in norms} == norms

    made = config(vocab_size=2048, tie_word_embeddings=False)
    one, four = part(made, Setting()), part(made, Setting(ranks=4, tp=4))
    norm = made.hidden_size
    assert four.matrices * 4 == one.matrices
    assert four.embedding * 4 == one.embedding
    assert (four.layer - 2 * norm) * 4 == one.layer - 2 * norm
    assert (four.head - norm) * 4 == one.head - norm


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"strategy": "full", "ranks": 6, "tp": 4}, "6 ranks do not divide into tp 4 x pp 1"),
        ({"strategy": "hybrid", "ranks": 6, "shard_ranks": 4}, "do not divide into groups of 4"),
        ({"strategy": "replicate", "offload": "cpu"}, "no shards to offload"),
        ({"strategy": "zero4"}, "no strategy 'zero4'"),
        ({"recompute": "all"}, "cannot recompute 'all'"),
        ({"ranks": 3, "tp": 3}, "does not divide by tp 3"),
        ({"ranks": 5, "pp": 5}, "5 stages for 4 layers"),
        ({"strategy": "zero2", "ranks": 4, "pp": 2}, "zero2 does not go with a pipeline of 2 stages; take zero1"),
    ],
)
def test_what_cannot_be_is_said(given: dict[str, Any], line: str):
    with pytest.raises(UserError, match=line):
        budget(config(), Setting(**given))


# ---------------------------------------------------------------- the scripts


def test_largest():
    assert [plan_memory.largest(lambda n, top=top: n <= top, 100) for top in (0, 1, 2, 37, 99, 100, 1000)] == [
        0, 1, 2, 37, 99, 100, 100,
    ]  # fmt: skip


def test_plan_memory_says_what_fits():
    done = run("ch04_fsdp/plan_memory.py", ["--preset", "8b", "--gpu", "H100-80G", "--ranks", "8"])
    assert done.returncode == 0, done.stderr
    result = done.result
    assert result
    assert "full" in result["fits"]
    assert "replicate" not in result["fits"]
    assert result["peak_gib"]["replicate"] > 16 * 8.03e9 / GIB
    made, memory_bytes = lm.config("8b", 4096), result["memory_gib"] * GIB
    setting = Setting("full", ranks=8, seq_len=4096, recompute="block")
    most = result["largest_micro_batch"]["full"]
    for rows, fits in ((most, True), (most + 1, False)):
        asked = Setting("full", ranks=8, seq_len=4096, recompute="block", micro_batch=rows)
        assert (plan_memory.need(made, asked) <= memory_bytes) is fits
    assert plan_memory.largest_sequence(made, setting, memory_bytes) == result["largest_seq_len"]["full"]


def test_search_is_in_order_and_all_of_it_fits():
    made = lm.config("1b", 2048)
    found = list(plan_memory.search(made, Setting(ranks=2, seq_len=2048), 16 * GIB))
    assert found
    assert all(size <= 16 * GIB for _, _, size in found)
    assert not any(s.strategy == "replicate" and s.replicas > 1 for _, s, _ in found)  # 16 bytes x 1.2 B do not
    assert min(found, key=lambda row: row[0])[1].offload == "none"
    assert {"zero1", "zero2", "zero3"} < {s.strategy for _, s, _ in found}
    staged = {s.strategy for _, s, _ in plan_memory.search(made, Setting(ranks=4, pp=2, seq_len=2048), 40 * GIB)}
    assert staged == {"full", "grad", "replicate", "zero1"}, "no engine has a pipeline with more than ZeRO-1"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--gpu", "H900"], "no GPU 'H900'"),
        (["--gpu", "L4", "--ranks", "6", "--tp", "4"], "do not divide"),
        (["--gpu", "L4", "--strategies", "ddp"], "no strategy 'ddp'"),
        (["--gpu", "L4", "--strategies", "full,zero3", "--pp", "2"], "zero3 does not go with a pipeline"),
        (["--memory-gib", "-1"], "not a finite number above 0"),
        (["--gpu", "L4", "--preset", "9b"], "no model '9b'"),
    ],
)
def test_plan_memory_with_bad_input(argv: list[str], line: str):
    done = run("ch04_fsdp/plan_memory.py", argv)
    assert done.returncode == 2
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_measured_within_a_tenth():
    """The resident set of real processes; the exercise does it over a whole grid."""
    cell = "deep:full:2:recompute=block"
    done = process.run(f"python ch04_fsdp/measure_budget.py --device cpu --cells {cell}", timeout_s=90)
    assert done.returncode == 0, done.stderr
    assert done.result
    assert done.result["measured_mib_min"] > 100
    assert done.result["error_percent_max"] < 10


def test_measure_with_bad_input():
    for cell, line in (("deep:full", "cannot read the cell"), ("deep:full:2:colour=red", "cannot read the cell"),
                       ("deep:full:2:tp=2", "tp is not measured here"), ("deep:full:2:accumulate=0", "take 1 or more"),
                       ("deep:hybrid:2:shard_ranks=3", "groups of 3"), ("huge:full:2", "no model 'huge'")):  # fmt: skip
        done = run("ch04_fsdp/measure_budget.py", ["--cells", cell, "--device", "cpu"])
        assert done.returncode == 2, cell
        assert line in done.stderr, cell
