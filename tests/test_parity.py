"""Chapter 2's harness: every strategy against one process, every planted bug found, bytes as the formulas say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ch02_hardware_parallelism import bugs, harness, museum, parity
from ch02_hardware_parallelism.data_parallel import BucketedDataParallel, DataParallel
from ch02_hardware_parallelism.harness import Case, Outcome, Problem, check
from ch02_hardware_parallelism.strategy import share, token_count, trainable
from common import dist, process
from common.ranks import run_ranks, values
from tests.inprocess import run_script

MUSEUM = "ch02_hardware_parallelism/museum.py"
PARITY = "ch02_hardware_parallelism/parity.py"
PARAMETERS = {tied: sum(p.numel() for p in Problem().build(Case(tied=tied)).parameters()) for tied in (True, False)}


def covering(ranks: int) -> list[Case]:
    """Each setting, and each pair of accumulation and uneven, in as few cases as will do. The whole table: parity.py."""
    return [
        Case(ranks, 1, "float64", tied=False, uneven=True),
        Case(ranks, 4, "float64", tied=True, frozen=True, uneven=True),
        Case(ranks, 4, "float32", tied=True),
        Case(ranks, 1, "float32", tied=False, frozen=True),
    ]


@pytest.fixture(scope="module", params=[2, 3, 4])
def outcomes(request: pytest.FixtureRequest) -> list[Outcome]:
    return check(list(harness.STRATEGIES), covering(request.param))


def test_every_strategy_computes_what_one_process_computes(outcomes: list[Outcome]) -> None:
    assert [f"{o.strategy}, {o.case}: {o.diagnosis()}" for o in outcomes if not o.skipped and not o.ok] == []
    grids = {2: {"tensor-x-data"}, 3: {"tensor-x-data", "pipeline-x-data"}, 4: set()}
    assert {o.strategy for o in outcomes if o.skipped} == grids[outcomes[0].case.ranks]


def test_with_the_librarys_collectives_too() -> None:
    ours = [name for name in harness.STRATEGIES if not name.startswith("library")]
    outcomes = check(ours, [replace(case, by_hand=False) for case in covering(2)[:2]])
    assert [o.diagnosis() for o in outcomes if not o.skipped and not o.ok] == []
    assert {o.wire_bytes for o in outcomes if o.strategy == "data-parallel"} == {0}  # the library's are not seen


def test_counted_bytes_are_exactly_those_of_the_formula(outcomes: list[Outcome]) -> None:
    """Tied and untied, with frozen parameters and with uneven batches: by whatever has a formula, which is all of ours."""
    done = [outcome for outcome in outcomes if not outcome.skipped]
    assert {o.strategy for o in done if o.bytes_exact is None} == {n for n in harness.STRATEGIES if "library" in n}
    counted = [o for o in done if o.bytes_exact is not None]
    assert [f"{o.strategy}, {o.case}: {o.wire_bytes}" for o in counted if not o.bytes_exact or not o.wire_bytes] == []


def test_bytes_of_data_parallelism_in_numbers(outcomes: list[Outcome]) -> None:
    found = {
        (o.strategy, o.case.tied): o.wire_bytes
        for o in outcomes
        if o.strategy in ("data-parallel", "zero-1") and not o.case.frozen
    }
    ranks = outcomes[0].case.ranks
    for tied, itemsize in ((False, 8), (True, 4)):
        assert found["data-parallel", tied] == 2 * (ranks - 1) * (PARAMETERS[tied] + 2) * itemsize
        padded = -(-PARAMETERS[tied] // ranks) * ranks
        assert found["zero-1", tied] == 2 * (ranks - 1) * (padded + 2) * itemsize


def test_every_strategy_but_one_fits_eight_ranks() -> None:
    """As on a node of eight GPUs: the problem grows with the ranks. One of the library wants a chunk for each stage."""
    model = Problem().build(Case(8))
    kinds = {name: harness.resolve(name)[1] for name in harness.STRATEGIES}
    assert [name for name, kind in kinds.items() if kind.why_not(model, 8)] == ["library-1f1b"]
    assert Problem().shape_for(Case(3)) == Problem.shape
    assert {Problem().shape_for(Case(n)).heads for n in range(1, 7)} == {12, 15}


def test_tensor_and_pipeline_parallelism_on_eight_ranks() -> None:
    names = ["tensor-x-data", "sequence-parallel", "pipeline-1f1b"]
    outcomes = check(names, [Case(8, 1, "float64", tied=True, frozen=True, uneven=True)])
    assert [(o.diagnosis(), o.bytes_exact) for o in outcomes] == [("", True)] * 3


# ---------------------------------------------------------------- the museum


@pytest.fixture(scope="module")
def museum_outcomes() -> dict[tuple[str, bool], Outcome]:
    """By class and evenness, of all bugs and the strategies they spoil, in one start of the ranks for each number."""
    found = []
    for ranks in (2, 4):
        here = [bug for bug in bugs.BUGS.values() if bug.ranks == ranks]
        kinds = {kind for bug in here for kind in (bug.healthy, bug.broken)}
        cases = [Case(ranks, 4, uneven=uneven) for uneven in (False, True)]
        found += check(sorted(kinds, key=lambda kind: kind.__name__), cases)
    return {(outcome.strategy, outcome.case.uneven): outcome for outcome in found}


@pytest.mark.parametrize("name", bugs.BUGS)
def test_the_harness_finds_every_planted_bug(name: str, museum_outcomes: dict[tuple[str, bool], Outcome]) -> None:
    bug = bugs.find_bug(name)
    healthy, broken = (
        [museum_outcomes[kind.__name__, uneven] for uneven in (False, True)] for kind in (bug.healthy, bug.broken)
    )
    assert all(outcome.ok for outcome in healthy)
    assert any(not outcome.ok for outcome in broken)
    assert all(outcome.loss_error < 0.2 for outcome in broken)  # none of them is seen by a glance at the loss


def test_the_harness_says_what_is_wrong(museum_outcomes: dict[tuple[str, bool], Outcome]) -> None:
    case = Case(2, 4, tied=True)

    def found(name: str) -> Outcome:
        return museum_outcomes[bugs.find_bug(name).broken.__name__, False]

    total = found("sum-instead-of-mean")
    assert len(total.wrong) == len(total.factors) > 60
    assert all(math.isclose(factor, 2, rel_tol=1e-9) for factor in total.factors.values())
    assert "2 times too large" in total.diagnosis()
    assert "16 times too large" in found("unscaled-pipeline-loss").diagnosis()
    assert found("tied-weight-synced-once").wrong == ("embedding.token.weight",)
    assert found("norm-of-own-shard").failures == ["norm"]
    missing = found("missing-replicated-all-reduce")
    assert set(missing.wrong) == {
        n
        for n, _ in trainable(Problem().build(case))
        if any(w in n for w in ("norm", "position", "out.bias", "down.bias"))
    }


def test_bugs_that_need_their_setting_are_right_in_the_others(
    museum_outcomes: dict[tuple[str, bool], Outcome],
) -> None:
    assert museum_outcomes["MeanOfMeans", False].ok
    found = check(
        [bugs.LastMicroBatchOnly, bugs.ReducedEveryMicroBatch, bugs.TiedWeightSyncedOnce],
        [Case(2, 1, tied=False)],
    )
    assert [outcome.diagnosis() for outcome in found] == [""] * 3


class FrozenForgotten(DataParallel):
    """Returns a gradient fewer than there are."""

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: g for name, g in super().gradients().items() if name != "norm.bias"}


class OnlyRankZero(DataParallel):
    """Rank 1 has no gradients to show."""

    def gradients(self) -> dict[str, torch.Tensor]:
        return super().gradients() if self.comm.rank == 0 else {}

    def squared_norm(self) -> torch.Tensor:
        return torch.stack([g.square().sum() for g in super().gradients().values()]).sum()


class NoWeights(DataParallel):
    """Nothing to compare after the last update."""

    def weights(self) -> dict[str, torch.Tensor]:
        return {}


class AstrayOnOneRank(DataParallel):
    """Rank 1's copy of one gradient went astray: rank 0 alone would see nothing."""

    def synchronize(self) -> None:
        super().synchronize()
        if self.comm.rank == 1:
            self.model.norm.bias.grad *= 1.001


