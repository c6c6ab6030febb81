"""Which worker probably has which prefix in its KV cache: a radix tree of the prompts that were sent, bounded.

A radix tree holds each shared beginning once: a node is a piece of prompt (`label`), its children are the ways in
which known prompts go on. Every node knows which workers were sent a prompt that runs through it. Sending is all that a
router sees: what an engine has thrown out since, it guesses by age (`keeps`).

Cost       insert and match: O(length of the prompt) to compare, slice by slice in C, and some Python for each node on
           its way, of which at most DEEPEST are looked at; remove: O(1).
Memory     at most `limit` units: the items (tokens or characters) of all labels, NODE units for each node and SENT for
           each worker that a node knows, as those cost memory too. Beyond it the least recently sent leaves go.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

Tokens = Sequence[int] | str
NODE = 32  # what a node is charged beside its items: some 600 bytes
SENT = 4  # and for each worker in it
DEEPEST = 256  # nodes of one path. A chain "a", "aa", "aaa", … would cost a step for each character


class Node:
    """`sent`: worker's number -> that worker's clock (see RadixTree) when it was last sent a prompt through here.

    A worker of a node is one of its parent too, with a clock that is no older: prompts run through both.
    """

    __slots__ = ("children", "label", "parent", "sent")

    def __init__(self, label: Tokens, parent: Node | None) -> None:
        self.label, self.parent = label, parent
        self.children: dict[int | str, Node] = {}
        self.sent: dict[int, int] = {}


class RadixTree:
    """limit: units that the tree may hold. keeps: items that a worker's own cache holds; None: without end.

    Each worker has a clock: how many items it was sent that it did not have. What it was last sent more than `keeps` of
    them ago has by then been overwritten in its cache (which throws out the least recently used), and does not match.
    """

    def __init__(self, limit: int = 2**22, keeps: int | None = None) -> None:
        self.size = 0
        self.limit, self.keeps = limit, keeps
        self._longest = limit // 4  # of a prompt, what goes in: one alone must not push out all others
        self._root = Node("", None)
        # A node stands behind its children, as a prompt's nodes are moved to the end from the leaf up. So the first of
        # all, which is the least recently sent, is always a leaf.
        self._recent: OrderedDict[Node, None] = OrderedDict()
        self._numbers: dict[str, int] = {}  # a worker that was removed and comes back gets a new number
        self._names: dict[int, str] = {}
        self._clocks: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        """Nodes."""
        return len(self._recent)

    def match(self, tokens: Tokens) -> dict[str, int]:
        """For each worker that has any of it: how many of the first items it was sent before. Changes nothing."""
        tokens = self._comparable(tokens)
        found: dict[int, int] = {}
        node, at, depth = self._root, 0, 0
        while at < len(tokens) and depth < DEEPEST and (child := node.children.get(tokens[at])):
            depth += 1
            same = _common(child.label, tokens, at)
            at += same
            for number in child.sent:
                if self._has(number, child):
                    found[number] = at
            if same < len(child.label):
                break
            node = child
        return {self._names[number]: length for number, length in found.items()}

    def insert(self, tokens: Tokens, worker: str) -> None:
        """The worker is sent this prompt now."""
        tokens = self._comparable(tokens)
        number = self._number(worker)
        node, at, path, lacked = self._root, 0, [], 0
        while at < len(tokens) and len(path) < DEEPEST:
            child = node.children.get(tokens[at])
            if child is None:
                child = self._add(tokens[at:], node)
            elif (same := _common(child.label, tokens, at)) < len(child.label):
                child = self._split(child, same)
            at += len(child.label)
            if not self._has(number, child):
                lacked += len(child.label)
            node = child
            path.append(node)
        self._clocks[number] += lacked
        for node in reversed(path):
            before = len(node.sent)
            node.sent[number] = self._clocks[number]
            if len(node.sent) > len(self._clocks):  # of workers that are no more
                node.sent = {known: clock for known, clock in node.sent.items() if known in self._clocks}
            self.size += SENT * (len(node.sent) - before)
            self._recent.move_to_end(node)
        while self.size > self.limit:
            self._drop(self._recent.popitem(last=False)[0])

    def written(self, worker: str) -> int:
        """Its clock. It starts with the lowest of the others', so that a new worker is level with them."""
        return self._clocks[self._number(worker)]

    def remove(self, worker: str) -> None:
        """Forget a worker. What is left of it in nodes no longer matches, and goes as they are sent or dropped."""
        if (number := self._numbers.pop(worker, None)) is not None:
            del self._clocks[number], self._names[number]

    def _number(self, worker: str) -> int:
        if worker not in self._numbers:
            self._numbers[worker], self._names[self._next] = self._next, worker
            self._clocks[self._next] = min(self._clocks.values(), default=0)
            self._next += 1
        return self._numbers[worker]

    def _has(self, number: int, node: Node) -> bool:
        clock, sent = self._clocks.get(number), node.sent.get(number)
        return clock is not None and sent is not None and (self.keeps is None or clock - sent <= self.keeps)

    def _comparable(self, tokens: Tokens) -> Tokens:
        """A type whose slices compare in C, without an object for each token. Raises OverflowError beyond 64 bits."""
        return tokens[: self._longest] if isinstance(tokens, str) else array("q", tokens[: self._longest])

    def _add(self, label: Tokens, parent: Node) -> Node:
        node = parent.children[label[0]] = Node(label, parent)
        self._recent[node] = None
        self.size += len(label) + NODE
        return node

    def _split(self, node: Node, at: int) -> Node:
        """A new node of the first `at` items of this one's label, above it."""
        assert node.parent is not None
        self.size -= at  # they move to the new one
        upper = self._add(node.label[:at], node.parent)
        upper.sent = dict(node.sent)
        self.size += SENT * len(upper.sent)
        node.label, node.parent = node.label[at:], upper
        upper.children[node.label[0]] = node
        return upper

    def _drop(self, leaf: Node) -> None:
        assert leaf.parent is not None
        del leaf.parent.children[leaf.label[0]]
        self.size -= len(leaf.label) + NODE + SENT * len(leaf.sent)


def _common(label: Tokens, tokens: Tokens, at: int) -> int:
    """How many items of `label` stand in `tokens` from `at` on: by halves, so that all compared is O(the label)."""
    same, differs = 0, min(len(label), len(tokens) - at)
    if label[:differs] == tokens[at : at + differs]:
        return differs
    while differs - same > 1:
        middle = (same + differs) // 2
        if label[same:middle] == tokens[at + same : at + middle]:
            same = middle
        else:
            differs = middle
    return same
