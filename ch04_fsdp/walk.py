"""One training step of one rank, from allocation to allocation, as torch's own trace of it shows them.

    step = Step(config, setting)
    step.walk()
    step.ledger.peaks["loss"]    ->  (bytes, {"parameters": ..., "activations": ..., ...}), the most in that phase

What decides the peak, and is easily forgotten:

* The loss holds three tensors of tokens x vocabulary in float32: the log-softmax, and two gradients.
* FSDP2 has a layer's weights twice when it begins to compute: as the all-gather's output and copied out of it. In
  forward the output is freed only when the next layer's is copied out; in backward the next layer's is under way.
* In backward a layer's whole gradients meet the input of the last layer's reduce-scatter, kept until they replace it.
* A tied embedding's two gradients wait for each other, and their sum is a third tensor of that size.
* A recomputed layer has all its activations back at once, whatever was saved.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ch04_fsdp.activations import Ends, Layer
from ch04_fsdp.setting import OPTIMIZER_BYTES, Setting, in_flight, part

# DeepSpeed's defaults, in elements (deepspeed.ai, "DeepSpeed Configuration JSON", zero_optimization). The bucket into
# which gradients are copied is allocated whole, however small the model: for stages 1 and 2 when backward begins, for
# stage 3 once.
REDUCE_BUCKET = ALLGATHER_BUCKET = 500_000_000
PREFETCH_BUCKET, MAX_LIVE_PARAMETERS = 50_000_000, 1_000_000_000


@dataclass
class Ledger:
    """What is allocated, by kind, and the most that it was in each phase."""

    live: Counter[str] = field(default_factory=Counter)
    phase: str = "between steps"
    peaks: dict[str, tuple[int, dict[str, int]]] = field(default_factory=dict)

    def hold(self, kind: str, size: int) -> None:
        self.live[kind] += size
        total = self.live.total()
        if total > self.peaks.get(self.phase, (-1, {}))[0]:
            self.peaks[self.phase] = (total, {name: n for name, n in self.live.items() if n})

    def drop(self, kind: str, size: int | None = None) -> None:
        """Some of a kind, or all of it."""
        self.live[kind] -= self.live[kind] if size is None else size

    def touch(self, kind: str, size: int) -> None:
        """Held for a moment, by one operation."""
        self.hold(kind, size)
        self.drop(kind, size)


class Step:
    """Walks through one training step of one rank, and notes in `ledger` what torch allocates and frees.

    Kinds: parameters, optimizer, buffers, gradients; weights that are gathered (or, under autocast, copied);
    communication (outputs of all-gathers, inputs of reductions, buckets); activations that wait for backward;
    temporaries (what one operation leaves for the next).
    """

    def __init__(self, config: Any, setting: Setting, stage: int = 0) -> None:
        self.setting, self.config = setting, config
        self.part = part(config, setting, stage)
        self.is_first, self.is_last = stage == 0, stage == setting.pp - 1
        tokens = setting.micro_batch * setting.seq_len
        self.layer = Layer(config, tokens, setting.precision, setting.tp)
        self.ends = Ends(config, setting.micro_batch, setting.seq_len, setting.precision, setting.tp)
        self.in_flight = in_flight(setting, stage)
        self.ledger, self.host = Ledger(), 0
        self.over_gloo = setting.device == "cpu"
        self.offloads = setting.offload == "disk" or (setting.offload == "cpu" and setting.device != "cpu")
        self.pending: set[int] = set()  # units whose all-gather has been started
        self.whole: set[int] = set()  # units whose gathered weights are here
        self.reduced = 0  # FSDP: the input of the last reduction, kept until the next one

    def walk(self) -> None:
        self.hold_states()
        rounds = min(2, self.setting.accumulate) if self.setting.pp == 1 else 1
        for number in range(rounds):
            self.synchronizes = number == rounds - 1 or self.setting.sync_each
            self.accumulates = number > 0
            self.forward()
            if self.setting.strategy in ("zero1", "zero2"):
                self.ledger.hold("communication", self.setting.weight * REDUCE_BUCKET)
            self.loss()
            self.backward()
        self.update()

    # ------------------------------------------------------------ states

    def hold_states(self) -> None:
        s, count = self.setting, self.part.total
        n = s.shards
        if s.strategy == "replicate":
            states = {"parameters": 4 * count, "optimizer": OPTIMIZER_BYTES[s.optimizer] * count}
        else:
            whole = s.strategy in ("zero1", "zero2")
            master = 4 if not s.is_fsdp and s.weight == 2 else 0
            states = {
                "parameters": (s.weight if not s.is_fsdp else 4) * count // (1 if whole else n),
                "optimizer": (OPTIMIZER_BYTES[s.optimizer] + master) * count // n,
            }
        for kind, size in states.items():
            if self.offloads and (kind == "optimizer" or s.is_fsdp or s.strategy == "zero3"):
                self.host += size
            else:
                self.ledger.hold(kind, size)
        self.ledger.hold("buffers", 8 * self.layer.rotary)
        if s.strategy == "zero3":
            self.ledger.hold("buffers", s.weight * REDUCE_BUCKET)
        if s.strategy == "replicate" and s.replicas > 1:
            self.ledger.hold("gradients", 4 * count)  # views into DDP's buckets, which stay

    # ------------------------------------------------------------ weights that come and go (FSDP2)

    def size_of(self, unit: int) -> int:
        """Parameters of a unit: -1 before the layers, 0 ... the layers, `layers` behind them."""
        if unit == -1:
            return self.part.first_unit
        return self.part.last_unit if unit == self.part.layers else self.part.layer

    def all_gather(self, unit: int) -> None:
        size = self.size_of(unit) * self.setting.weight
        if self.setting.shards == 1 or unit in self.pending or not size:
            return
        self.pending.add(unit)
        self.ledger.hold("communication", size)
        if self.over_gloo:  # gathers into a buffer of its own
            cast = size // self.setting.shards if self.setting.weight == 2 else 0
            self.ledger.touch("communication", size + cast)

    def copy_out(self, unit: int) -> int:
        """From the all-gather's output into the weights. Returns what can be dropped then."""
        size = self.size_of(unit) * self.setting.weight
        self.ledger.hold("gathered weights", size)
        self.whole.add(unit)
        if unit not in self.pending:
            return 0
        self.pending.discard(unit)
        return size

    def reshard(self, unit: int) -> None:
        if unit in self.whole:
            self.whole.remove(unit)
            self.ledger.drop("gathered weights", self.size_of(unit) * self.setting.weight)

    # ------------------------------------------------------------ forward

    def forward(self) -> None:
        s, ledger, layers = self.setting, self.ledger, self.part.layers
        ledger.phase = "forward"
        kept = [self.layer.kept(s.recompute, number) for number in range(layers)]
        ledger.hold("activations", self.in_flight * (self.ends.begin if self.is_first else self.layer.stream))
        ledger.hold("activations", (self.in_flight - 1) * sum(kept))  # pipeline: of the micro-batches before
        if s.precision == "autocast" and not self.accumulates:
            ledger.hold("gathered weights", 2 * self.part.matrices)  # until the step ends: see ddp_step.Precision
        if s.strategy == "zero3":
            ledger.hold("gathered weights", s.weight * min(self.part.total, MAX_LIVE_PARAMETERS))
            ledger.hold("communication", s.weight * min(self.part.total, PREFETCH_BUCKET))
        previous = 0  # FSDP frees an all-gather's output only when the next one is copied out
        for unit in range(-1, layers + 1):
            if s.is_fsdp:
                self.all_gather(unit)
                output = self.copy_out(unit)
                ledger.drop("communication", previous)
                previous = output
                if s.prefetch > 1 and 0 <= unit < layers:
                    for ahead in range(unit + 1, min(layers, unit + 1 + s.prefetch)):
                        self.all_gather(ahead)
            if 0 <= unit < layers:
                ledger.hold("activations", kept[unit])
                recomputes = kept[unit] < self.layer.saved
                ledger.touch("temporaries", 2 * self.layer.stream + (3 * self.layer.inner if recomputes else 0))
            elif unit == layers and self.is_last:
                ledger.hold("activations", self.ends.head)
                ledger.hold("temporaries", self.ends.logits)
            if s.is_fsdp and s.reshards and unit != (-1 if self.part.tied else layers):
                self.reshard(unit)
        ledger.drop("communication", previous)

    def loss(self) -> None:
        """Logits, their log-softmax, and the gradients of both: of tokens x vocabulary each, mostly float32."""
        if not self.is_last:
            return
        ledger, wide = self.ledger, self.ends.log_softmax
        ledger.phase = "loss"
        ledger.hold("activations", self.ends.targets + wide)
        if self.layer.size == 2:
            ledger.touch("temporaries", wide)  # logits.float()
        ledger.drop("temporaries")
        ledger.hold("temporaries", 2 * wide)  # of the log-probabilities and of the logits
        ledger.drop("activations", self.ends.targets + wide)
        ledger.drop("temporaries", wide)
        if self.layer.size == 2:
            ledger.hold("temporaries", self.ends.logits)  # in the head's type
            ledger.drop("temporaries", wide)

    # ------------------------------------------------------------ backward

    def backward(self) -> None:
        s, ledger, layers = self.setting, self.ledger, self.part.layers
        ledger.phase = "backward of the head"
        self.unshard_for_backward(layers)
        if self.is_last:
            vocabulary = self.part.embedding if self.part.tied else self.part.head - self.config.hidden_size
            self.gradient(vocabulary)
            ledger.touch("temporaries", self.layer.tokens * self.config.hidden_size * self.layer.size)
            ledger.drop("temporaries")
            ledger.drop("activations", self.ends.head)
            if not self.part.tied:
                self.gradient(self.config.hidden_size)
                self.finish(layers)
        for number in reversed(range(layers)):
            ledger.phase = f"backward of layer {number}"
            self.unshard_for_backward(number)
            self.backward_of_layer(number)
            self.finish(number)
        ledger.phase = "backward of the embedding"
        if self.is_first:
            if not self.part.tied:
                self.gradient(self.part.embedding)
            else:  # both ends of the tied weight have their gradient: they are added up into a third tensor
                ledger.touch("temporaries", 2 * self.part.embedding * self.gradient_bytes)
                self.gradient(self.config.hidden_size)
            self.finish(-1)
        ledger.drop("communication")
        ledger.drop("activations")
        ledger.drop("temporaries")
        self.reduced = 0
        if s.strategy == "zero3":
            ledger.drop("gathered weights")

    def unshard_for_backward(self, unit: int) -> None:
        """Gather a layer's weights unless they have stayed, as the head's have, and start on those of the next."""
        s = self.setting
        if not (s.is_fsdp and s.reshards):
            return
        if unit < self.part.layers:
            self.all_gather(unit)
            self.ledger.drop("communication", self.copy_out(unit))
        for ahead in range(unit - 1, max(-1, unit - 1 - s.prefetch), -1):
            self.all_gather(ahead)

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient as autograd makes it: in the type of the weight."""
        return self.setting.weight

    def gradient(self, count: int) -> None:
        """A gradient of `count` parameters has been computed."""
        in_place = self.setting.strategy == "replicate" and (self.setting.replicas > 1 or self.accumulates)
        size = count * self.gradient_bytes
        if in_place:  # in DDP's bucket, or added to the one of the micro-batch before
            self.ledger.touch("temporaries", size)
        else:
            self.ledger.hold("gradients", size)

    def backward_of_layer(self, number: int) -> None:
        layer, ledger = self.layer, self.ledger
        hidden, tp = self.config.hidden_size, self.setting.tp
        mlp = 3 * hidden * self.config.intermediate_size // tp
        again = layer.recomputed(self.setting.recompute, number)
        alive = layer.kept(self.setting.recompute, number) + again
        ledger.hold("temporaries", layer.stream)  # the gradient that comes in
        ledger.hold("activations", again)
        self.gradient(mlp // 3)
        ledger.touch("temporaries", 2 * layer.inner)  # of gate x up (whose value is gone by then) and of both: 3 - 1
        self.gradient(mlp - mlp // 3)
        ledger.drop("activations", layer.mlp + layer.norm)
        ledger.touch("temporaries", layer.mixed + layer.heads)  # of attention's result, and of q, k and v
        ledger.drop("activations", alive - layer.mlp - layer.norm)
        self.gradient(self.part.layer - mlp)
        ledger.drop("temporaries", layer.stream)

    def finish(self, unit: int) -> None:
        """All gradients of a unit are there: reduce them, and let go of its weights."""
        s, ledger, count = self.setting, self.ledger, self.size_of(unit)
        if s.is_fsdp:
            self.reshard(unit)
            made, wide = count * self.gradient_bytes, 4 * count  # reduced, and added up, in float32
            if not self.synchronizes:
                if made != wide:
                    ledger.hold("gradients", wide)
                    ledger.drop("gradients", made)
                return
            ledger.drop("communication", self.reduced)
            self.reduced = wide
            ledger.hold("communication", wide)
            ledger.drop("gradients", made)
            shard = wide // s.shards
            if self.offloads:
                self.host += 0 if self.accumulates and s.sync_each else shard
                ledger.touch("gradients", shard)
            elif self.accumulates and s.sync_each:
                ledger.touch("gradients", shard)  # and is added to the one that is there
            else:
                ledger.hold("gradients", shard)
            if self.accumulates and not s.sync_each:
                ledger.drop("gradients", wide)  # the sum over the micro-batches before
            if self.over_gloo and s.shards > 1:
                ledger.touch("communication", wide)  # its reduce-scatter is an all-reduce of a copy
        elif s.strategy in ("zero2", "zero3"):
            ledger.drop("gradients", count * self.gradient_bytes)
            if not self.accumulates:
                ledger.hold("gradients", count * self.gradient_bytes // s.shards)

    # ------------------------------------------------------------ update

    def update(self) -> None:
        """Fused AdamW works in place. DeepSpeed makes its shard's gradients float32 first, and gathers the weights."""
        s, ledger = self.setting, self.ledger
        ledger.phase = "optimizer"
        if s.strategy.startswith("zero") and s.weight == 2:
            ledger.touch("temporaries", 0 if self.offloads else 4 * self.part.total // s.shards)
        if s.strategy in ("zero1", "zero2"):
            ledger.touch("communication", s.weight * min(self.part.total // s.shards, ALLGATHER_BUCKET))
        ledger.touch("temporaries", 0)