class NotANumber(DataParallel):
    def synchronize(self) -> None:
        super().synchronize()
        self.model.norm.bias.grad[0] = float("nan")


def test_the_harness_sees_missing_astray_and_not_a_number() -> None:
    kinds = [FrozenForgotten, AstrayOnOneRank, NotANumber, OnlyRankZero, NoWeights]
    missing, astray, nan, *unseen = check(kinds, [Case(2, frozen=True)])
    assert [len(outcome.missing) > 60 and not outcome.ok for outcome in unseen] == [True, True]
    assert missing.missing == ("norm.bias",)
    assert not missing.ok
    assert astray.wrong == ("norm.bias",)
    assert astray.factors["norm.bias"] == pytest.approx(1.001)
    assert not nan.ok
    assert nan.wrong == ("norm.bias",)


# ---------------------------------------------------------------- buckets


def _when_buckets_leave() -> list[tuple[str, int]]:
    """What happens in a step of two micro-batches: backward's gradients and departing buckets, in order."""
    with dist.session("cpu", threads=1):
        from ch02_hardware_parallelism.comm import Comm

        happened: list[tuple[str, int]] = []

        class Watched(Comm):
            def all_reduce(self, x, *, async_op=False):
                happened.append(("bucket" if async_op else "loss", x.numel()))
                return super().all_reduce(x, async_op=async_op)

        class Small(BucketedDataParallel):
            bucket_bytes = 64 * 1024

            def begin(self, *, last: bool) -> None:
                happened.append(("micro-batch", int(last)))
                super().begin(last=last)

            def on_gradient(self, parameter):
                happened.append(("gradient", parameter.numel()))
                super().on_gradient(parameter)

        problem, case = Problem(), Case(2, 2)
        strategy = Small(problem.build(case), Watched(), problem.make_optimizer)
        strategy.backward(next(iter(problem.steps(case))))
        strategy.close()
        return happened


