"""A worker on a queue: prompts from a Redis list, answers from an engine; whoever is killed, each is answered once.

You learn   why work is moved and not popped, what a lease is for, and what a worker does when it is told to stop
Laptop      redis-server & python -m ch08_kubernetes.autoscaling.queue_worker --redis redis://localhost:6379 \\
                --list prompts --engine http://localhost:8000 --idle-exit 5
Cluster     kubectl apply -f ch08_kubernetes/autoscaling/keda-redis.yaml           (password: env REDIS_PASSWORD)
You see     requests answered, given back and given up, as RESULT

A request is JSON: {"id": ..., "prompt": ..., "max_tokens": ...}. For a list named L, in one Redis:

    L               waiting requests, taken from the right; LLEN of it is what KEDA scales on
    L:taken:WORKER  what a worker is at: BLMOVE brings it there in one step, so it is always in one of the lists
    L:lease:WORKER  lives LEASE_S, renewed by a heartbeat; when it is gone, others give the worker's request back
    L:tries         hash, how often a request was taken; more than MAX_TRIES and it goes to L:dead
    L:results       hash, the answer by id: written in one transaction with the removal from L:taken, and only once

An engine may be asked twice for the same request (its worker died after the answer came); the result is there once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from urllib.parse import urlsplit

import redis

from ch08_kubernetes.cluster.rest import Json
from common import script

LEASE_S, MAX_TRIES, POLL_S = 15.0, 3, 0.5

# Each of these is one step for all others: Redis runs a script whole.
# KEYS list, taken, lease, workers; ARGV worker. Gives a worker's requests back, unless it lives; how many.
GIVE_BACK = """
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
local count = 0
while redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'RIGHT') do count = count + 1 end
redis.call('SREM', KEYS[4], ARGV[1])
return count
"""
# KEYS taken, results, tries; ARGV request, id, result. 1 if the result was written, 0 if there was one already, or if
# the request is no longer this worker's: its lease ran out, and another one has it.
DONE = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[3], ARGV[2])
return redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
"""
# KEYS taken, to; ARGV request. Moves it on; 0 if it is no longer this worker's.
MOVE = """
if redis.call('LREM', KEYS[1], 1, ARGV[1]) == 0 then return 0 end
redis.call(ARGV[2], KEYS[2], ARGV[1])
return 1
"""


class EngineAway(Exception):
    """No answer, or one that is no fault of the request."""


class BadRequest(Exception):
    """The request itself cannot be answered, however often one tries."""


class Queue:
    """A worker's view of one list.

    Raises (all methods):
        redis.RedisError: see `as_user_error`.
    """

    def __init__(self, connection: redis.Redis, name: str, worker: str, lease_s: float = LEASE_S) -> None:
        self.redis, self.name, self.worker, self.lease_s = connection, name, worker, lease_s
        self.taken, self.lease, self.workers = self._of("taken", worker), self._of("lease", worker), self._of("workers")
        self.tries, self.results, self.dead = self._of("tries"), self._of("results"), self._of("dead")

    def _of(self, *parts: str) -> str:
        return ":".join([self.name, *parts])

    def beat(self) -> None:
        """The worker lives: in this order, so that a lease never lacks its entry."""
        self.redis.sadd(self.workers, self.worker)
        self.redis.set(self.lease, "", px=int(self.lease_s * 1000))

    def length(self) -> int:
        return int(self.redis.llen(self.name))  # type: ignore[arg-type]

    def take(self, timeout_s: float) -> str | None:
        """The next request, now on this worker's own list; None if there is none for so long."""
        found = self.redis.blmove(self.name, self.taken, timeout_s, "RIGHT", "LEFT")  # type: ignore[arg-type]
        return None if found is None else str(found)

    def done(self, request: str, key: str, result: str) -> bool:
        return self.redis.eval(DONE, 3, self.taken, self.results, self.tries, request, key, result) == 1

    def give_back(self, request: str) -> None:
        """To the end from which the next one is taken: it has waited longest."""
        self.redis.eval(MOVE, 2, self.taken, self.name, request, "RPUSH")

    def bury(self, request: str, why: str) -> None:
        """To the dead letters, with the reason in a hash beside."""
        if self.redis.eval(MOVE, 2, self.taken, self.dead, request, "LPUSH"):
            self.redis.hset(self._of("reasons"), request, why)

    def reclaim(self) -> int:
        """Give back what workers hold that no longer renew their lease; how many requests."""
        count = 0
        for other in self.redis.smembers(self.workers):  # type: ignore[union-attr]
            keys = (self.name, self._of("taken", other), self._of("lease", other), self.workers)
            count += int(self.redis.eval(GIVE_BACK, 4, *keys, other))  # type: ignore[arg-type]
        return count

    def leave(self) -> None:
        """Nothing is left of this worker; what it may still hold is given back."""
        self.redis.delete(self.lease)
        self.redis.eval(GIVE_BACK, 4, self.name, self.taken, self.lease, self.workers, self.worker)


