"""What goes on inside DDP's backward, seen through hooks on its parameters and buckets.

Three things that nobody says otherwise: which parameters got no gradient, whether a gradient was changed while its
bucket was already under way, and when this rank's own work ended and its waiting for the others' buckets began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as td
from torch.nn.parallel import DistributedDataParallel

from common.logs import get_logger

log = get_logger()


class Backward:
    """Hooks on one DDP model. They stay when the watching is over, and then only do DDP's own work."""

    def __init__(self, ddp: DistributedDataParallel, mark: Callable[[], Any], waited: Callable[[Any, Any], None]):
        self.ddp, self.mark, self.waited = ddp, mark, waited
        self.names = {p: name for name, p in ddp.module.named_parameters() if p.requires_grad}
        self.without_gradient: list[str] = []  # after the last backward
        self.changed: list[str] = []  # parameters of a bucket that was changed under way
        self._seen: set[torch.nn.Parameter] = set()
        self._under_way: list[tuple[torch.Tensor, int, list[str]]] = []  # buffer, its version when it left, names
        self._handles = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self.names]
        self._handles.append(ddp.register_forward_pre_hook(self._on_forward))
        try:
            ddp.register_comm_hook(self, Backward._on_bucket)
        except RuntimeError:  # it has one already, and DDP takes one only
            log.warning("the model has a communication hook of its own: changes to buckets under way are not seen")

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _on_forward(self, *_: object) -> None:
        self._seen.clear()
        self._under_way.clear()

    def _on_gradient(self, parameter: torch.nn.Parameter) -> None:
        if not self._seen:
            # DDP queues its wait for the buckets when the last of them leaves. Ours is in the queue before it.
            torch.autograd.Variable._execution_engine.queue_callback(self._on_computed)
        self._seen.add(parameter)

    def _on_bucket(self, bucket):  # no annotations: DDP checks them, and would find strings
        """DDP's own all_reduce, started from Python: the mean over the ranks."""
        buffer = bucket.buffer().div_(td.get_world_size(self.ddp.process_group))
        work = td.all_reduce(buffer, group=self.ddp.process_group, async_op=True)
        if self._handles:
            # Every in-place operation on a tensor, or on a view of it as .grad is one, counts its version up.
            names = [self.names[p] for p in bucket.parameters()]
            self._under_way.append((buffer, buffer._version, names))
        return work.get_future().then(lambda future: future.value()[0])

    def _on_computed(self) -> None:
        """All gradients of this rank are there; DDP has not begun to wait for the buckets."""
        missing = [name for p, name in self.names.items() if p not in self._seen]
        legal = self.ddp.find_unused_parameters or self.ddp.static_graph
        self.without_gradient = [] if legal else missing
        for buffer, version, names in self._under_way:
            if buffer._version != version and not self.changed:
                self.changed = names
        computed = self.mark()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: self.waited(computed, self.mark()))
