"""The engine's book-keeping without a model: blocks, prefix cache, budget, preemption, over thousands of requests."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ch06_vllm.engine.block_pool import BlockPool, block_hash
from ch06_vllm.engine.request import Config, Request, SamplingParams, Status
from ch06_vllm.engine.scheduler import Scheduler, Share


class Simulation:
    """A scheduler and, instead of a model, a memory in which every slot holds what was computed for it.

    What a real key holds depends on all tokens up to it: so does the digest that stands for it here. The next token
    depends on all of these, so a wrong block would be seen at once, and by another token for good.
    """

    LONGEST = 48

    def __init__(self, rng: random.Random, **settings: object) -> None:
        size = rng.choice([1, 2, 3, 8, 16])
        least = -(-self.LONGEST // size)
        values: dict = {
            "block_size": size, "num_blocks": least + rng.choice([0, 1, 3, least]),
            "max_num_seqs": (seqs := rng.randint(1, 8)), "max_num_batched_tokens": seqs + rng.choice([0, 1, 5, 48]),
            "enable_prefix_caching": rng.random() < 0.7, "enable_chunked_prefill": rng.random() < 0.7,
        }  # fmt: skip
        values |= settings
        if not values["enable_chunked_prefill"]:
            values["max_num_batched_tokens"] = max(values["max_num_batched_tokens"], self.LONGEST)
        self.rng, self.config = rng, Config("none", **values)
        pool = BlockPool(values["num_blocks"], values["block_size"], caching=self.config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, pool)
        self.memory: dict[int, bytes] = {}
        self.digests: dict[str, list[bytes]] = {}
        self.seen: Counter[str] = Counter()
        self.number = 0

    @property
    def alive(self) -> list[Request]:
        return self.scheduler.waiting + self.scheduler.running

    def add(self, prompt: list[int], max_tokens: int, priority: int = 0) -> Request:
        self.number += 1
        request = Request(str(self.number), prompt, SamplingParams(max_tokens), priority, self.number, 0)
        self.scheduler.add(request)
        return request

    def add_random(self) -> Request:
        """Of few tokens, often with a beginning that others have too."""
        base = [int(x) for x in random.Random(self.rng.randint(0, 2)).choices("01", k=self.LONGEST)]
        prompt = base[: self.rng.randint(1, 36)] + self.rng.choices([0, 1], k=self.rng.randint(0, 4))
        return self.add(prompt, self.rng.randint(1, self.LONGEST - len(prompt)), self.rng.choice([0, 0, 0, -1, 1]))

    def right(self, request: Request) -> list[bytes]:
        """Of each token, with all before it."""
        known = self.digests.setdefault(request.request_id, [])
        for token in request.tokens[len(known) :]:
            known.append(hashlib.sha256((known[-1] if known else b"") + bytes([token])).digest())
        return known

    def step(self) -> list[Share]:
        scheduler, size = self.scheduler, self.config.block_size
        running = list(scheduler.running)
        preempted_before = scheduler.num_preemptions
        shares = scheduler.schedule()
        assert sum(share.count for share in shares) <= self.config.max_num_batched_tokens
        assert len({share.request.request_id for share in shares}) == len(shares)
        assert all(share.count >= 1 and share.start == share.request.num_computed for share in shares)
        served = {share.request.request_id for share in shares}
        for request in running:  # nobody stalls: it gets a token, or its blocks went to one before it
            assert request.request_id in served or request.status is Status.WAITING
        assert shares or not self.alive
        self.seen["preempted"] += scheduler.num_preemptions - preempted_before
        for share in shares:
            request = share.request
            table = [block * size + offset for block in request.blocks for offset in range(size)]
            end, right = share.start + share.count, self.right(request)
            self.memory.update(zip(table[share.start : end], right[share.start : end], strict=True))
            assert [self.memory[slot] for slot in table[:end]] == right[:end], "it reads what another has written"
        for share in shares:
            scheduler.computed(share)
            self.seen["chunks"] += not share.samples
            if share.samples:
                request = share.request
                request.tokens.append(self.right(request)[-1][0] % 2)
                if request.num_output == request.params.max_tokens:
                    scheduler.finish(request)
                    self.seen["finished"] += 1
        scheduler.check()
        return shares

    def finish(self) -> None:
        for _ in range(100_000):
            if not self.alive:
                break
            self.step()
        assert not self.alive, "some request never ends"
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks
        assert self.scheduler.pool.usage == 0
        self.seen["hits"] += self.scheduler.prefix_hits


def test_thousands_of_requests_cancels_and_preemptions_leave_every_block_free() -> None:
    seen: Counter[str] = Counter()
    for seed in range(60):
        rng = random.Random(seed)
        simulation = Simulation(rng)
        for _ in range(120):
            for _ in range(rng.choice([0, 0, 1, 2])):
                simulation.add_random()
                seen["requests"] += 1
            if simulation.alive and rng.random() < 0.15:
                cancelled = rng.choice(simulation.alive)
                seen[f"cancelled {cancelled.status.value}"] += 1
                simulation.scheduler.finish(cancelled)
                simulation.scheduler.check()
                assert not cancelled.blocks
            simulation.step()
        simulation.finish()
        seen += simulation.seen
    assert seen["requests"] > 4000
    assert seen["finished"] > 3000
    assert min(seen["cancelled waiting"], seen["cancelled running"]) > 100, seen
    assert min(seen["preempted"], seen["chunks"], seen["hits"]) > 1000, seen


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30))
def test_the_first_in_order_is_never_preempted(seed: int, steps: int) -> None:
    rng = random.Random(seed)
    simulation = Simulation(rng, enable_prefix_caching=False)
    prompt = rng.choices([0, 1], k=rng.randint(1, 30))
    first = simulation.add(prompt, rng.randint(1, 48 - len(prompt)), priority=-5)
    simulation.step()
    for _ in range(steps):
        simulation.add_random()
        simulation.step()
        assert first.status is not Status.WAITING
    simulation.finish()
    assert first.num_preemptions == 0


def test_a_long_prompt_of_high_priority_leaves_the_running_ones_their_tokens() -> None:
    simulation = Simulation(
        random.Random(0), block_size=16, num_blocks=20, max_num_seqs=4, max_num_batched_tokens=8,
        enable_chunked_prefill=True, enable_prefix_caching=False,
    )  # fmt: skip
    running = [simulation.add([0, 1], 40) for _ in range(3)]
    simulation.step()
    urgent = simulation.add([1] * 40, 4, priority=-1)
    before = [request.num_output for request in running]
    steps = 0
    while not urgent.num_output:
        simulation.step()
        steps += 1
    assert steps == 8  # 40 tokens, 5 of the 8 a step
    assert [request.num_output for request in running] == [n + steps for n in before]
    simulation.finish()


def test_waiting_requests_are_served_by_priority_and_then_by_age() -> None:
    simulation = Simulation(
        random.Random(0), block_size=1, num_blocks=48, max_num_seqs=1, max_num_batched_tokens=48,
        enable_chunked_prefill=True,
    )  # fmt: skip
    added = [simulation.add([n % 2], 3, priority) for n, priority in enumerate([1, 0, 0, -1])]
    order = []
    while simulation.alive:
        order += [share.request for share in simulation.step() if share.request not in order]
    assert order == [added[3], added[1], added[2], added[0]]


def test_the_last_in_order_is_preempted_and_comes_back_first() -> None:
    simulation = Simulation(
        random.Random(0), block_size=1, num_blocks=48, max_num_seqs=3, max_num_batched_tokens=48,
        enable_chunked_prefill=True,
    )  # fmt: skip
    first, second = (simulation.add([n] * 20, 28) for n in range(2))
    while not second.num_preemptions:
        simulation.step()
    assert first.num_preemptions == 0
    assert not second.blocks
    late = simulation.add([1, 0], 2)
    assert simulation.scheduler.waiting == [second, late]
    tokens = list(second.tokens)
    simulation.finish()
    assert second.tokens[: len(tokens)] == tokens
    assert second.num_output == 28


def test_the_prefix_survives_longer_than_its_tail_and_the_young_longer_than_the_old() -> None:
    pool = BlockPool(6, 2)
    digests: list[bytes] = []
    for tokens in ((1, 2), (3, 4), (5, 6)):
        digests.append(block_hash(digests[-1] if digests else b"", tokens))
    old = pool.allocate(3)
    for block, digest in zip(old, digests, strict=True):
        pool.publish(block, digest)
    other = block_hash(b"", (7, 8))
    young = pool.allocate(1)
    pool.publish(young[0], other)
    pool.release(old)
    pool.release(young)
    assert pool.match(digests) == old
    left = []
    for _ in range(6):
        pool.allocate(1)
        left.append((len(pool.match(digests)), len(pool.match([other]))))
    assert left == [(3, 1), (3, 1), (2, 1), (1, 1), (0, 1), (0, 0)]


def test_a_block_taken_over_from_the_free_list_counts_its_holders() -> None:
    pool = BlockPool(4, 2)
    table = pool.allocate(2)
    digest = block_hash(b"", (1, 2))
    pool.publish(table[0], digest)
    pool.release(table)
    for holders in (1, 2):
        pool.share(pool.match([digest]))
        assert pool.num_free == 3
        pool.check([[table[0]]] * holders)
    assert pool.usage == 0.25
    pool.release([table[0]])
    assert pool.num_free == 3
    pool.release([table[0]])
    assert pool.num_free == 4
    pool.forget_all()
    assert pool.match([digest]) == []
    pool.check([])


def test_a_hash_stands_for_all_tokens_before_it() -> None:
    one, other = block_hash(b"", (1, 2)), block_hash(b"", (1, 3))
    assert block_hash(one, (5, 6)) != block_hash(other, (5, 6))
    assert block_hash(b"", (1, 2)) == one
    assert block_hash(b"", (1, 256)) != block_hash(b"", (257, 0))  # whole numbers, not their lowest bytes


def test_an_equal_block_that_is_known_already_stays() -> None:
    pool = BlockPool(4, 2)
    one, other = pool.allocate(2)
    digest = block_hash(b"", (1, 2))
    pool.publish(one, digest)
    pool.publish(other, digest)
    assert pool.match([digest]) == [one]
    pool.check([[one], [other]])


# ---------------------------------------------------------------- check() sees what is wrong


def busy() -> Simulation:
    """Two requests that run, with a shared prefix, and one that waits."""
    simulation = Simulation(
        random.Random(0), block_size=4, num_blocks=24, max_num_seqs=2, max_num_batched_tokens=48,
        enable_prefix_caching=True, enable_chunked_prefill=True,
    )  # fmt: skip
    simulation.add([1, 0, 1, 1, 0, 0, 1, 0, 1], 20)
    simulation.step()
    for _ in range(2):
        simulation.add([1, 0, 1, 1, 0, 0, 1, 0, 0], 20)
    simulation.step()
    first, second = simulation.scheduler.running
    assert first.blocks[:2] == second.blocks[:2]
    assert len(simulation.scheduler.waiting) == 1
    simulation.scheduler.check()
    return simulation


def double_release(scheduler: Scheduler) -> None:
    scheduler.pool.release(scheduler.running[0].blocks[-1:])


def lost_block(scheduler: Scheduler) -> None:
    scheduler.pool.allocate(1)


def leaked_by_a_request(scheduler: Scheduler) -> None:
    scheduler.running[0].blocks.pop()


def not_counted(scheduler: Scheduler) -> None:
    scheduler.running[0].blocks.append(next(iter(scheduler.pool.free)))


def gone_from_the_free_list(scheduler: Scheduler) -> None:
    del scheduler.pool.free[next(iter(scheduler.pool.free))]


def hash_of_other_tokens(scheduler: Scheduler) -> None:
    block = scheduler.running[0].blocks[0]
    scheduler.pool._forget(block)
    scheduler.pool.publish(block, block_hash(b"", (9, 9, 9, 9)))


def hash_before_it_is_computed(scheduler: Scheduler) -> None:
    request = scheduler.running[0]
    scheduler.pool.publish(request.blocks[-1], block_hash(request.hashes[-1], (0, 0, 0, 0)))


def hash_that_leads_elsewhere(scheduler: Scheduler) -> None:
    one, other = scheduler.running[0].blocks[:2]
    scheduler.pool.hash_of[one] = scheduler.pool.hash_of[other]


def hash_that_leads_nowhere(scheduler: Scheduler) -> None:
    scheduler.pool.cached[b"?"] = 0


def more_computed_than_blocks_hold(scheduler: Scheduler) -> None:
    scheduler.running[0].num_computed = 4 * len(scheduler.running[0].blocks) + 1


def blocks_while_it_waits(scheduler: Scheduler) -> None:
    scheduler.waiting[0].blocks = scheduler.pool.allocate(1)


def out_of_order(scheduler: Scheduler) -> None:
    scheduler.running.reverse()


def too_many(scheduler: Scheduler) -> None:
    request = scheduler.waiting.pop()
    request.status = Status.RUNNING
    scheduler.running.append(request)


@pytest.mark.parametrize(
    "fault",
    [
        double_release, lost_block, leaked_by_a_request, not_counted, gone_from_the_free_list, hash_of_other_tokens,
        hash_before_it_is_computed, hash_that_leads_elsewhere, hash_that_leads_nowhere, more_computed_than_blocks_hold,
        blocks_while_it_waits, out_of_order, too_many,
    ],
)  # fmt: skip
def test_check_sees(fault: object) -> None:
    scheduler = busy().scheduler
    with pytest.raises(AssertionError):
        fault(scheduler)  # type: ignore[operator]
        scheduler.check()


def test_a_block_released_too_often_is_refused_at_once() -> None:
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.release(table)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(table)
