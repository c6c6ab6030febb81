"""Blocks of a KV cache that another engine computed: found like one's own, and never at the cost of what is in use."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ch06_vllm.engine import Config, SamplingParams
from ch06_vllm.engine.block_pool import BlockPool, block_hash
from ch06_vllm.engine.engine import Engine
from ch07_sglang_routing import kv_handover
from tests.tiny_models import CONTEXT, build

SIZE = 4


@pytest.fixture(scope="module")
def new_engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Engine]:
    folder = build(tmp_path_factory.mktemp("models"), "qwen3")

    def make(**options: object) -> Engine:
        return Engine(Config(str(folder), **{"device": "cpu", "block_size": SIZE, "num_blocks": 60} | options))

    return make


@pytest.fixture
def connection() -> Iterator[Callable[[], tuple[tuple[str, int], Callable]]]:
    """A place to send to, and what came there."""
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(30)
        received = pool.submit(kv_handover.receive, server)
        yield server.getsockname(), received.result


def answered(engine: Engine, tokens: list[int], output: int = 12) -> tuple[list[int], int]:
    engine.add(tokens, SamplingParams.exactly(output))
    found: list[int] = []
    while engine.has_work:
        for step in engine.step():
            found += step.token_ids
            cached = step.cached_tokens
    engine.scheduler.check()
    return found, cached


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(1, 331), k=length)


@pytest.mark.parametrize("length", [SIZE, 3 * SIZE + 1, 37, 64])
def test_the_receiver_answers_as_if_it_had_computed_all(
    new_engine: Callable[..., Engine], connection: tuple, length: int
) -> None:
    sender, receiver, alone = new_engine(), new_engine(num_blocks=33), new_engine()
    answered(receiver, prompt(9, 40))  # its own cache is not empty, and its blocks have other numbers
    tokens = prompt(length, length)
    expected, cached = answered(alone, tokens)
    assert cached == 0
    answered(sender, tokens)
    address, received = connection
    names, data = kv_handover.take_out(sender, tokens)
    assert len(names) == length // SIZE
    sent = kv_handover.send(address, names, data)
    assert sent == len(names) * SIZE * sender.runner.model.cache_bytes_a_token
    assert kv_handover.put_in(receiver, *received()) == len(names)
    receiver.scheduler.check()
    assert answered(receiver, tokens) == (expected, (length - 1) // SIZE * SIZE)


def test_wrong_keys_would_be_seen(new_engine: Callable[..., Engine]) -> None:
    """What the test above rests on: an answer depends on the blocks that were handed over."""
    sender, receiver = new_engine(), new_engine()
    tokens = prompt(1, 60)
    expected, _ = answered(sender, tokens)
    names, data = kv_handover.take_out(sender, tokens)
    kv_handover.put_in(receiver, names, data.flip(0))
    assert answered(receiver, tokens)[0] != expected


def test_blocks_of_another_shape_or_type_are_refused(new_engine: Callable[..., Engine]) -> None:
    sender, other = new_engine(), new_engine(block_size=8)
    tokens = prompt(2, 32)
    answered(sender, tokens)
    names, data = kv_handover.take_out(sender, tokens)
    for engine, wrong in ((other, data), (new_engine(), data.double()), (new_engine(), data[1:])):
        with pytest.raises(ValueError, match="take equal settings"):
            kv_handover.put_in(engine, names, wrong)
        engine.scheduler.check()
        assert not engine.pool.cached


def test_a_sender_that_leaves_half_way_is_told(connection: tuple) -> None:
    address, received = connection
    head = {"shape": [2, 1, 2, 4, 1, 8], "dtype": "float32", "hash_bytes": 32}
    with socket.create_connection(address, timeout=30) as out:
        out.sendall(json.dumps(head).encode() + b"\n" + bytes(64 + 100))
    with pytest.raises(EOFError, match="100 of 512 bytes"):
        received()


def test_taking_in_needs_no_running_engine_to_stop(new_engine: Callable[..., Engine]) -> None:
    """While others run, and with hardly a free block: they are not disturbed, and what fits is a prefix."""
    sender, receiver = new_engine(), new_engine(num_blocks=CONTEXT // SIZE + 1)
    tokens = prompt(3, 40)
    answered(sender, tokens)
    names, data = kv_handover.take_out(sender, tokens)
    running, expected = prompt(4, 60), answered(new_engine(), prompt(4, 60))[0]
    receiver.add(running, SamplingParams.exactly(12))
    found = receiver.step()[0].token_ids
    free = receiver.pool.num_free
    assert kv_handover.put_in(receiver, names, data) == free < len(names)
    assert receiver.pool.match(names) == receiver.pool.match(names[:free])
    receiver.scheduler.check()
    while receiver.has_work:
        found += [token for step in receiver.step() for token in step.token_ids]
    assert found == expected


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_taking_in_and_using_keeps_the_books(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(12, 2)
    texts = [[rng.choice([0, 1]) for _ in range(2 * rng.randint(1, 7))] for _ in range(4)]
    tables: list[list[int]] = []
    for _ in range(200):
        names: list[bytes] = []
        text = rng.choice(texts)
        for at in range(0, len(text), 2):
            names.append(block_hash(names[-1] if names else b"", text[at : at + 2]))
        what = rng.randrange(3)
        if what == 0:
            before, held = pool.match(names), sum(map(bool, pool.references))
            places = pool.take_in(names)
            assert pool.match(names)[: len(before)] == before  # what was known stays where it was
            assert set(places.values()).isdisjoint(block for table in tables for block in table)
            assert all(pool.cached[names[index]] == block for index, block in places.items())
            assert sum(map(bool, pool.references)) == held
            assert len(pool.match(names)) >= min(len(names), len(before) + len(places))
        elif what == 1 and pool.num_free:
            found = pool.match(names)
            pool.share(found)
            tables.append(found + pool.allocate(min(rng.randint(0, 2), pool.num_free)))
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)


def test_what_was_handed_over_is_not_computed_again(new_engine: Callable[..., Engine]) -> None:
    one, other = new_engine(), new_engine()
    text = prompt(5, 50)
    expected = answered(one, text)
    kv_handover.put_in(other, *kv_handover.take_out(one, text))
    assert answered(other, text) == (expected[0], 48)
    assert other.scheduler.prefix_queries - other.scheduler.prefix_hits == 2


def test_hashes_are_those_that_the_scheduler_makes(new_engine: Callable[..., Engine]) -> None:
    engine, tokens = new_engine(), prompt(7, 41)
    answered(engine, tokens, 1)
    assert kv_handover.hashes(tokens, SIZE) == list(engine.pool.cached)
    names, data = kv_handover.take_out(engine, tokens)
    assert data.shape[0] == len(names) == 10
    assert data.dtype == torch.float32


def test_take_out_of_nothing_is_empty(new_engine: Callable[..., Engine]) -> None:
    names, data = kv_handover.take_out(new_engine(), prompt(8, 30))
    assert names == []
    assert kv_handover.put_in(new_engine(), names, data) == 0
