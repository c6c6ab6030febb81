"""Llama and Qwen3 for inference: fused projections, a paged cache, tensor parallel. Weights from a Hugging Face folder.

Tensors carry their shape: t tokens of a step, h heads, k heads of keys, d head_dim, e hidden size, f MLP size, v size
of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ch04_fsdp.weights import Stored, checkpoint_files
from ch06_vllm.engine.kernels import kernels
from ch06_vllm.engine.paged_attention import LayerCache, Step, attention
from common import lm
from common.script import UserError

FAMILIES = ("llama", "qwen3", "qwen2", "mistral")


@dataclass
class Shard:
    """This rank's part of a tensor-parallel model (Shoeybi et al. 2019, "Megatron-LM"): heads and MLP columns."""

    rank: int = 0
    world_size: int = 1

    def of(self, size: int) -> slice:
        return slice(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)

    def add_up(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x


class Linear:
    """y = x W^T + b. On CPUs with bfloat16 instructions the weights lie in the order that these read them in."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.packed = None
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
        if on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            self.weight = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


@dataclass
class Layer:
    attention_norm: torch.Tensor
    qkv: Linear  # rows: this rank's queries, keys, values
    query_norm: torch.Tensor | None  # Qwen3 normalises each head
    key_norm: torch.Tensor | None
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class Model:
    """What config.json says of it; then `load` reads the weights, and `allocate_cache` makes room.

    Raises:
        UserError: no such model, one that this engine would compute wrongly, or heads that ranks cannot share out.
    """

    def __init__(self, name: str, dtype: str, device: torch.device, shard: Shard, max_len: int | None = None) -> None:
        self.folder = checkpoint_files(name)
        self.config = config = lm.config(str(self.folder))
        self.max_len: int = max_len or config.max_position_embeddings
        self._refuse_others(name)
        for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            if getattr(config, what) % shard.world_size:
                raise UserError(
                    f"{what} {getattr(config, what)} cannot be shared out among {shard.world_size} ranks; "
                    "take a tensor parallel size that divides it"
                )
        self.shard, self.device = shard, device
        self.dtype = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
        self.heads = config.num_attention_heads // shard.world_size
        self.kv_heads = config.num_key_value_heads // shard.world_size
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kernels = kernels(device.type, self.dtype, self.head_dim)
        self.caches: list[LayerCache] = []

    def _refuse_others(self, name: str) -> None:
        """What would be loaded well and answer wrongly."""
        config = self.config
        window = getattr(config, "sliding_window", None) or self.max_len
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        for fine, what in (
            (config.model_type in FAMILIES, f"is a {config.model_type}; this engine knows {', '.join(FAMILIES)}"),
            (not hasattr(config, "quantization_config"), "is quantised; this engine reads weights of 16 bits or more"),
            (getattr(config, "hidden_act", "") == "silu", "has no SiLU in its MLP; this engine computes nothing else"),
            (rope not in ("dynamic", "longrope"), f"scales its positions by {rope}; this engine needs a fixed scaling"),
            (window >= self.max_len, f"attends to {window} tokens back, this engine to all; lower max_model_len to it"),
            (
                self.max_len <= config.max_position_embeddings,
                f"was made for {config.max_position_embeddings} tokens; lower max_model_len {self.max_len}",
            ),
        ):
            if not fine:
                raise UserError(f"{name!r} {what}")

    def load(self) -> None:
        """Read all weights, of each the part that this rank holds.

        Raises:
            UserError: one is missing, has another shape, or has no place in this model.
        """
        config, hidden, own = self.config, self.config.hidden_size, self.shard.of
        stored = Stored(self.folder)
        seen = {"lm_head.weight"} if config.tie_word_embeddings else set()

        def read(name: str, *shape: int, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
            seen.add(name)
            part = rows if columns is None else (rows, columns)
            return stored.read(name, shape, part).to(self.device, self.dtype).contiguous()

        biased = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
        normed = config.model_type == "qwen3"
        queries, keys = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        mlp, vocab = config.intermediate_size, config.vocab_size
        self.layers = []
        for number in range(config.num_hidden_layers):
            at = f"model.layers.{number}."
            attn = f"{at}self_attn."
            projections = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
            qkv = [read(f"{attn}{name}.weight", size, hidden, rows=own(size)) for name, size in projections]
            biases = [read(f"{attn}{name}.bias", size, rows=own(size)) for name, size in projections if biased]
            gate_up = [read(f"{at}mlp.{name}_proj.weight", mlp, hidden, rows=own(mlp)) for name in ("gate", "up")]
            self.layers.append(
                Layer(
                    attention_norm=read(f"{at}input_layernorm.weight", hidden),
                    qkv=Linear(torch.cat(qkv), torch.cat(biases) if biased else None),
                    query_norm=read(f"{attn}q_norm.weight", self.head_dim) if normed else None,
                    key_norm=read(f"{attn}k_norm.weight", self.head_dim) if normed else None,
                    out=Linear(read(f"{attn}o_proj.weight", hidden, queries, columns=own(queries))),
                    mlp_norm=read(f"{at}post_attention_layernorm.weight", hidden),
                    gate_up=Linear(torch.cat(gate_up)),
                    down=Linear(read(f"{at}mlp.down_proj.weight", hidden, mlp, columns=own(mlp))),
                )
            )
        self.embedding = read("model.embed_tokens.weight", vocab, hidden)
        self.final_norm = read("model.norm.weight", hidden)
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        self.head = Linear(read(head, vocab, hidden, rows=own(vocab)))
        stored.refuse_all_but(seen)
        self.cos, self.sin = self._rotations()

    def _rotations(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, [max_len, head_dim], by transformers: it knows all the scalings."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        angles = LlamaRotaryEmbedding(self.config)
        cos, sin = angles(torch.empty(0), torch.arange(self.max_len).unsqueeze(0))
        return tuple(x[0].to(self.device, self.dtype) for x in (cos, sin))  # type: ignore[return-value]

    @property
    def cache_bytes_a_token(self) -> int:
        """Bytes of keys and values of one token, in all layers, on this rank."""
        return 2 * self.config.num_hidden_layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    def allocate_cache(self, num_blocks: int, block_size: int) -> None:
        shape = (num_blocks, block_size, self.kv_heads, self.head_dim)
        self.caches = [
            LayerCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in "kv")) for _ in self.layers
        ]

    @torch.inference_mode()
    def __call__(self, step: Step) -> torch.Tensor | None:
        """Logits [samples, v] of the rows that the step asks for; on rank 0 only."""
        eps, do = self.config.rms_norm_eps, self.kernels
        x_te, delta_te = F.embedding(step.tokens, self.embedding), None  # a sublayer's output is added by the next norm
        for layer, cache in zip(self.layers, self.caches, strict=True):
            delta_te = self._attend(layer, cache, do.add_norm(x_te, delta_te, layer.attention_norm, eps), step)
            gate_up = layer.gate_up(do.add_norm(x_te, delta_te, layer.mlp_norm, eps))
            delta_te = self.shard.add_up(layer.down(do.gate(gate_up)))
        if not len(step.samples):
            return None
        x_ne, delta_ne = x_te[step.samples], delta_te[step.samples]
        return self._whole(self.head(do.add_norm(x_ne, delta_ne, self.final_norm, eps)))

    def _attend(self, layer: Layer, cache: LayerCache, x_te: torch.Tensor, step: Step) -> torch.Tensor:
        qkv_thd = layer.qkv(x_te).view(len(x_te), -1, self.head_dim)
        q_thd, k_tkd, v_tkd = qkv_thd.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if layer.query_norm is not None:
            q_thd, k_tkd = (
                self.kernels.add_norm(x.contiguous(), None, weight, self.config.rms_norm_eps)
                for x, weight in ((q_thd, layer.query_norm), (k_tkd, layer.key_norm))
            )
        self.kernels.rotate_and_store(q_thd, k_tkd, v_tkd, self.cos, self.sin, cache, step)
        attended = attention(q_thd, k_tkd, v_tkd, cache, step, self.kernels)
        return self.shard.add_up(layer.out(attended.flatten(1)))

    def _whole(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Each rank has the logits of its part of the vocabulary; rank 0 gets all."""
        if self.shard.world_size == 1:
            return logits
        vocab, world = self.config.vocab_size, self.shard.world_size
        widths = [vocab * (rank + 1) // world - vocab * rank // world for rank in range(world)]
        padded = F.pad(logits, (0, max(widths) - logits.shape[1]))
        parts = [torch.empty_like(padded) for _ in widths] if self.shard.rank == 0 else None
        dist.gather(padded, parts)
        return torch.cat([p[:, :w] for p, w in zip(parts, widths, strict=True)], dim=1) if parts else None
