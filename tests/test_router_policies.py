"""The policies against their definitions, the radix tree against a list of what was sent, the breaker under a clock."""

from __future__ import annotations

import gc
import math
import random
import sys
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ch07_sglang_routing.router import policies, prompt
from ch07_sglang_routing.router.breaker import Breaker
from ch07_sglang_routing.router.http1 import BadMessage, Chunked
from ch07_sglang_routing.router.policies import POLICIES, Ask, CacheAware, PrefillDecode, Worker
from ch07_sglang_routing.router.radix import DEEPEST, NODE, SENT, RadixTree
from common.script import UserError

RANKS = st.floats(0, 1, exclude_max=True)
WORKERS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 300)), min_size=1, max_size=6).map(
    lambda loads: [Worker(f"w{number}", *load) for number, load in enumerate(loads)]
)


def common(a: str | list[int], b: str | list[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ---------------------------------------------------------------- policies


@given(WORKERS, RANKS)
def test_least_in_flight_is_the_minimum(workers: list[Worker], rank: float) -> None:
    chosen = workers[policies.least_in_flight(Ask(rank=rank), workers)]
    assert chosen.in_flight == min(worker.in_flight for worker in workers)


def test_equals_share_and_round_robin_takes_turns() -> None:
    workers = [Worker("a", 1, 0), Worker("b", 0, 0), Worker("c", 0, 0)]
    rng = random.Random(0)
    counts = Counter(policies.least_in_flight(Ask(rank=rng.random()), workers) for _ in range(2000))
    assert counts[0] == 0
    assert abs(counts[1] - counts[2]) < 200
    policy = POLICIES["round_robin"]()
    assert [policy.choose(Ask(), workers) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


@given(WORKERS, RANKS)
def test_power_of_two_compares_two_different_workers(workers: list[Worker], rank: float) -> None:
    chosen = policies.power_of_two(Ask(rank=rank), workers)
    if len(workers) > 1:  # there is another that is not better
        assert any(workers[chosen].in_flight <= other.in_flight for i, other in enumerate(workers) if i != chosen)


def test_power_of_two_draws_every_pair_alike() -> None:
    workers = [Worker(f"w{number}", number, 0) for number in range(4)]
    number = 12_000
    counts = Counter(policies.power_of_two(Ask(rank=(i + 0.5) / number), workers) for i in range(number))
    # of 6 pairs, w0 is the better in 3, w1 in 2, w2 in 1
    assert counts == {0: number / 2, 1: number / 3, 2: number / 6}


def test_a_session_stays_and_only_those_of_a_lost_worker_move() -> None:
    workers = [Worker(f"w{number}", 0, 0) for number in range(5)]
    names = [f"session {number}" for number in range(3000)]
    before = {name: workers[policies.session(Ask(session=name), workers)].name for name in names}
    shares = Counter(before.values())
    assert min(shares.values()) > 500  # of 600
    fewer = workers[:2] + workers[3:]
    after = {name: fewer[policies.session(Ask(session=name), fewer)].name for name in names}
    assert {name for name in names if before[name] != after[name]} == {n for n in names if before[n] == "w2"}


def test_a_session_stays_where_it_is_while_there_is_hardly_any_load() -> None:
    idle = [Worker(f"w{number}", 0, 0) for number in range(8)]
    for name in map(str, range(100)):
        at = policies.session(Ask(session=name), idle)
        busy = [Worker(worker.name, 3 * (index == at), 0) for index, worker in enumerate(idle)]
        assert policies.session(Ask(session=name), busy) == at


@given(WORKERS, RANKS, st.text(max_size=5))
def test_a_bounded_session_never_goes_where_it_is_full(workers: list[Worker], rank: float, name: str) -> None:
    chosen = policies.session(Ask(session=name, rank=rank), workers, load_factor=1.25)
    total = sum(worker.in_flight for worker in workers)
    if name:
        assert workers[chosen].in_flight + 1 <= max(4, math.ceil(1.25 * (total + 1) / len(workers)))
    else:
        assert workers[chosen].in_flight == min(worker.in_flight for worker in workers)
    sticky = policies.session(Ask(session="s"), workers, load_factor=math.inf)
    idle = [Worker(worker.name, 0, 0) for worker in workers]
    assert sticky == policies.session(Ask(session="s"), idle, load_factor=math.inf)


@given(WORKERS, RANKS, st.data())
def test_cache_aware_policies_are_their_formulas(workers: list[Worker], rank: float, data: st.DataObject) -> None:
    tokens = data.draw(st.one_of(st.text(max_size=40), st.lists(st.integers(0, 9), max_size=40)))
    cached = data.draw(st.lists(st.integers(0, len(tokens)), min_size=len(workers), max_size=len(workers)))
    written = data.draw(st.lists(st.integers(0, 3), min_size=len(workers), max_size=len(workers)))
    ask = Ask(tokens, rank=rank)
    longest = policies.longest_prefix(ask, workers, cached, written)
    assert (-cached[longest], workers[longest].in_flight, written[longest]) == min(
        (-has, worker.in_flight, took) for worker, has, took in zip(workers, cached, written, strict=True)
    )
    scale = 4 if isinstance(tokens, str) else 1
    work = [
        ((len(tokens) - has) / scale + worker.pending_tokens + 7 * worker.in_flight, took)
        for worker, has, took in zip(workers, cached, written, strict=True)
    ]
    assert work[policies.least_work(ask, workers, cached, written, request_tokens=7)] == min(work)
    prefill, decode = policies.prefill_and_decode(ask, workers, workers[::-1], cached, written)
    assert workers[::-1][decode].in_flight == min(worker.in_flight for worker in workers)
    first = [(len(tokens) - has) / scale + w.pending_tokens for w, has in zip(workers, cached, strict=True)]
    assert first[prefill] == min(first)


@pytest.mark.parametrize("name", ["prefix", "joint"])
def test_new_prefixes_of_idle_workers_fill_their_caches_evenly(name: str) -> None:
    """Chance would put more into one cache than it holds. A worker that comes later starts level with the others."""
    policy, rng = POLICIES[name](), random.Random(0)
    workers = [Worker(f"w{number}", 0, 0) for number in range(3)]
    some = Counter(policy.choose(Ask([prefix] * 10, rank=rng.random()), workers[:2]) for prefix in range(12))
    assert some == {0: 6, 1: 6}
    more = Counter(policy.choose(Ask([prefix] * 10, rank=rng.random()), workers) for prefix in range(12, 30))
    assert more == {0: 6, 1: 6, 2: 6}


@pytest.mark.parametrize("template", ["\x02user\x03", [1, 2, 3, 4]])
@pytest.mark.parametrize("name", ["prefix", "joint"])
def test_what_every_chat_begins_with_draws_none_of_them(name: str, template: str | list[int]) -> None:
    """A template's few tokens are less than a block, so no engine's cache has them."""
    policy, rng = policies.make(name, tree_size=2**20), random.Random(0)
    idle = [Worker(f"w{number}", 0, 0) for number in range(3)]
    chats = [
        template + (list(rng.choices(range(10, 1000), k=50)) if isinstance(template, list) else f"{rng.random()}" * 10)
        for _ in range(60)
    ]
    counts = Counter(policy.choose(Ask(chat, rank=rng.random()), idle) for chat in chats)
    assert min(counts[index] for index in range(3)) >= 19, counts


def test_policies_are_made_by_name_with_their_sizes() -> None:
    for name in POLICIES:
        policy = policies.make(policies.named(name), tree_size=2**12, keeps=100, request_tokens=0.0)
        assert type(policy) is type(POLICIES[name]())
        if isinstance(policy, CacheAware):
            assert (policy.tree.limit, policy.tree.keeps) == (2**12, 100)
    loads = [Worker("a", 100, 0), Worker("b", 0, 1)]
    assert policy.choose(Ask("x"), loads) == 0  # joint, which counts no requests in flight here
    with pytest.raises(UserError, match="take one of round_robin"):
        policies.named("random")


def test_a_shared_prefix_makes_a_hot_spot_of_prefix_and_none_of_joint() -> None:
    """All requests begin alike, none is ever answered: prefix sends them to one worker, joint spreads them."""
    for name, fullest in (("prefix", 200), ("joint", 60)):
        policy, loads = POLICIES[name](), [0, 0, 0, 0]
        for number in range(200):
            workers = [Worker(f"w{i}", load, 0) for i, load in enumerate(loads)]
            loads[policy.choose(Ask("system prompt " * 100 + str(number), rank=0.5), workers)] += 1
        assert max(loads) >= fullest if name == "prefix" else max(loads) <= fullest, (name, loads)


def test_a_cache_aware_policy_keeps_conversations_together_and_forgets_a_worker() -> None:
    policy = POLICIES["joint"]()
    idle = [Worker(name, 0, 0) for name in ("a", "b", "c")]
    rng = random.Random(1)
    histories = ["".join(rng.choices("abcdefgh ", k=400)) for _ in range(30)]
    first = [policy.choose(Ask(text, rank=rng.random()), idle) for text in histories]
    assert set(first) == {0, 1, 2}
    for text, was in zip(histories, first, strict=True):
        assert policy.choose(Ask(text + " and then", rank=rng.random()), idle) == was
        assert policy.matched == 96  # of 100 tokens, six whole blocks
    policy.forget("a")
    policy.choose(Ask(histories[first.index(0)], rank=0.0), idle)
    assert policy.matched == 0


def test_a_pair_of_prefill_and_decode() -> None:
    pairs = PrefillDecode()
    prefills, decodes = [Worker("p0", 9, 0), Worker("p1", 0, 50)], [Worker("d0", 3, 0), Worker("d1", 2, 0)]
    assert pairs.choose(Ask([1] * 100), prefills, decodes) == (0, 1)  # in flight does not count for prefill
    assert pairs.choose(Ask([1] * 120), [Worker("p0", 0, 19), Worker("p1", 0, 0)], decodes) == (0, 1)
    assert pairs.matched == 96


# ---------------------------------------------------------------- the tree

PROMPTS = st.one_of(st.text("ab", max_size=12), st.lists(st.integers(0, 1), max_size=12))


@given(st.lists(st.tuples(st.sampled_from("xyz"), PROMPTS, st.booleans()), max_size=40), PROMPTS)
@settings(max_examples=300)
def test_the_tree_is_a_list_of_all_that_was_sent(steps: list, asked: str | list[int]) -> None:
    tree, sent = RadixTree(10**6), []
    for worker, tokens, removed in steps:
        if removed and len(sent) % 5 == 4:
            tree.remove(worker)
            sent = [(name, known) for name, known in sent if name != worker]
        else:
            tree.insert(tokens, worker)
            sent.append((worker, tokens))
    wanted: dict[str, int] = {}
    for worker, tokens in sent:
        if type(tokens) is type(asked) and (length := common(tokens, asked)):
            wanted[worker] = max(length, wanted.get(worker, 0))
    assert tree.match(asked) == wanted


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.text("ab", max_size=30)), max_size=60), st.integers(40, 400))
def test_a_small_tree_stays_small_and_never_claims_too_much(sent: list[tuple[str, str]], limit: int) -> None:
    tree = RadixTree(limit)
    for at, (worker, tokens) in enumerate(sent):
        tree.insert(tokens, worker)
        assert tree.size <= limit
        nodes = list(tree._recent)
        assert tree.size == sum(len(node.label) + NODE + SENT * len(node.sent) for node in nodes)
        for name, length in tree.match(tokens).items():
            longest = max(common(tokens, known) for other, known in sent[: at + 1] if other == name)
            assert length <= longest
        for place, node in enumerate(nodes):  # the first to go is a leaf: children stand before their parents
            assert all(nodes.index(child) < place for child in node.children.values())
            assert set(node.sent) <= set(node.parent.sent) or node.parent.parent is None


