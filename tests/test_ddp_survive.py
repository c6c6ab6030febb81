"""Killed, spoilt, on other ranks: the scripts' own verdicts, and what they rest on.

elastic.py is run and checked by the smoke rows (ch03_ddp/exercises.toml): a minute is enough for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ch01_intro import checkpoint
from ch03_ddp import elastic, survive
from common import process
from common.logs import Metrics
from tests.inprocess import run_script


def test_five_kills_and_one_in_a_save_and_a_spoilt_checkpoint_leave_no_trace() -> None:
    # From 2 to 3 ranks: the way down to 1 is elastic's, below.
    done = process.run("python ch03_ddp/survive.py --seq-len 32 --seed 4 --other-ranks 3", timeout_s=280)
    assert done.result is not None, done.stderr
    result = done.result
    assert result["kills"] == 6
    assert result["killed_in_a_save"]
    assert result["spoilt_checkpoint_named"]
    assert result["resumed_before_the_spoilt"]
    assert result["losses_equal"]
    assert result["weights_equal"]
    assert result["sequences_equal"]
    assert result["sequences_equal_other_ranks"]
    assert result["largest_loss_difference_other_ranks"] < 1e-4


def test_a_lost_or_repeated_sequence_would_be_seen(tmp_path: Path) -> None:
    job = survive.Job(tmp_path, SimpleNamespace())
    (tmp_path / "samples").mkdir()
    rows = [Metrics(tmp_path / f"samples/rank{rank}.jsonl") for rank in range(2)]
    rows[0].write(step=1, sequences=[4, 5])
    rows[1].write(step=1, sequences=[6, 5])
    rows[0].write(step=2, sequences=[1])
    assert job.samples() == {1: Counter({5: 2, 4: 1, 6: 1}), 2: Counter({1: 1})}
    assert job.ranks_by_step() == {1: 2, 2: 1}
    assert job.newest_ranks() == 1


def test_spoil_changes_one_bit_that_the_hash_sees(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": [1, 2, 3]}, {})
    before = (path / "state.pt").read_bytes()
    survive.spoil(path / "state.pt")
    after = (path / "state.pt").read_bytes()
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
    with pytest.raises(checkpoint.Corrupt):
        checkpoint.load(path, {})


def test_what_an_earlier_kill_left_is_no_save_under_way(tmp_path: Path) -> None:
    """Nor is it the moment while there is one checkpoint only: it will be spoilt, and nothing left to resume from."""

    class Fake(survive.Job):
        starts = 0

        def kill_when(self, condition: Callable[[], object], *_: object) -> bool:
            checkpoint.save(self.out / "checkpoints", 3, {}, {})
            if not self.starts:  # the first run dies in the background's save
                (self.out / "checkpoints/.step-00000006.partial").mkdir()
            else:
                assert not condition(), "what the first run left"
                (self.out / "checkpoints/.step-00000006.partial").mkdir()
                assert not condition(), "one checkpoint only"
                checkpoint.save(self.out / "checkpoints", 6, {}, {})
                assert not condition(), "no save"
                (self.out / "checkpoints/.step-00000009.partial").mkdir()
                assert condition()
            self.starts += 1
            return True

        def finish(self, ranks: int, *flags: str) -> dict:
            with pytest.raises(checkpoint.Corrupt) as caught:
                checkpoint.load(self.out / "checkpoints/step-00000006", {})
            self.last_error = str(caught.value)
            return {"resumed_at_step": 3, "weights_sha256": ""}

    args = SimpleNamespace(seed=0, steps=14, kills=1, ranks=2)
    result = survive.kill_often(Fake(tmp_path, args), Fake(tmp_path, args), args)  # type: ignore[arg-type]
    assert result["killed_in_a_save"]
    assert result["spoilt_checkpoint_named"]
    assert result["resumed_before_the_spoilt"]


def test_the_story_of_the_ranks() -> None:
    assert elastic.story({1: 2, 2: 2, 3: 1, 4: 2}) == "steps 1-2 on 2, 3-3 on 1, 4-4 on 2 ranks"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("ch03_ddp/survive.py --steps 10", "leave no room"),
        ("ch03_ddp/survive.py --ranks 1", "below 2"),
        ("ch03_ddp/survive.py --other-ranks 1,x", "not a whole number"),
        ("ch03_ddp/elastic.py --steps 3", "below 20"),
    ],
)
def test_a_mistake_is_one_line(command: str, says: str) -> None:
    script, *flags = command.split()
    done = run_script(script, flags, timeout_s=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
