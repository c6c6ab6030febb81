"""Real text to packed token blocks, without a download: tokenised once, memory-mapped, sharded over ranks, resumable.

The default corpus is the running interpreter's own standard library. Everything is cached under a key that is made of
what went in, outside the checkout.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.bootstrap import cache_dir
from common.logs import get_logger
from common.script import UserError, sync

log = get_logger()
FORMAT = 1  # part of every cache key: raise it when what is written changes
END_OF_TEXT = "<|endoftext|>"
TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".html", ".tex"}
DATASET_SUFFIXES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
VALIDATION_SHARE = 0.05
Tokens = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Named documents, and a key that changes when they do."""

    name: str
    key: str
    documents: Callable[[], Iterator[tuple[str, str]]]


def find_source(data: str) -> Source:
    """What --data names: `stdlib`, a file, a folder of text (or of parquet, JSON lines, CSV), or a hub data set id.

    Raises:
        UserError: nothing of that name, or nothing readable in it.
    """
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return _files_source("stdlib", root, sorted(_sources(root)))
    path = Path(data)
    if path.is_file():
        return _files_source(path.name, path.parent, [path])
    if path.is_dir():
        files = [
            p for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in TEXT_SUFFIXES | DATASET_SUFFIXES.keys()
        ]
        if not files:
            raise UserError(f"no text in the folder {data}; it needs files such as .txt, .py, .md, .jsonl or .parquet")
        return _files_source(path.name, path, files)
    if data.count("/") == 1 and not data.startswith((".", "/")):
        return _hub_source(data)
    raise UserError(f"no file or folder {data}; --data takes stdlib, a file, a folder, or a hub data set id OWNER/NAME")


def _sources(root: Path) -> Iterator[Path]:
    """The Python files below `root`. Folders to skip are not entered: packages hold a hundred times as many files."""
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _files_source(name: str, root: Path, files: list[Path]) -> Source:
    stats = [(str(p.relative_to(root)), (s := p.stat()).st_size, s.st_mtime_ns) for p in files]
    key = hashlib.sha256(json.dumps([str(root.resolve()), stats]).encode()).hexdigest()

    def documents() -> Iterator[tuple[str, str]]:
        for path in files:
            label = str(path.relative_to(root))
            if path.suffix in DATASET_SUFFIXES:
                yield from _rows(label, DATASET_SUFFIXES[path.suffix], str(path))
            else:
                yield label, _read_text(path)

    return Source(name, key, documents)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); check its permissions") from None
    if b"\0" in raw[:65536]:
        raise UserError(f"{path} is not text (it holds NUL bytes); point --data at text")
    return raw.decode("utf-8", errors="replace")


def _rows(label: str, loader: str, path: str | None = None) -> Iterator[tuple[str, str]]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of a broken file, the error below says
    try:
        rows = datasets.load_dataset(loader, data_files=path, split="train") if path else _from_hub(loader)
    except Exception as error:  # the library raises many kinds; all mean the same here
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise UserError(
            f"cannot load the data set {path or loader} ({reason}); check the file, or the id and network"
        ) from None
    column = next((c for c in ("text", "content", "code") if c in rows.column_names), None)
    if column is None:
        raise UserError(f"{label} has the columns {', '.join(rows.column_names)}; one must be named text or content")
    for number, row in enumerate(rows):
        if row[column] is not None:
            yield f"{label}:{number}", str(row[column])


def _from_hub(dataset: str) -> Any:
    import datasets

    name, _, subset = dataset.partition(":")
    return datasets.load_dataset(name, subset or None, split="train")