def test_buckets_leave_during_the_last_backward_and_not_before() -> None:
    for happened in values(run_ranks(_when_buckets_leave, 2)):
        last = happened.index(("micro-batch", 1))
        assert not any(kind == "bucket" for kind, _ in happened[:last])
        after = [kind for kind, _ in happened[last:]]
        assert after.count("bucket") > 5
        first, final_gradient = after.index("bucket"), len(after) - 1 - after[::-1].index("gradient")
        assert first < final_gradient  # it left while gradients were still to come
        assert after[-1] == "loss"


def test_shares_are_the_whole_batch_once() -> None:
    tokens = torch.arange(7 * 3).view(7, 3)
    for size in (1, 2, 3, 4):
        parts = [share((tokens, tokens + 1), rank, size) for rank in range(size)]
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), tokens)
        assert token_count(parts) == 21


# ---------------------------------------------------------------- the command


def test_the_table_and_the_exit_codes() -> None:
    good = run_script(
        PARITY, ["--strategy", "data-parallel,zero-1", "--ranks", "2", "--accumulation", "1"], timeout_s=120
    )
    assert good.returncode == 0, good.stderr
    assert good.result["compared"] == 32
    assert good.result["wrong"] == 0
    assert (good.result["bytes_compared"], good.result["bytes_exact"]) == (32, True)
    assert "zero-1" in good.stdout
    assert good.stdout.count(" exact\n") == 2
    assert "WRONG" not in good.stdout
    bad = run_script(PARITY, ["--fault", "sum-instead-of-mean", "--ranks", "2", "--accumulation", "1"], timeout_s=120)
    assert bad.returncode == 1
    assert bad.result["caught"] is True
    assert "WRONG" in bad.stdout
    assert bad.stderr.strip().splitlines()[-1].startswith("failed: 16 of 16")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--strategy", "nonsense"], "no strategy 'nonsense'; one of data-parallel"),
        (["--fault", "nonsense"], "no bug 'nonsense'; one of sum-instead-of-mean"),
        (["--fault", ""], "no bug ''; one of"),
        (["--ranks", "0"], "--ranks: 0 is below 1"),
        (["--ranks", "9"], "take 1 to 8"),
        (["--fault", "mean-of-means", "--strategy", "zero-1"], "leave out --strategy"),
        (["--strategy", "tensor-x-data", "--ranks", "3", "--accumulation", "1"], "nothing was compared"),
    ],
)
def test_bad_input(flags: list[str], says: str) -> None:
    done = run_script(PARITY, flags, timeout_s=120)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_parity_under_a_launcher() -> None:
    command = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "ch02_hardware_parallelism.parity"]
    done = process.run([*command, "--strategy", "pipeline-1f1b", "--dtype", "float64"], timeout_s=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.result is not None
    assert done.result["compared"] == 16


def test_matrix_marks_what_is_wrong() -> None:
    fine = Outcome("a", Case(2), gradient_error=1e-15)
    wrong = Outcome("b", Case(2), gradient_error=0.5, wrong=("x",))
    skipped = Outcome("c", Case(2), skipped="needs 4 ranks")
    lines = parity.matrix([fine, wrong, skipped]).splitlines()
    assert [("ok" in line, "WRONG" in line) for line in lines[2:]] == [(True, False), (False, True), (False, False)]
    assert "bytes" not in lines[0]
    more = replace(fine, wire_bytes=8, wire_bytes_formula=4)
    assert parity.matrix([fine, more]).splitlines()[2].endswith("WRONG")
    assert "8 bytes sent, by formula 4" in parity.explain([more])


def test_what_a_loss_curve_tells() -> None:
    healthy = [[9.0, *[level] * 10] for level in (5.0, 5.1)]
    for end, tells in ((5.15, False), (5.3, True), (float("nan"), True)):
        assert museum.Exhibit("x", [9.0, *[end] * 10], healthy, "").curve_tells is tells


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device", "cuda"], "the museum trains on CPU ranks"),
        (["--batch-size", "3"], "--batch-size 3 is less than the bugs need; take 4 or more"),
        (["--by-hand"], "--by-hand"),
        (["--steps", "29"], "--steps 29 is no loss curve to judge by; take 30 or more"),
        (["--bug", "nonsense"], "no bug 'nonsense'"),
    ],
)
def test_bad_input_of_the_museum(flags: list[str], says: str) -> None:
    done = run_script(MUSEUM, flags)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr.strip().splitlines()[-1]


def test_a_bug_that_is_not_found_fails() -> None:
    done = run_script(PARITY, ["--fault", "mean-of-means", "--ranks", "1", "--accumulation", "1"], timeout_s=120)
    assert done.returncode == 1
    assert "was not found" in done.stderr
