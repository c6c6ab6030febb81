"""Which worker gets a request: small pure functions, each with its formula, its units and how it fails above it.

A function is given the request (`Ask`), the workers, and what it knows of their caches, and returns the index of one of
the workers. It keeps nothing and draws nothing: chance comes in as `ask.rank`, so that two policies can be compared on
the same luck. The few that must remember something do so in the classes at the end, which POLICIES lists by name.

Loads are the router's own counts. Engines' gauges lag by seconds, in which a router sends hundreds of requests.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ch07_sglang_routing.router.radix import RadixTree, Tokens
from common.script import UserError

CHARACTERS_PER_TOKEN = 4  # of a prompt that comes as text; English and code have 3 to 4.5
BLOCK = 16  # tokens: what engines cache whole or not at all
SESSION_LEAST = 4  # requests in flight that a session never makes way for


@dataclass(frozen=True, slots=True)
class Worker:
    """What a policy is told of a worker. Anything with these attributes will do: the router passes its own objects."""

    name: str
    in_flight: int  # requests sent and not yet answered to the end
    pending_tokens: int  # prompt tokens sent that were not thought to be cached, whose first token has not come


@dataclass(frozen=True, slots=True)
class Ask:
    """A request. tokens: its prompt, text or token ids. session: who asks, "" if unknown. rank: uniform in [0, 1)."""

    tokens: Tokens = ""
    session: str = ""
    rank: float = 0.0


def prompt_tokens(items: int, tokens: Tokens) -> float:
    """How many tokens so many items of this prompt are: itself, or for text a quarter of its characters."""
    return items / CHARACTERS_PER_TOKEN if isinstance(tokens, str) else items


def lowest(scores: Sequence[Any], rank: float) -> int:
    """The index of the lowest score, a number or a tuple of them; of equal ones, the one that `rank` falls on.

    Without chance among equals, several routers that start together all begin with the same worker.
    """
    best = min(scores)
    equal = [index for index, score in enumerate(scores) if score == best]
    return equal[int(rank * len(equal))]


# Each in turn:  index = turn mod N.
# Fails  where requests differ much in length (one worker gets the long ones by chance), where workers differ in speed
#        (the slow one's queue grows), and it spreads a shared prefix over all caches: N misses for each.
def round_robin(turn: int, workers: Sequence[Worker]) -> int:
    return turn % len(workers)


# The fewest requests in flight:  argmin in_flight.
# Fails  by counting a prompt of 10 tokens like one of 10,000; blind to caches; a worker that refuses quickly looks
#        idle and draws all requests (the breaker must take it out); several routers that do not know of each other's
#        requests all choose the same worker.
def least_in_flight(ask: Ask, workers: Sequence[Worker]) -> int:
    return lowest([worker.in_flight for worker in workers], ask.rank)


# Power of two choices (Mitzenmacher 2001): of two workers at random, the one with fewer in flight. The longest queue
# grows as log log N instead of log N / log log N, and routers with old counts do not all rush to one worker.
# Fails  like the one above, by a constant more; with two workers it is the one above.
def power_of_two(ask: Ask, workers: Sequence[Worker]) -> int:
    number = len(workers)
    if number == 1:
        return 0
    first, second = divmod(int(ask.rank * number * (number - 1)), number - 1)  # one of the ordered pairs
    second += second >= first
    return second if workers[second].in_flight < workers[first].in_flight else first


# A session stays with one worker: rendezvous hashing (Thaler and Ravishankar 1998), argmax hash(session, worker). When
# a worker comes or goes, only its own 1/N of the sessions move. With bounded loads (Mirrokni et al. 2018): the best by
# hash that has fewer than  ceil(load_factor x (all in flight + 1) / N)  requests in flight.
# Units  load_factor: times the average load. Infinite: strictly sticky. 1: as even as can be. The bound is never below
#        SESSION_LEAST: with hardly any load it would be 1, and a session's second request would leave its cache.
# Fails  where a prefix is shared across sessions (a system prompt is computed on every worker); where load is low, up
#        to SESSION_LEAST requests share a worker beside idle ones; a session's cache is
#        left behind each time the bound moves it. A request without a session goes to the fewest in flight.
def session(ask: Ask, workers: Sequence[Worker], load_factor: float = 1.25) -> int:
    if not ask.session:
        return least_in_flight(ask, workers)
    most = math.inf
    if math.isfinite(load_factor):
        average = (sum(worker.in_flight for worker in workers) + 1) / len(workers)
        most = max(SESSION_LEAST, math.ceil(load_factor * average))
    own = _hash(ask.session)
    free = [index for index, worker in enumerate(workers) if worker.in_flight < most]  # never empty: not all can be
    return max(free, key=lambda index: _mixed(own ^ _hash(workers[index].name)))  # above the average


@functools.lru_cache(maxsize=4096)
def _hash(name: str) -> int:
    """64 bits. Python's own hash differs from process to process: two routers would not agree."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mixed(value: int) -> int:
    """Every bit of the result hangs on every bit of the value: two rounds of multiply and shift, as in splitmix64."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return value ^ value >> 31


# The longest prefix in a worker's cache:  argmax cached, then argmin in_flight, then argmin written.
# Units  cached[i]: items of this prompt that worker i is thought to have, in whole blocks: what all chats begin with, a
#        template's few tokens, is no reason to go anywhere. written[i]: items that its cache had to take
#        in so far. Between equal workers the one that took in least: chance would give one of two caches more prefixes
#        than it holds, while the other has room.
# Fails  by hot spots: all that share a system prompt go to the one worker that saw it first, however long its queue;
#        a match of one character outweighs any load.
def longest_prefix(ask: Ask, workers: Sequence[Worker], cached: Sequence[int], written: Sequence[int]) -> int:
    scores = [
        (-has, worker.in_flight, took) for worker, has, took in zip(workers, cached, written, strict=True)
    ]  # fmt: skip
    return lowest(scores, ask.rank)


# Cache and load in one unit, tokens of prefill (divide by the prefill rate for seconds): the least work ahead,
#        uncached + pending + request_tokens x in_flight,  then argmin written
# uncached  prompt tokens of this request that the worker has to compute;
# pending   those of the requests in front of it;
# request_tokens  what a running request costs this one, in prefill tokens: half of a typical answer's length x
#           (time that one more sequence adds to a decode step / time of one prefill token). About 64 for 128 tokens.
# No hot spot: a prefix of L tokens is worth waiting for at most L / request_tokens requests. After that another worker
# computes it too, and from then on both have it.
# Fails  where request_tokens is far off: at 0 prefix affinity wins over any number of decoding requests, at infinity it
#        is least_in_flight. Blind to the length of the answer, which nobody knows. With several routers each knows only
#        what it sent itself. An answer that is not streamed shows no first token: its prompt counts as pending to the
#        end. A request that failed there leaves its prompt in the tree: the next of that prefix may find no cache.
def least_work(
    ask: Ask, workers: Sequence[Worker], cached: Sequence[int], written: Sequence[int], request_tokens: float = 64.0
) -> int:
    length = len(ask.tokens)
    scores = [
        (prompt_tokens(length - has, ask.tokens) + worker.pending_tokens + request_tokens * worker.in_flight, took)
        for worker, has, took in zip(workers, cached, written, strict=True)
    ]
    return lowest(scores, ask.rank)


# Prefill and decode on different workers: the prompt goes where least of it is left to compute, and decoding to the
# worker with the fewest sequences:  argmin (uncached + pending),  argmin in_flight.
# A prefill worker's requests in flight are only those whose prompt it computes: `pending` has them already.
# Fails  with few workers: one role idles while the other queues; and by the KV cache's way between the two, which no
#        score here knows (put the pairs that share a fast link behind one router).
def prefill_and_decode(
    ask: Ask, prefills: Sequence[Worker], decodes: Sequence[Worker], cached: Sequence[int], written: Sequence[int]
) -> tuple[int, int]:
    return least_work(ask, prefills, cached, written, request_tokens=0.0), least_in_flight(ask, decodes)


class Policy(Protocol):
    """A policy by name: what POLICIES makes.

    matched: tokens of the last request that the chosen worker was thought to have; the others count as pending.
    """

    matched: float

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> int:
        """The index of one of `workers`, of which there is at least one; it is taken as sent there."""

    def forget(self, worker: str) -> None:
        """A worker is no more, or has lost its cache."""


class Stateless:
    """A policy that is one of the functions above and nothing else."""

    matched = 0.0

    def __init__(self, function: Callable[[Ask, Sequence[Worker]], int]) -> None:
        self.choose = function

    def forget(self, worker: str) -> None:
        pass


class RoundRobin:
    matched = 0.0

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> int:
        self._turn += 1
        return round_robin(self._turn, workers)

    def forget(self, worker: str) -> None:
        pass


def _known(tree: RadixTree, tokens: Tokens, workers: Sequence[Worker]) -> tuple[list[int], list[int]]:
    """`cached`, in whole blocks, and `written` of each worker."""
    found = tree.match(tokens)
    block = BLOCK * CHARACTERS_PER_TOKEN if isinstance(tokens, str) else BLOCK
    cached = [found.get(worker.name, 0) // block * block for worker in workers]
    return cached, [tree.written(worker.name) for worker in workers]


class CacheAware:
    """A policy that looks a prompt up in the tree of what was sent, and notes where it sends this one."""

    def __init__(
        self,
        function: Callable[[Ask, Sequence[Worker], Sequence[int], Sequence[int]], int],
        tree: RadixTree | None = None,
    ) -> None:
        self.tree = RadixTree() if tree is None else tree
        self.matched = 0.0
        self._function = function

    def choose(self, ask: Ask, workers: Sequence[Worker]) -> int:
        cached, written = _known(self.tree, ask.tokens, workers)
        index = self._function(ask, workers, cached, written)
        self.tree.insert(ask.tokens, workers[index].name)
        self.matched = prompt_tokens(cached[index], ask.tokens)
        return index

    def forget(self, worker: str) -> None:
        self.tree.remove(worker)


class PrefillDecode:
    """The pair for one request; the tree knows the prefill workers' caches."""

    def __init__(self, tree: RadixTree | None = None) -> None:
        self.tree = RadixTree() if tree is None else tree
        self.matched = 0.0

    def choose(self, ask: Ask, prefills: Sequence[Worker], decodes: Sequence[Worker]) -> tuple[int, int]:
        cached, written = _known(self.tree, ask.tokens, prefills)
        prefill, decode = prefill_and_decode(ask, prefills, decodes, cached, written)
        self.tree.insert(ask.tokens, prefills[prefill].name)
        self.matched = prompt_tokens(cached[prefill], ask.tokens)
        return prefill, decode

    def forget(self, worker: str) -> None:
        self.tree.remove(worker)


# By name, as --policy takes it.
POLICIES: dict[str, Callable[[], Policy]] = {
    "round_robin": RoundRobin,
    "least_in_flight": lambda: Stateless(least_in_flight),
    "power_of_two": lambda: Stateless(power_of_two),
    "session": lambda: Stateless(session),
    "prefix": lambda: CacheAware(longest_prefix),
    "joint": lambda: CacheAware(least_work),
}


def make(name: str, *, tree_size: int = 2**22, keeps: int | None = None, request_tokens: float = 64.0) -> Policy:
    """A policy of POLICIES. tree_size and keeps: as of RadixTree. request_tokens: as of least_work."""
    if name == "prefix":
        return CacheAware(longest_prefix, RadixTree(tree_size, keeps))
    if name == "joint":
        function = functools.partial(least_work, request_tokens=request_tokens)
        return CacheAware(function, RadixTree(tree_size, keeps))
    return POLICIES[name]()


def named(text: str) -> str:
    """argparse type: a name of POLICIES."""
    if text not in POLICIES:
        raise UserError(f"{text!r} is no policy; take one of {', '.join(POLICIES)}")
    return text