def _hub_source(dataset: str) -> Source:
    key = hashlib.sha256(f"hub:{dataset}".encode()).hexdigest()
    return Source(dataset.replace("/", "--"), key, lambda: _rows(dataset, dataset))


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus in the cache: two flat arrays of token ids and the tokenizer that made them."""

    name: str
    folder: Path
    vocab_size: int
    train: Tokens
    validation: Tokens

    def tokenizer(self) -> Any:
        """The tokenizer as transformers loads it."""
        from transformers import PreTrainedTokenizerFast

        file = self.folder / "tokenizer.json"
        known = _read_tokenizer(file).token_to_id(END_OF_TEXT) is not None  # an unknown one would get an id too many
        special = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT} if known else {}
        return PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False, **special)


def prepare(data: str = "stdlib", vocab_size: int = 2048, tokenizer_file: Path | None = None) -> Corpus:
    """Tokenise `data` once and memory-map it. Safe to call from all ranks at once: one works, the others wait.

    Args:
        data: see find_source.
        vocab_size: tokens of the byte-level BPE tokenizer that is trained on the training split.
        tokenizer_file: use this tokenizer.json instead of training one.

    Raises:
        UserError: the source is missing, empty or not text, or the tokenizer file cannot be read.
    """
    source = find_source(data)
    try:
        tokenizer_bytes = tokenizer_file.read_bytes() if tokenizer_file else b""
    except OSError as error:
        raise UserError(f"cannot read {tokenizer_file} ({error.strerror}); name a tokenizer.json") from None
    made_of = [FORMAT, source.key, vocab_size, tokenizer_bytes.hex()]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:20]
    folder = cache_dir() / "corpora" / f"{source.name[:40]}-{key}"
    if not (folder / "meta.json").exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_name(folder.name + ".lock")):
                if not (folder / "meta.json").exists():
                    _tokenize(source, folder, vocab_size, tokenizer_file)
        except OSError as error:
            raise UserError(f"cannot write the cache {folder.parent} ({error.strerror}); set XDG_CACHE_HOME") from None
    meta = json.loads((folder / "meta.json").read_text())
    train, validation = (np.memmap(folder / f"{n}.bin", dtype=meta["dtype"], mode="r") for n in ("train", "validation"))
    return Corpus(source.name, folder, meta["vocab_size"], train, validation)


@contextmanager
def _lock(path: Path, timeout_s: float = 1800) -> Iterator[None]:
    with path.open("w") as file:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"another process holds {path} since {timeout_s:g} s; is it still alive?") from None
                time.sleep(0.1)
        yield


def _tokenize(source: Source, folder: Path, vocab_size: int, tokenizer_file: Path | None) -> None:
    log.info("tokenising, once", corpus=source.name, vocab_size=vocab_size)
    partial = folder.with_name(f"{folder.name}.partial")  # the caller holds the lock: nobody else uses it
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed in here
    partial.mkdir()
    try:
        splits = _split(list(source.documents()))
        tokenizer = _read_tokenizer(tokenizer_file) if tokenizer_file else train_tokenizer(splits["train"], vocab_size)
        tokenizer.save(str(partial / "tokenizer.json"))
        vocab = tokenizer.get_vocab_size()
        end, dtype = tokenizer.token_to_id(END_OF_TEXT), "uint16" if vocab <= 2**16 else "uint32"
        ending = [] if end is None else [end]
        for split, texts in splits.items():
            with (partial / f"{split}.bin").open("wb") as file:
                for start in range(0, len(texts), 256):
                    for encoded in tokenizer.encode_batch(texts[start : start + 256], add_special_tokens=False):
                        np.asarray(encoded.ids + ending, dtype=dtype).tofile(file)
        (partial / "meta.json").write_text(json.dumps({"vocab_size": vocab, "dtype": dtype, "source": source.name}))
        for path in [*partial.iterdir(), partial]:  # on the disk before it is there by name
            sync(path)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is not a tokenizer ({reason}); it must be a Hugging Face tokenizer.json") from None


def _split(documents: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Whole files go to validation, by a hash of their name; of a few documents, the end of each goes instead."""
    documents = [(name, text) for name, text in documents if text.strip()]
    if not documents:
        raise UserError("the corpus is empty; point --data at a file or folder with text in it")
    held_out = [hashlib.sha256(n.encode()).digest()[0] < 256 * VALIDATION_SHARE for n, _ in documents]
    if len(documents) < 40 or not any(held_out):
        cuts = [int(len(text) * (1 - VALIDATION_SHARE)) for _, text in documents]
        pieces = [(text[:cut], text[cut:]) for (_, text), cut in zip(documents, cuts, strict=True)]
        return {"train": [a for a, _ in pieces], "validation": [b for _, b in pieces]}
    return {
        "train": [text for (_, text), held in zip(documents, held_out, strict=True) if not held],
        "validation": [text for (_, text), held in zip(documents, held_out, strict=True) if held],
    }


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (as GPT-2's): any text round-trips, no unknown token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Blocks:
    """Tokens cut into blocks of seq_len + 1 that overlap by one: each is an input and, shifted by one, its targets."""

    tokens: Tokens
    seq_len: int

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.seq_len

    def batch(self, indices: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [len(indices), seq_len]."""
        spans = [self.tokens[i * self.seq_len : (i + 1) * self.seq_len + 1] for i in indices]
        rows = torch.from_numpy(np.stack(spans).astype(np.int64))
        return rows[:, :-1], rows[:, 1:]


class ShardedBatches:
    """An endless stream of batches for one rank. Together the ranks see every block exactly once an epoch.

    The order is a permutation drawn from (seed, epoch), the same on all ranks. `position` counts the blocks that all
    ranks together have consumed: it is the whole state, so a resume may also change the number of ranks. A batch that
    reaches the end of an epoch goes on in the next one: no block is dropped and none padded.
    """

    def __init__(
        self, blocks: Blocks, batch_size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, position: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in a world of {world_size}")
        if len(blocks) == 0:
            raise UserError(
                f"the corpus has {len(blocks.tokens)} tokens, too few for one block of {blocks.seq_len}; "
                "take more text or a smaller --seq-len"
            )
        self.blocks, self.batch_size, self.seed, self.position = blocks, batch_size, seed, position
        self.rank, self.world_size = rank, world_size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def _block_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.blocks))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.blocks))
            self._epoch = epoch
        return int(self._order[offset])

    def next_indices(self) -> npt.NDArray[np.int64]:
        """Block numbers of this rank's next batch; moves `position` on for all ranks."""
        start = self.position + self.rank * self.batch_size
        self.position += self.batch_size * self.world_size
        return np.array([self._block_at(start + i) for i in range(self.batch_size)], dtype=np.int64)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.blocks.batch(self.next_indices())