def test_a_chain_of_prompts_costs_no_step_for_each_character() -> None:
    tree = RadixTree(2**20)
    for length in range(1, 2000):
        tree.insert("a" * length, "w")
    assert tree.match("a" * 2000) == {"w": DEEPEST}
    assert len(tree) == DEEPEST


def test_workers_of_a_node_are_charged() -> None:
    tree = RadixTree(2**16)
    for number in range(100):
        tree.insert("shared", f"w{number}")
    assert tree.size == len("shared") + NODE + 100 * SENT
    for number in range(99):
        tree.remove(f"w{number}")
    tree.insert("shared", "w99")
    assert tree.size == len("shared") + NODE + SENT


def test_the_least_recently_sent_goes_first() -> None:
    tree = RadixTree(4 * (10 + NODE + SENT))
    for letter in "abcd":
        tree.insert(letter * 10, "w")
    tree.insert("a" * 10, "w")
    tree.insert("e" * 10, "w")
    assert [letter for letter in "abcde" if tree.match(letter * 10)] == ["a", "c", "d", "e"]


def test_what_a_workers_cache_has_overwritten_does_not_match() -> None:
    tree = RadixTree(10**6, keeps=100)
    tree.insert("a" * 60, "w")
    tree.insert("b" * 60, "v")  # another worker's cache
    tree.insert("c" * 90, "w")
    assert tree.match("a" * 60) == {"w": 60}
    tree.insert("a" * 60, "w")  # used again
    tree.insert("d" * 90, "w")
    assert tree.match("a" * 60) == {"w": 60}
    assert tree.match("c" * 90) == {"w": 90}
    tree.insert("e" * 20, "w")
    assert tree.match("c" * 90) == tree.match("a" * 60) == {}
    assert tree.match("b" * 60) == {"v": 60}


