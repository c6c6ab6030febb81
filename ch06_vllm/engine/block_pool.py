"""The paged KV cache's book-keeping: blocks with reference counts, and a prefix cache among those that are free.

A block holds the keys and values of `block_size` tokens in every layer. A request's block table says which blocks hold
its tokens, in order. A full block is known by the hash of its tokens and of all before them, so a later request with
the same prefix takes it over. A block that nobody refers to stays in the cache until its place is needed: the free list
is in order of least recent use (Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with
PagedAttention"; the hash chain is vLLM's automatic prefix caching).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Of a full block: its tokens and, through the parent's hash, all tokens before it."""
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockPool:
    """Blocks 0 to num_blocks - 1. Who takes a block must release it; `check` proves that all did."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.num_blocks, self.block_size, self.caching = num_blocks, block_size, caching
        self.references = [0] * num_blocks
        self.hash_of: list[bytes | None] = [None] * num_blocks
        self.cached: dict[bytes, int] = {}
        self.free = OrderedDict.fromkeys(range(num_blocks))  # next to be reused first; a dict finds it ever more slowly

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests refer to."""
        return 1 - self.num_free / self.num_blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The cached blocks of the longest known prefix. They are not taken yet."""
        blocks = []
        for digest in hashes:
            block = self.cached.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Take blocks that `match` has found."""
        for block in blocks:
            if self.references[block] == 0:
                del self.free[block]
            self.references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; what they had cached is forgotten. There must be so many."""
        blocks = []
        for _ in range(count):
            block = next(iter(self.free))
            del self.free[block]
            self._forget(block)
            self.references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give a table's blocks back. The last goes first, since a prefix serves more requests than what follows it."""
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0:
                self.free[block] = None
        assert not blocks or min(self.references[block] for block in blocks) >= 0, "a block was released twice"

    def publish(self, block: int, digest: bytes) -> None:
        """A block is full and computed: others may find it. If an equal one is known already, that one stays."""
        if self.caching and digest not in self.cached and self.hash_of[block] is None:
            self.cached[digest] = block
            self.hash_of[block] = digest

    def take_in(self, hashes: Sequence[bytes]) -> dict[int, int]:
        """Blocks for a prefix whose keys and values come from elsewhere: index in `hashes` -> block to write them to.

        They can be found at once and nobody holds them, so write before the next step. What is known already is left
        out, and so is the prefix's end where there is no room.
        """
        known = self.match(hashes)
        self.share(known)  # the blocks that are allocated must not be these
        new = self.allocate(min(len(hashes) - len(known), self.num_free))
        for index, block in enumerate(new, start=len(known)):
            self.publish(block, hashes[index])
        self.release([*known, *new])
        return {index: block for index, block in enumerate(new, start=len(known)) if self.hash_of[block] is not None}

    def forget_all(self) -> None:
        """Empty the prefix cache."""
        for block in list(self.cached.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        digest = self.hash_of[block]
        if digest is not None:
            del self.cached[digest]
            self.hash_of[block] = None

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Every block is free or in as many tables as its count says, and the prefix cache points to what it says.

        Raises:
            AssertionError: which block is wrong.
        """
        held = Counter(block for table in tables for block in table)
        for block in range(self.num_blocks):
            assert self.references[block] == held[block], f"block {block}: {self.references[block]} != {held[block]}"
            assert (block in self.free) == (held[block] == 0), f"block {block} is free and held, or neither"
            digest = self.hash_of[block]
            assert digest is None or self.cached.get(digest) == block, f"block {block} is cached under another's hash"
        assert len(self.cached) == sum(digest is not None for digest in self.hash_of), "a hash leads to no block"
