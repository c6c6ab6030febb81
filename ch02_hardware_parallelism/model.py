"""One small transformer for all the strategies of this chapter: GPT-2's shape, in plain torch.

Shapes are written as suffixes: b sequences, t positions, d model width, h heads, k width of a head, f width of the MLP,
v vocabulary. It has one of everything that parallel training gets wrong: biases, norms, two embeddings, a head that
may share its weight with one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """The default divides by 2, 3 and 4: heads, MLP, vocabulary and positions."""

    vocab: int = 96
    width: int = 48
    heads: int = 12
    layers: int = 4
    context: int = 12
    tied: bool = True

    @property
    def mlp(self) -> int:
        return 4 * self.width


class Attention(nn.Module):
    """Causal self-attention. The number of heads follows from the width of q: a shard of the heads works alike."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        q_bhtk, k_bhtk, v_bhtk = (
            project(x_btd).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        mixed_bhtk = F.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk, is_causal=True)
        return self.out(mixed_bhtk.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_btd)))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attention = Attention(shape.width, shape.heads)
        self.mlp = MLP(shape.width, shape.mlp)

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        x_btd = x_btd + self.attention(self.norm1(x_btd))
        return x_btd + self.mlp(self.norm2(x_btd))


class Embedding(nn.Module):
    """Token plus position."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocab, shape.width)
        self.position = nn.Embedding(shape.context, shape.width)

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        places_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        return self.token(tokens_bt) + self.position(places_t)


class Transformer(nn.Module):
    """embedding, blocks, norm, head: in this order, so that a pipeline can cut it anywhere."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = Embedding(shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.token.weight

    def forward(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        x_btd = self.embedding(tokens_bt)
        for block in self.blocks:
            x_btd = block(x_btd)
        return self.head(self.norm(x_btd))


def build(shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """The same random weights on every rank, whatever was drawn before. Norms and biases are random too: a gradient
    that is wrong only where a bias is zero would go unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(shape)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                with torch.no_grad():
                    module.weight += 1
    return model.to(device, dtype)


def loss_sum(logits_btv: torch.Tensor, targets_bt: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the tokens: what to divide by is the strategy's business."""
    return F.cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten(), reduction="sum")