def test_a_worker_that_comes_and_goes_leaves_nothing() -> None:
    tree = RadixTree()
    for _ in range(1000):
        tree.insert("shared prompt", "w")
        assert tree.match("shared prompt") == {"w": 13}
        tree.remove("w")
        assert tree.match("shared prompt") == {}
    tree.insert("shared prompt", "v")
    (node,) = tree._recent
    assert len(node.sent) == 1


def test_memory_is_flat_over_a_million_unique_prompts() -> None:
    policy = CacheAware(policies.least_work, RadixTree(2**16))
    workers = [Worker(f"w{number}", 0, 0) for number in range(4)]
    rng = random.Random(0)

    def blocks() -> int:
        gc.collect()
        return sys.getallocatedblocks()

    for _ in range(20_000):  # ten times what it holds
        policy.choose(Ask(f"{rng.getrandbits(64):016x} and what of it?", rank=rng.random()), workers)
    full = blocks()
    for number in range(980_000):
        policy.tree.insert(f"{rng.getrandbits(64):016x} and what of it?", workers[number & 3].name)
    assert blocks() < 1.1 * full
    assert policy.tree.size <= 2**16
    assert len(policy.tree) <= 2**16 // NODE


# ---------------------------------------------------------------- the breaker


def test_the_breakers_states_under_a_clock() -> None:
    clock = [0.0]
    breaker = Breaker(lambda: clock[0], threshold=3, base_s=8, cap_s=20, rng=random.Random(0))
    old = breaker.begin()
    for _ in range(2):
        breaker.failed(breaker.begin())
    breaker.succeeded(breaker.begin())  # not in a row
    for _ in range(2):
        breaker.failed(breaker.begin())
    assert breaker.state == "closed"
    breaker.failed(breaker.begin())
    opened = []
    for longest_s in (8, 16, 20, 20):
        assert (breaker.state, breaker.allows()) == ("open", False)
        opened.append(breaker._until - clock[0])
        assert longest_s / 2 <= opened[-1] <= longest_s
        breaker.failed(old)  # one that was sent before does not make it longer
        clock[0] += opened[-1]
        assert (breaker.state, breaker.allows()) == ("half-open", True)
        trial = breaker.begin()
        breaker.failed(old)  # nor are verdicts of before the trial's
        breaker.succeeded(old)
        breaker.given_up(old)
        assert (breaker.state, breaker.allows()) == ("open", False)  # one at a time
        breaker.given_up(trial)  # its client left: no verdict
        assert breaker.allows()
        breaker.failed(breaker.begin())
    clock[0] += 20
    breaker.succeeded(breaker.begin())
    assert (breaker.state, breaker.allows(), breaker.failures) == ("closed", True, 0)
    for _ in range(3):
        breaker.failed(breaker.begin())
    assert breaker._until - clock[0] <= 8  # it begins again


