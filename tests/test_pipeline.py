"""Pipeline parallelism: schedules as pure functions, gradients against one process, every byte, the script itself."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch02_hardware_parallelism import harness
from ch02_hardware_parallelism.comm import Comm
from ch02_hardware_parallelism.harness import Case, Outcome, Problem
from ch02_hardware_parallelism.library_pipeline import NO_TARGET, LibraryOneFOneB, fill_up
from ch02_hardware_parallelism.pipeline_data_parallel import PipelineDataParallel
from ch02_hardware_parallelism.pipeline_parallel import GPipe, OneFOneB, main
from ch02_hardware_parallelism.schedules import bubble_formula, peak_live, schedule
from ch02_hardware_parallelism.stages import wire_bytes
from ch02_hardware_parallelism.timeline import Event, bubble, busy_s, draw, nobody_s
from common import dist
from common.script import UserError
from tests import inprocess
from tests.spawn import run_ranks, values

SCRIPT = "ch02_hardware_parallelism/pipeline_parallel.py"
BY_HAND = ["pipeline-gpipe", "pipeline-1f1b"]
kinds, sizes = st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 9)

# ---------------------------------------------------------------- schedules


@given(kinds, sizes, sizes, st.data())
def test_a_schedule_runs_each_chunk_forward_then_backward(
    kind: str, stages: int, chunks: int, data: st.DataObject
) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    order = schedule(kind, stage, stages, chunks)
    for direction in ("forward", "backward"):
        assert [chunk for name, chunk in order if name == direction] == list(range(chunks))
    assert all(order.index(("forward", c)) < order.index(("backward", c)) for c in range(chunks))
    assert peak_live(order) == (chunks if kind == "gpipe" else min(chunks, stages - stage))


def run_by_rendezvous(kind: str, stages: int, chunks: int) -> float:
    """The idle share of the stages where every message waits until both ends are there, and none takes time.

    An exchange sends what the operation before it made together with receiving what the next one needs.
    """
    cost = {"forward": 1, "backward": 2}
    orders = [schedule(kind, stage, stages, chunks) for stage in range(stages)]
    plans: list[list[set]] = []
    for stage, order in enumerate(orders):
        plans.append([])
        for done, following in itertools.pairwise([None, *order, None]):
            messages = set()  # what, and across which boundary: the one behind stage b is b
            if done:
                messages.add((*done, stage if done[0] == "forward" else stage - 1))
            if following:
                messages.add((*following, stage - 1 if following[0] == "forward" else stage))
            plans[-1].append({message for message in messages if 0 <= message[2] < stages - 1})
    clock, at, posted = [0] * stages, [0] * stages, {}
    while any(at[stage] < len(plans[stage]) for stage in range(stages)):
        waiting = [stage for stage in range(stages) if at[stage] < len(plans[stage])]
        for stage in waiting:
            for message in plans[stage][at[stage]]:
                posted.setdefault(message, {}).setdefault(stage, clock[stage])
        ready = [stage for stage in waiting if all(len(posted[m]) == 2 for m in plans[stage][at[stage]])]
        assert ready, "deadlock"
        for stage in ready:
            clock[stage] = max([clock[stage], *(t for m in plans[stage][at[stage]] for t in posted[m].values())])
            clock[stage] += cost[orders[stage][at[stage]][0]] if at[stage] < 2 * chunks else 0
            at[stage] += 1
    return 1 - chunks * sum(cost.values()) / max(clock)


@settings(deadline=None, max_examples=60)
@given(kinds, sizes, sizes)
def test_the_messages_cannot_deadlock_and_the_bubble_is_the_formula_s(kind: str, stages: int, chunks: int) -> None:
    assert run_by_rendezvous(kind, stages, chunks) == pytest.approx(bubble_formula(stages, chunks))


def test_the_bubble_of_a_recorded_timeline_and_its_picture(tmp_path: Path) -> None:
    first = [Event(10, 11, "forward", 0), Event(13, 14, "backward", 0)]
    second = [Event(11, 12, "forward", 0), Event(12, 13, "backward", 0)]
    assert bubble([first, second]) == pytest.approx(0.5) == bubble_formula(2, 1)
    assert (busy_s(first), nobody_s([first, second])) == (2, 0)
    assert nobody_s([first, second[:1]]) == 1
    draw([first, second], "two stages", tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- parity and bytes


def assert_parity(outcomes: list[Outcome]) -> None:
    assert all(outcome.ok for outcome in outcomes), [(o.strategy, o.case, o.diagnosis()) for o in outcomes if not o.ok]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_gradients_are_those_of_one_process_and_every_byte_is_accounted_for(ranks: int) -> None:
    names = BY_HAND + ["pipeline-x-data"] * (ranks == 4)
    base = Case(ranks)
    cases = [
        replace(base, accumulation=4, uneven=True),
        replace(base, accumulation=4, tied=False, frozen=True),
        replace(base, uneven=True, frozen=True),
        replace(base, dtype="float32", uneven=True, by_hand=False),
    ]
    outcomes = harness.check(names, cases)
    assert_parity(outcomes)
    for outcome in outcomes:
        if outcome.case.by_hand:
            assert outcome.bytes_exact, outcome


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_library_s_schedules_give_the_same_gradients(ranks: int) -> None:
    cases = [Case(ranks, accumulation=4, uneven=True), Case(ranks, tied=False, frozen=True)]
    assert_parity(harness.check(["library-gpipe", "library-1f1b"], cases))


class FrozenStart(Problem):
    """All of the first stages is frozen: no gradient crosses their boundaries."""

    frozen_names = tuple(n for n, _ in Problem().build(Case(tied=False)).named_parameters() if n.startswith(("embedding", "blocks.0", "blocks.1")))  # fmt: skip


class FrozenEnd(Problem):
    """Only the embedding of words learns, tied to the head."""

    frozen_names = tuple(n for n, _ in Problem().build(Case()).named_parameters() if n != "embedding.token.weight")


def test_nothing_is_sent_back_where_nothing_learns() -> None:
    case = Case(3, tied=False, frozen=True, uneven=True)
    outcomes = harness.check([*BY_HAND, "library-1f1b"], [case], FrozenStart())
    assert_parity(outcomes)
    formula = wire_bytes(FrozenStart().build(case), list(FrozenStart().steps(case))[-1], 3)
    assert [o.wire_bytes for o in outcomes[:2]] == [formula] * 2
    assert formula < wire_bytes(Problem().build(Case(3, tied=False)), list(Problem().steps(case))[-1], 3)
    assert_parity(harness.check(BY_HAND, [Case(3, frozen=True)], FrozenEnd()))


def test_more_stages_than_blocks_is_refused_with_what_to_do() -> None:
    model = Problem().build(Case())
    assert "at most 4 rank(s)" in GPipe.why_not(model, 5)
    assert GPipe.why_not(model, 4) is None
    assert "even" in PipelineDataParallel.why_not(model, 3)
    assert "more chunks" in LibraryOneFOneB.why_not(model, 5)


def test_a_batch_is_filled_up_without_adding_to_the_loss() -> None:
    inputs_bt, targets_bt = fill_up((torch.ones(7, 5, dtype=torch.long), torch.ones(7, 5, dtype=torch.long)), 4)
    assert inputs_bt.shape == targets_bt.shape == (8, 5)
    assert (targets_bt[7] == NO_TARGET).all()


# ---------------------------------------------------------------- planted bugs: the harness must see them


class TiedNotSummed(OneFOneB):
    def sum_tied_gradient(self) -> None:
        pass


class MeanOfChunks(OneFOneB):
    def chunk_loss(self, logits_btv: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten()) / self.chunks


class TiedCountedTwice(OneFOneB):
    def squared_norm(self) -> torch.Tensor:
        total = sum(gradient.square().sum() for gradient in self.gradients().values())
        self.comm.all_reduce(total)
        return total


class ReducedEachRound(PipelineDataParallel):
    def run_round(self, batch) -> None:
        super().run_round(batch)
        for gradient in self.gradients().values():
            self.data.all_reduce(gradient)

    def synchronize(self) -> None:
        self.sum_tied_gradient()


def test_planted_bugs_are_caught_where_they_matter() -> None:
    plain, uneven, untied = Case(2), Case(2, uneven=True), Case(2, tied=False)
    found = {
        (o.strategy, o.case): o
        for o in harness.check([TiedNotSummed, MeanOfChunks, TiedCountedTwice], [plain, uneven, untied])
    }
    assert found["TiedNotSummed", plain].wrong[0] == "embedding.token.weight"  # the others follow in the second step
    assert found["TiedNotSummed", untied].ok
    assert found["MeanOfChunks", plain].ok  # equal chunks hide it
    assert "gradient" in found["MeanOfChunks", uneven].failures
    assert found["TiedCountedTwice", plain].failures == ["norm"]
    assert found["TiedCountedTwice", untied].ok


def test_a_reduction_in_every_round_is_caught_only_with_accumulation() -> None:
    once, four = harness.check([ReducedEachRound], [Case(4), Case(4, accumulation=4)])
    assert once.ok
    assert "gradient" in four.failures


# ---------------------------------------------------------------- memory, errors, the script


def look_at_a_stage(kind: type[GPipe], chunks: int) -> tuple[int, int, str]:
    with dist.session("cpu", timeout_s=30, threads=1):
        problem, case = Problem(), Case(3)
        strategy = kind(problem.build(case), Comm(), problem.make_optimizer)
        strategy.chunks = chunks
        [step, *_] = problem.steps(case)
        strategy.backward(step)
        strategy.chunks = 13
        with pytest.raises(UserError) as refused:
            strategy.backward(step)
        return strategy.peak_live, len(strategy.live), str(refused.value)


@pytest.mark.parametrize(("kind", "peaks"), [(GPipe, [6, 6, 6]), (OneFOneB, [3, 2, 1])])
def test_live_activations(kind: type[GPipe], peaks: list[int]) -> None:
    seen = values(run_ranks(look_at_a_stage, 3, kind, 6))
    assert [peak for peak, _, _ in seen] == peaks
    assert all(left == 0 for _, left, _ in seen)
    assert all(why == "13 chunks of 12 sequences; take fewer or a larger batch" for _, _, why in seen)


SMALL = ["--width", "48", "--layers", "4", "--seq-len", "16", "--steps", "3", "--batch-size", "9", "--chunks", "4"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_script_runs_the_library_s_schedules(schedule: str, tmp_path: Path) -> None:
    flags = [*SMALL, "--kind", "library", "--schedule", schedule, "--device", "cpu", "--run-dir", str(tmp_path)]
    result, _ = values(run_ranks(main, 2, flags))
    assert result["largest_loss_difference"] < 1e-4
    assert result["wire_bytes_formula"] > 0
    unseen = ("bubble_measured", "wire_bytes_per_step", "live_activations_first_stage")
    assert [result[name] for name in unseen] == [None] * 3
    assert not (tmp_path / "timeline.png").exists()


def test_the_script_on_two_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(main, 2, [*SMALL, "--device", "cpu", "--run-dir", str(tmp_path)])
    result, nothing = values(ranks)
    assert nothing == {}
    assert "activations alive, by stage  2 1" in ranks[0].stdout
    assert result["wire_bytes_per_step"] == result["wire_bytes_formula"] > 0
    assert result["largest_loss_difference"] < 1e-4
    assert result["bubble_formula"] == pytest.approx(0.2)
    assert 0 < result["bubble_measured"] < 1
    assert len(result["busy_ms_by_stage"]) == 2
    assert 0 < result["nobody_computes_ms"] < result["step_ms"]
    assert result["live_activations_first_stage"] == 2
    assert (tmp_path / "timeline.png").stat().st_size > 1000


def test_one_rank_is_an_ordinary_step(tmp_path: Path) -> None:
    flags = [
        "--width",
        "48",
        "--layers",
        "2",
        "--seq-len",
        "16",
        "--steps",
        "2",
        "--chunks",
        "4",
        "--schedule",
        "gpipe",
    ]
    done = inprocess.run_script(SCRIPT, [*flags, "--device", "cpu", "--run-dir", tmp_path])
    assert done.returncode == 0, done.stderr
    assert done.result["wire_bytes_per_step"] == done.result["wire_bytes_formula"] == 0
    assert done.result["largest_loss_difference"] < 1e-4
    assert done.result["live_activations_first_stage"] == 4


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--chunks", "17"], "raise --batch-size"),
        (["--chunks", "0"], "--chunks"),
        (["--width", "50"], "does not divide --width 50"),
        (["--schedule", "zero-bubble"], "--schedule"),
        (["--steps", "1"], "--steps"),
        (["--by-hand"], "--by-hand"),
        (["--kind", "theirs"], "--kind"),
    ],
)
def test_bad_flags(flags: list[str], says: str, tmp_path: Path) -> None:
    done = inprocess.run_script(SCRIPT, [*flags, "--run-dir", tmp_path / "run"])
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