def parsed(request: str) -> tuple[str, Json]:
    """Its id, and what to ask the engine.

    Raises:
        BadRequest: it is no JSON object with an id and a prompt.
    """
    try:
        body = json.loads(request)
        key, prompt = body.pop("id"), body["prompt"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRequest(f"no JSON object with id and prompt ({error})") from None
    if not isinstance(key, str) or not isinstance(prompt, str):
        raise BadRequest("id and prompt must be strings")
    return key, body


def ask(engine: str, model: str, body: Json, timeout_s: float) -> str:
    """The answer's text.

    Raises:
        BadRequest: the engine refuses it (4xx, except 408 and 429).
        EngineAway: no answer, or 5xx.
    """
    data = json.dumps({"model": model, **body}).encode()
    request = urllib.request.Request(f"{engine}/v1/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return str(json.load(answer)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")[:200]
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise BadRequest(f"the engine refuses it ({error.code}): {said}") from None
        raise EngineAway(f"the engine says {error.code}: {said}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EngineAway(f"the engine gives no answer ({error})") from None


def work(queue: Queue, engine: str, model: str, stop: threading.Event, args: argparse.Namespace) -> Counter[str]:
    """Take, ask, write; until told to stop, or idle for so long, or one is done with --once."""
    count: Counter[str] = Counter()
    idle_since = time.monotonic()
    # Not before a lease: what a dead worker holds can be had only then, and for an empty list nobody else is started.
    patience_s = None if args.idle_exit is None else max(args.idle_exit, queue.lease_s + POLL_S)
    while not stop.is_set():
        count["reclaimed"] += queue.reclaim()
        request = queue.take(POLL_S)
        if request is None:
            if patience_s is not None and time.monotonic() - idle_since >= patience_s:
                break
            continue
        try:
            key, body = parsed(request)
            tries = int(queue.redis.hincrby(queue.tries, key, 1))  # type: ignore[arg-type]
            if tries > args.max_tries:
                raise BadRequest(f"taken {args.max_tries} times and never answered: its workers died, or the engine")
            text = ask(engine, model, body, args.request_timeout_s)
            count["answered"] += queue.done(request, key, json.dumps({"text": text, "worker": queue.worker}))
        except BadRequest as error:
            queue.bury(request, str(error))
            count["dead"] += 1
        except EngineAway as error:
            queue.give_back(request)
            queue.redis.hincrby(queue.tries, key, -1)  # not the request's fault
            count["given_back"] += 1
            print(f"given back: {error}", flush=True)
            stop.wait(POLL_S)
        idle_since = time.monotonic()
        if args.once:
            break
    return count


def heartbeat(queue: Queue, over: threading.Event) -> None:
    """Renew the lease until it is over. While Redis is away it cannot be renewed: then others may take the work."""
    while not over.wait(queue.lease_s / 3):
        try:
            queue.beat()
        except redis.RedisError:
            continue


def connect(url: str) -> redis.Redis:
    """
    Raises:
        UserError: no such URL, nobody there, or the password is wrong; before any work is taken.
    """
    try:
        made = redis.Redis.from_url(
            url, password=os.environ.get("REDIS_PASSWORD") or urlsplit(url).password, decode_responses=True,
            socket_connect_timeout=5, health_check_interval=10,
        )  # fmt: skip
        made.ping()
    except ValueError as error:
        raise script.UserError(f"--redis {url}: {error}; it is redis://HOST:PORT") from None
    except redis.RedisError as error:
        raise as_user_error(error, url) from None
    return made


def as_user_error(error: redis.RedisError, url: str) -> script.UserError:
    shown = urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2]).geturl()  # without its password
    if isinstance(error, redis.AuthenticationError):
        return script.UserError(f"Redis at {shown} refuses the password; set REDIS_PASSWORD to the right one")
    return script.UserError(f"Redis at {shown} does not answer ({error}); see whether it runs, and --redis")


def model_of(engine: str) -> str:
    """
    Raises:
        UserError: no engine answers there.
    """
    try:
        with urllib.request.urlopen(f"{engine}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise script.UserError(f"no engine answers at {engine} ({error}); start one, or correct --engine") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = script.parser(__doc__)
    parser.add_argument("--redis", required=True, metavar="URL", help="redis://HOST:PORT; password by REDIS_PASSWORD")
    parser.add_argument("--list", required=True, metavar="NAME", help="of waiting requests")
    parser.add_argument("--engine", required=True, metavar="URL", help="an OpenAI-compatible server")
    parser.add_argument("--once", action="store_true", help="end after one request")
    parser.add_argument(
        "--idle-exit", type=script.positive, metavar="SECONDS", help="end after so long without work, and a lease"
    )
    parser.add_argument("--lease-s", type=script.positive, default=LEASE_S, help="without a heartbeat: dead")
    parser.add_argument("--max-tries", type=script.at_least(1), default=MAX_TRIES, help="then it is a dead letter")
    parser.add_argument("--request-timeout-s", type=script.positive, default=100, help="below the pod's grace period")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Json:
    args = parse_args(argv)
    script.start(__file__, args)
    stop, over = threading.Event(), threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # the request at hand is finished, no other is taken
        signal.signal(number, lambda *_: stop.set())
    connection, model = connect(args.redis), model_of(args.engine)
    queue = Queue(connection, args.list, f"{os.uname().nodename}-{uuid.uuid4().hex[:8]}", args.lease_s)
    beating = threading.Thread(target=heartbeat, args=(queue, over))
    try:
        queue.beat()
        beating.start()
        print(f"worker {queue.worker} waits for requests", flush=True)
        count = work(queue, args.engine, model, stop, args)
        over.set()
        beating.join()
        queue.leave()
        left = queue.length()
    except redis.RedisError as error:
        raise as_user_error(error, args.redis) from None
    finally:
        over.set()
    names = ("answered", "given_back", "reclaimed", "dead")
    return {name: count[name] for name in names} | {"queue_length": left, "told_to_stop": stop.is_set()}


if __name__ == "__main__":
    script.run(main)