# ---------------------------------------------------------------- bytes


@given(st.lists(st.binary(min_size=1, max_size=20), max_size=5), st.data())
def test_a_chunked_body_in_any_pieces(chunks: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    follow, at = Chunked(keep=True), 0
    while at < len(whole):
        assert not follow.done
        step = data.draw(st.integers(1, len(whole) - at))
        assert follow.feed(whole[at : at + step]) == step
        at += step
    assert follow.done
    assert bytes(follow.body) == b"".join(chunks)
    assert Chunked().feed(whole + b"POST") == len(whole)


def test_prompts_are_found_in_any_body_and_nothing_else_is_asked_of_it() -> None:
    chat = {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text"}]}]}
    longer = {"messages": [*chat["messages"], {"role": "assistant", "content": "x"}]}
    assert prompt._prompt(longer).startswith(prompt._prompt(chat))
    for body, found in (
        ({"prompt": "text"}, "text"), ({"prompt": [1, 2]}, [1, 2]), ({"prompt": ["a", "b"]}, "ab"),
        ({"prompt": [[1], [2, 3]]}, [1, 2, 3]), ({"text": "sglang"}, "sglang"), ({"input_ids": [5]}, [5]),
        ({"prompt": {"x": 1}}, ""), ({"prompt": [1, -2]}, ""), ({"prompt": [2**70]}, ""), ({"messages": 3}, ""),
        ({"messages": [1, None]}, ""), ({}, ""),
    ):  # fmt: skip
        assert prompt._prompt(body) == found
        POLICIES["joint"]().choose(Ask(found), [Worker("w", 0, 0)])
    for body in (b"", b"[1]", b"{", b"[" * 100_000, b"\xff", b'{"prompt": ' + b"9" * 5000 + b"}"):
        assert prompt.parsed(body) == {}


def test_fields_are_put_at_the_end_of_an_object() -> None:
    assert prompt.with_fields(b'{"a": 1} \n', {"b": 2}) == b'{"a": 1,"b": 2}'
    assert prompt.with_fields(b"{ }", {"b": 2}) == b'{ "b": 2}'
    for body in (b"", b"[]", b'{"a": 1} x'):
        with pytest.raises(BadMessage):
            prompt.with_fields(body, {"b": 2})
