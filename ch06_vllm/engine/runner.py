"""From a schedule to tokens: the step's tensors, the model on every rank, and the next tokens on rank 0."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
import torch.distributed as dist

from ch06_vllm.engine.model import Model, Shard
from ch06_vllm.engine.paged_attention import Chunk, Step
from ch06_vllm.engine.request import Config
from ch06_vllm.engine.scheduler import Share
from common.script import UserError


class Runner:
    """The model and its cache on this rank. Under tensor parallelism rank 0 says each step, the others `follow`."""

    def __init__(self, config: Config, device: torch.device, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()
        self.model = Model(config.model, config.dtype, device, self.shard, config.max_model_len)
        self.block_size = config.block_size
        self._check_step(config)  # whatever can be refused is, before the weights are read
        asked = config.num_blocks
        if asked is None and config.kv_cache_gib is not None:
            asked = self._blocks_in(config.kv_cache_gib * 2**30)
        if asked is not None:
            self._check_cache(asked)
        self.model.load()
        self.num_blocks = self._agreed(self._blocks_in(self._room()) if asked is None else asked)
        self._check_cache(self.num_blocks)
        self.model.allocate_cache(self.num_blocks, self.block_size)

    def _room(self) -> float:
        """Bytes for this rank's cache where nothing is said, beside the weights."""
        if self.model.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.model.device)
            return free - 0.1 * total
        return min(2**30, psutil.virtual_memory().available / 2) / self.shard.world_size

    def _blocks_in(self, room: float) -> int:
        return int(room // (self.model.cache_bytes_a_token * self.block_size))

    def _agreed(self, blocks: int) -> int:
        """The least of what the ranks have room for."""
        if self.shard.world_size > 1:
            everyone = torch.tensor(blocks)
            dist.all_reduce(everyone, dist.ReduceOp.MIN)
            blocks = int(everyone)
        return blocks

    def _check_step(self, config: Config) -> None:
        longest = self.model.max_len
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < longest:
            raise UserError(
                f"without chunked prefill a request of {longest} tokens must fit into one step; raise "
                f"max_num_batched_tokens ({config.max_num_batched_tokens}) or lower max_model_len"
            )

    def _check_cache(self, blocks: int) -> None:
        longest, size = self.model.max_len, self.block_size
        if blocks * size < longest:
            raise UserError(
                f"{max(blocks, 0)} blocks of {size} tokens do not hold one request of {longest}; "
                "give the cache more room (num_blocks, kv_cache_gib) or lower max_model_len"
            )
        needed = blocks * size * self.model.cache_bytes_a_token
        if self.model.device.type == "cpu" and needed > psutil.virtual_memory().available:
            raise UserError(f"a cache of {needed / 2**30:.1f} GiB does not fit into memory; lower num_blocks")

    def run(self, shares: Sequence[Share]) -> torch.Tensor | None:
        """Logits [sampling requests, vocabulary], in the order of the shares that sample; None if none does."""
        step = self._step(shares)
        if self.shard.world_size > 1:
            dist.broadcast_object_list([step])
        return self.model(step.to(self.model.device))

    def follow(self) -> None:
        """What the other ranks do: compute the steps that rank 0 says, until it says None."""
        while True:
            said: list[Step | None] = [None]
            dist.broadcast_object_list(said)
            if said[0] is None:
                return
            if len(said[0].tokens):  # an empty step is a sign of life
                self.model(said[0].to(self.model.device))

    def keep_alive(self) -> None:
        """Between requests, so that the others' wait does not time out."""
        if self.shard.world_size > 1:
            empty = torch.empty(0, dtype=torch.long)
            dist.broadcast_object_list([Step(empty, empty, empty, empty, empty, [], empty)])

    def stop(self) -> None:
        if self.shard.world_size > 1:
            dist.broadcast_object_list([None])

    def _step(self, shares: Sequence[Share]) -> Step:
        singles = [share for share in shares if share.count == 1]
        size = self.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        chunks: list[Chunk] = []
        last_row: dict[str, int] = {}
        for share in [*singles, *(share for share in shares if share.count > 1)]:
            request, start, end = share.request, share.start, share.start + share.count
            first = len(tokens)
            tokens += request.tokens[start:end]
            positions += range(start, end)
            slots += [request.blocks[at // size] * size + at % size for at in range(start, end)]
            last_row[request.request_id] = len(tokens) - 1
            if share.count > 1:
                blocks = torch.tensor(request.blocks[: -(-end // size)])
                whole = (blocks[:, None] * size + torch.arange(size)).flatten()[:end]
                chunks.append(Chunk(slice(first, len(tokens)), start, end, whole))
        width = max((share.start // size + 1 for share in singles), default=0)
        tables = [(s.request.blocks + [0] * width)[:width] for s in singles]
        return Step(
            torch.tensor(tokens),
            torch.tensor(positions),
            torch.tensor(slots),
            torch.tensor(tables, dtype=torch.int32),
            torch.tensor([share.start + 1 for share in singles], dtype=torch.int32),
            chunks,
            torch.tensor([last_row[share.request.request_id] for share in shares if share.samples], dtype=torch.long),
        )
