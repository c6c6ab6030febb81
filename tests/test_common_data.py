"""Text to tokens to batches: nothing lost, nothing twice, the same bytes each time, and a kill leaves no half of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import data
from common.data import Blocks, ShardedBatches
from common.script import UserError
from tests.spawn import forkserver, run_ranks, values

VOCAB = 600  # small: the tokenizer trains in a fraction of a second
WHOLE = settings(max_examples=150, deadline=None)


def stream(n_blocks: int, seq_len: int = 2) -> Blocks:
    return Blocks(np.arange(n_blocks * seq_len + 1, dtype=np.uint16), seq_len)


def taken(blocks: Blocks, batch: int, world: int, seed: int, rounds: int, position: int = 0) -> list[int]:
    """Block numbers in the order in which the ranks together consume them: round by round, rank by rank."""
    ranks = [
        ShardedBatches(blocks, batch, rank=r, world_size=world, seed=seed, position=position) for r in range(world)
    ]
    found = [int(i) for _ in range(rounds) for rank in ranks for i in rank.next_indices()]
    assert len({rank.position for rank in ranks}) == 1
    assert ranks[0].position == position + rounds * batch * world
    return found


# ---------------------------------------------------------------- sharding

sizes = st.integers(1, 40)
batch_sizes, worlds, seeds = st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**32)


@WHOLE
@given(sizes, batch_sizes, worlds, seeds)
def test_every_epoch_is_exactly_the_data(n_blocks: int, batch: int, world: int, seed: int) -> None:
    rounds = -(-3 * n_blocks // (batch * world))
    order = taken(stream(n_blocks), batch, world, seed, rounds)
    for epoch in range(3):
        assert sorted(order[epoch * n_blocks : (epoch + 1) * n_blocks]) == list(range(n_blocks))


@WHOLE
@given(sizes, batch_sizes, worlds, seeds, st.integers(0, 20), batch_sizes, worlds)
def test_resume_goes_on_exactly_also_with_other_ranks(
    n_blocks: int, batch: int, world: int, seed: int, rounds: int, batch_2: int, world_2: int
) -> None:
    blocks = stream(n_blocks)
    position = rounds * batch * world
    unbroken = taken(blocks, 1, 1, seed, position + 5 * batch_2 * world_2)
    assert taken(blocks, batch, world, seed, rounds) == unbroken[:position]
    assert taken(blocks, batch_2, world_2, seed, 5, position) == unbroken[position:]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    blocks = stream(100)
    order = taken(blocks, 10, 2, 0, 10)
    first, second = order[:100], order[100:]
    assert first != second
    assert first != sorted(first)
    assert taken(blocks, 10, 2, 1, 5) != first
    assert taken(blocks, 10, 2, 0, 5) == first


def test_ranks_of_one_job_see_the_same_epochs_in_several_processes() -> None:
    """The order does not depend on the process: hash seeds and imports differ, the permutation does not."""
    found = values(run_ranks(order_here, 2))
    assert found[0] == found[1] == taken(stream(50), 4, 2, 7, 20)


def order_here() -> list[int]:
    return taken(stream(50), 4, 2, 7, 20)


@WHOLE
@given(st.integers(1, 300), st.integers(1, 17))
def test_blocks_shift_by_one_and_cover_the_stream(n_tokens: int, seq_len: int) -> None:
    tokens = np.arange(1000, 1000 + n_tokens, dtype=np.uint16)
    blocks = Blocks(tokens, seq_len)
    assert len(blocks) == (n_tokens - 1) // seq_len
    if len(blocks) == 0:
        return
    inputs, targets = blocks.batch(np.arange(len(blocks)))
    assert inputs.shape == targets.shape == (len(blocks), seq_len)
    assert str(inputs.dtype) == str(targets.dtype) == "torch.int64"
    used = len(blocks) * seq_len
    assert inputs.flatten().tolist() == tokens[:used].tolist()
    assert targets.flatten().tolist() == tokens[1 : used + 1].tolist()
    assert n_tokens - 1 - used < seq_len  # less than a block is left over


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_too_few_tokens_for_one_block(tokens: int) -> None:
    with pytest.raises(UserError, match=f"{tokens} tokens, too few for one block of 8"):
        ShardedBatches(Blocks(np.zeros(tokens, dtype=np.uint16), 8), 1)


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="not in a world"):
        ShardedBatches(stream(4), 1, rank=rank, world_size=world)


# ---------------------------------------------------------------- the corpus


def bytes_of(corpus: data.Corpus) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(corpus.folder.iterdir())}


def test_same_text_same_key_and_same_bytes(text_folder: Path, own_cache: Path) -> None:
    first = data.prepare(str(text_folder), VOCAB)
    assert first.folder.is_relative_to(own_cache)
    made, stamp = bytes_of(first), (first.folder / "train.bin").stat().st_mtime_ns
    again = data.prepare(str(text_folder), VOCAB)
    assert again.folder == first.folder
    assert (again.folder / "train.bin").stat().st_mtime_ns == stamp  # from the cache
    shutil.rmtree(first.folder)
    rebuilt = data.prepare(str(text_folder), VOCAB)
    assert rebuilt.folder == first.folder
    assert bytes_of(rebuilt) == made
    assert set(made) == {"meta.json", "tokenizer.json", "train.bin", "validation.bin"}
    assert data.prepare(str(text_folder), VOCAB + 1).folder != first.folder


def test_the_key_changes_when_a_file_does(text_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_folder, tmp_path / "texts"))
    keys = [data.find_source(str(folder)).key]
    victim = sorted(folder.iterdir())[3]

    def changed(change: Callable[[], Any]) -> None:
        change()
        keys.append(data.find_source(str(folder)).key)

    changed(lambda: victim.write_text(victim.read_text() + "more"))
    changed(lambda: os.utime(victim, ns=(1, victim.stat().st_mtime_ns + 1)))  # same size, written later
    changed(lambda: victim.rename(victim.with_name("renamed.py")))
    changed(lambda: (folder / "new.txt").write_text("new"))
    changed(lambda: (folder / "new.txt").unlink() or (folder / "renamed.py").unlink())
    assert len(set(keys)) == len(keys)
    (folder / "image.png").write_bytes(b"\x89PNG\0")  # not text: no part of the corpus
    assert data.find_source(str(folder)).key == keys[-1]


def test_validation_holds_whole_files_that_training_does_not(text_folder: Path, own_cache: Path) -> None:
    documents = {path.name: path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())}
    corpus = data.prepare(str(text_folder), VOCAB)
    tokenizer = corpus.tokenizer()
    parts = {}
    for split in ("train", "validation"):
        text = tokenizer.decode(np.asarray(getattr(corpus, split)).tolist())
        parts[split] = [piece for piece in text.split(data.END_OF_TEXT) if piece]
    assert sorted(parts["train"] + parts["validation"]) == sorted(documents.values())  # each once, whole
    assert 0 < len(parts["validation"]) < len(documents) / 4
    assert not set(parts["train"]) & set(parts["validation"])
    assert corpus.vocab_size == VOCAB
    assert max(corpus.train.max(), corpus.validation.max()) < VOCAB


def test_of_a_few_documents_the_end_of_each_is_held_out(tmp_path: Path, own_cache: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 26) for i in range(2000)))
    (tmp_path / "blank.txt").write_text(" \n")
    corpus = data.prepare(str(tmp_path), VOCAB)
    tokenizer = corpus.tokenizer()
    train, held = (
        tokenizer.decode(np.asarray(tokens).tolist()).split(data.END_OF_TEXT)[:-1]
        for tokens in (corpus.train, corpus.validation)
    )
    assert [a + b for a, b in zip(train, held, strict=True)] == [
        (tmp_path / f"{number}.txt").read_text() for number in range(3)
    ]
    assert [len(b) for b in held] == [100] * 3


def prepare_here(folder: str) -> tuple[str, bool]:
    """The corpus's bytes, and whether this process is the one that made it."""
    made = []
    tokenize = data._tokenize
    data._tokenize = lambda *args: made.append(tokenize(*args))  # type: ignore[assignment]
    corpus = data.prepare(folder, VOCAB)
    return json.dumps(bytes_of(corpus)), bool(made)


