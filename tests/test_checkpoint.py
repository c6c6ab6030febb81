"""Chapter 1: checkpoints under kills and flipped bits, the losses of a resumed run, and the bigram yardstick."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ch01_intro import bigram, checkpoint, training
from common.logs import Metrics
from common.script import UserError
from tests.spawn import run_ranks

SETTINGS = {"preset": "nano", "lr": 2e-3, "world_size": 2}


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((1000,), float(step))}, "position": step, "rng": (3, [1, 2], None)}


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_save(folder: str, step: int, name: str, call: int) -> None:
    """Save, and end with SIGKILL at the `call`-th call of one function: fsync, rename or rmtree's unlink."""
    calls, real = [0], getattr(os, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            die()
        return real(*args, **kwargs)

    setattr(os, name, counted)
    checkpoint.save(Path(folder), step, state(step), SETTINGS)


@pytest.mark.parametrize("step", [20, 30])  # saved once more, or the next one: the oldest goes
@pytest.mark.parametrize(
    ("name", "call"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("rename", 1), ("rename", 2), ("unlink", 2)]
)
def test_a_kill_leaves_a_whole_checkpoint(step: int, name: str, call: int, tmp_path: Path) -> None:
    for earlier in (10, 20):
        checkpoint.save(tmp_path, earlier, state(earlier), SETTINGS)
    (rank,) = run_ranks(killed_in_save, 1, str(tmp_path), step, name, call)
    assert rank.returncode == -signal.SIGKILL
    for path in checkpoint.every(tmp_path):  # each that is listed is whole
        found, loaded = checkpoint.load(path, SETTINGS)
        assert path.name == f"step-{found:08d}"
        assert loaded["position"] == found
    assert checkpoint.every(tmp_path)[-1].name >= "step-00000010"
    checkpoint.save(tmp_path, 40, state(40), SETTINGS)
    assert checkpoint.every(tmp_path)[-1].name == "step-00000040"
    assert len(checkpoint.every(tmp_path)) == checkpoint.KEEP


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_what_a_run_saves_outlives_the_course_that_it_left(keep: int, tmp_path: Path) -> None:
    for number in (10, 20, 30):
        checkpoint.save(tmp_path, number, state(number), SETTINGS, keep=3)
    written = []
    for number in (12, 14, 20):  # a resume from 10; 20 is rewritten
        written.append(checkpoint.save(tmp_path, number, state(100 + number), SETTINGS, keep=keep))
        kept = checkpoint.every(tmp_path)
        assert kept[-len(written) :] == written[-keep:], "and nothing above, where a resume would go on"
        assert len(kept) == min(keep, 1 + len(written))
    assert checkpoint.load(kept[-1], SETTINGS)[1]["position"] == 120


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new", 7, state(7), SETTINGS)
    step, loaded = checkpoint.load(path, SETTINGS)
    assert step == 7
    assert torch.equal(loaded["model"]["w"], state(7)["model"]["w"])
    assert loaded["rng"] == state(7)["rng"]
    with pytest.raises(UserError, match=r"made with world_size 2, this run has 4"):
        checkpoint.load(path, SETTINGS | {"world_size": 4})
    with pytest.raises(UserError, match=r"no checkpoint at"):
        checkpoint.load(tmp_path / "none", SETTINGS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.save(tmp_path_factory.mktemp("saved"), 20, state(20), SETTINGS)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(["state.pt", "meta.json"]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_seen(saved: Path, name: str, where: float, bit: int) -> None:
    """In the weights, in the step and in the settings alike."""
    file = saved / name
    whole = file.read_bytes()
    spoilt = bytearray(whole)
    spoilt[int(where * len(whole))] ^= 1 << bit
    try:
        file.write_bytes(spoilt)
        with pytest.raises(UserError) as caught:
            checkpoint.load(saved, SETTINGS)
    finally:
        file.write_bytes(whole)
    assert "\n" not in str(caught.value)
    assert checkpoint.load(saved, SETTINGS)[0] == 20


@pytest.mark.parametrize("meta", ["", "[]", "3", '{"step": 1}', '{"step": 1, "sha256": "x", "settings": []}'])
def test_a_strange_meta_file_is_one_line(saved: Path, tmp_path: Path, meta: str) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    (copy / "meta.json").write_text(meta)
    with pytest.raises(UserError, match="is corrupt"):
        checkpoint.load(copy, SETTINGS)


def test_losses_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    path.write_text("".join(json.dumps({"step": n, "loss": n / 3}) + "\n" for n in range(1, 8)) + '{"step": 8, "lo')
    losses = training.open_losses(tmp_path, 5)
    assert [row["step"] for row in Metrics.read(path)] == [1, 2, 3, 4, 5]
    losses.write(step=6, loss=0.5)
    losses.close()
    assert Metrics.read(path)[-2:] == [{"step": 5, "loss": 5 / 3}, {"step": 6, "loss": 0.5}]
    training.open_losses(tmp_path, 0).close()  # a run from the start
    assert Metrics.read(path) == []


def losses_killed(folder: str) -> None:
    os.replace = die  # type: ignore[assignment]
    training.open_losses(Path(folder), 2)


def test_a_kill_while_the_losses_are_cut_loses_none(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 1.0} for n in range(1, 5)]
    (tmp_path / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (rank,) = run_ranks(losses_killed, 1, str(tmp_path))
    assert rank.returncode == -signal.SIGKILL
    assert Metrics.read(tmp_path / "losses.jsonl") == rows


# ---------------------------------------------------------------- the bigram model

tokens = st.lists(st.integers(0, 4), min_size=2, max_size=60).map(lambda values: np.array(values, dtype=np.uint16))


@settings(max_examples=100, deadline=None)
@given(tokens, tokens)
def test_bigram_loss_by_its_definition(train: np.ndarray, validation: np.ndarray) -> None:
    vocab = 5
    unigram = [(np.sum(train == b) + 1) / (len(train) + vocab) for b in range(vocab)]
    losses = []
    for strength in bigram.STRENGTHS:
        table = np.zeros((vocab, vocab))
        for a in range(vocab):
            pairs = [int(y) for x, y in itertools.pairwise(train) if x == a]
            for b in range(vocab):
                table[a, b] = (pairs.count(b) + strength * unigram[b]) / (len(pairs) + strength)
        assert table.sum(axis=1) == pytest.approx(np.ones(vocab))  # a probability for each context
        losses.append(-np.mean([np.log(table[a, b]) for a, b in itertools.pairwise(validation)]))
    assert bigram.validation_loss(train, validation, vocab) == pytest.approx(min(losses))