def test_several_processes_prepare_once(text_folder: Path, own_cache: Path) -> None:
    found = values(run_ranks(prepare_here, 4, str(text_folder)))
    assert len({made for made, _ in found}) == 1
    assert [worked for _, worked in found].count(True) == 1


def killed_while_tokenising(folder: str, stage: str) -> None:
    """Ends itself with SIGKILL at one moment of prepare()."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if stage == "after the tokenizer":
        data.np.asarray = die  # type: ignore[assignment]
    elif stage == "before the rename":
        Path.rename = die  # type: ignore[assignment, method-assign]
    else:
        data.train_tokenizer = die  # type: ignore[assignment]
    data.prepare(folder, VOCAB)


@pytest.mark.parametrize("stage", ["before the tokenizer", "after the tokenizer", "before the rename"])
def test_a_kill_leaves_no_half_made_corpus(stage: str, text_folder: Path, own_cache: Path) -> None:
    (killed,) = run_ranks(killed_while_tokenising, 1, str(text_folder), stage)
    assert killed.returncode == -signal.SIGKILL
    left = [path.name for path in (own_cache / "corpora").iterdir()]
    assert any(name.endswith(".partial") for name in left)  # it died in the middle
    corpus = data.prepare(str(text_folder), VOCAB)
    names = sorted(path.name for path in (own_cache / "corpora").iterdir())
    assert names == [corpus.folder.name, f"{corpus.folder.name}.lock"]  # nor does the wreck stay
    shutil.rmtree(corpus.folder)
    assert bytes_of(data.prepare(str(text_folder), VOCAB)) == bytes_of(data.prepare(str(text_folder), VOCAB))


def hold_lock(path: str, held: Any) -> None:
    with data._lock(Path(path)):
        held.set()
        signal.pause()


def test_a_killed_holder_frees_the_lock_and_a_live_one_is_named(tmp_path: Path) -> None:
    held = forkserver.Event()
    holder = forkserver.Process(target=hold_lock, args=(str(tmp_path / "x.lock"), held))
    holder.start()
    try:
        assert held.wait(30)
        with pytest.raises(UserError, match=r"x\.lock"), data._lock(tmp_path / "x.lock", timeout_s=0.2):
            raise AssertionError("two hold the lock")
    finally:
        holder.kill()
        holder.join(10)
    started = time.monotonic()
    with data._lock(tmp_path / "x.lock", timeout_s=10):
        assert time.monotonic() - started < 5


def test_uint32_only_where_the_vocabulary_needs_it(tmp_path: Path, own_cache: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "a.txt").write_text("w1 w65536 w70000 " * 50)
    for size, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.save(str(tmp_path / "words.json"))
        corpus = data.prepare(str(tmp_path / "a.txt"), tokenizer_file=tmp_path / "words.json")
        assert corpus.train.dtype == dtype
        assert corpus.train[:3].tolist() == [1, 65536 if size > 2**16 else 0, 0]
        assert corpus.vocab_size == size
        assert len(corpus.tokenizer()) == size  # no id is added that a model would not have


# ---------------------------------------------------------------- parquet, JSON lines, CSV


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_rows_of_a_data_set_folder(suffix: str, tmp_path: Path, own_cache: Path) -> None:
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [f"row {number} says {'ab' * number}" for number in range(50)]
    table = pyarrow.table({"id": list(range(50)), "text": texts})
    if suffix == "parquet":
        table = pyarrow.table({"id": list(range(51)), "text": [*texts, None]})  # a row without text is no text "None"
        pyarrow.parquet.write_table(table, folder / "a.parquet")
    elif suffix == "csv":
        pyarrow.csv.write_csv(table, folder / "a.csv")
    else:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    documents = list(data.find_source(str(folder)).documents())
    assert documents == [(f"a.{suffix}:{number}", text) for number, text in enumerate(texts)]
    assert len(data.prepare(str(folder), 300).train) > 100


# ---------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def tokenizer(text_folder: Path, session_cache: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", session_cache)
        return data.prepare(str(text_folder), VOCAB).tokenizer()


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_round_trips(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < VOCAB for i in ids)


@settings(max_examples=60, deadline=None)
@given(choice=st.data())
def test_python_source_round_trips(tokenizer: Any, text_folder: Path, choice: st.DataObject) -> None:
    source = choice.draw(st.sampled_from(sorted(text_folder.iterdir()))).read_text(encoding="utf-8")
    start = choice.draw(st.integers(0, len(source)))
    piece = source[start : start + choice.draw(st.integers(1, 1000))]
    assert tokenizer.decode(tokenizer(piece).input_ids) == piece


def test_the_tokenizer_compresses_what_it_learned(tokenizer: Any, text_folder: Path) -> None:
    source = sorted(text_folder.iterdir())[0].read_text(encoding="utf-8")
    assert len(tokenizer(source).input_ids) < 0.6 * len(source.encode())
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0


# ---------------------------------------------------------------- bad input


def _write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing file": (lambda p: str(p / "nothing.txt"), "no file or folder"),
    "missing relative path": (lambda p: "./nothing/here", "no file or folder"),
    "no such hub data set": (lambda p: "nobody/nothing", "cannot load the data set nobody/nothing"),
    "empty folder": (lambda p: str(p), "no text in the folder"),
    "folder without text": (lambda p: str(Path(_write(p / "f" / "a.png", b"x")).parent), "no text in the folder"),
    "binary file": (lambda p: _write(p / "a.txt", b"ab\0cd"), "not text"),
    "binary file with a data set's name": (lambda p: _write(p / "a.parquet", b"ab\0cd"), "cannot load the data set"),
    "empty file": (lambda p: _write(p / "a.txt", b""), "the corpus is empty"),
    "only blanks": (lambda p: _write(p / "a.txt", b" \n\t\n"), "the corpus is empty"),
    "empty JSON lines": (lambda p: _write(p / "a.jsonl", b""), "cannot load the data set"),
    "broken JSON lines": (lambda p: _write(p / "a.jsonl", b'{"text": '), "cannot load the data set"),
    "wrong columns": (lambda p: _write(p / "a.jsonl", b'{"body": "x", "id": 1}\n'), "has the columns body, id"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_helpful_line(
    case: str, tmp_path: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[case]
    path = make(tmp_path / "in") if case != "empty folder" else make((tmp_path / "in").mkdir() or tmp_path / "in")
    with pytest.raises(UserError, match=message) as caught:
        data.prepare(path, VOCAB)
    assert "; " in str(caught.value)  # what; what to do
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # nor do the libraries say more
    corpora = own_cache / "corpora"
    assert not corpora.exists() or all(path.suffix == ".lock" for path in corpora.iterdir())  # nothing half-written


def test_bad_tokenizer_files(text_folder: Path, tmp_path: Path, own_cache: Path) -> None:
    with pytest.raises(UserError, match=r"name a tokenizer\.json"):
        data.prepare(str(text_folder), tokenizer_file=tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        data.prepare(str(text_folder), tokenizer_file=tmp_path / "broken.json")


def test_a_cache_that_cannot_be_written(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        data.prepare(str(text_folder), VOCAB)


def test_the_standard_library_is_a_source_without_its_tests() -> None:
    source = data.find_source("stdlib")
    names = [name for name, _ in zip((name for name, _ in source.documents()), range(2000), strict=False)]
    assert "argparse.py" in names
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(Path(name).parts)]
