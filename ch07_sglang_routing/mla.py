"""Multi-head latent attention: a KV cache of one small vector a token, and why it need never be unpacked.

You learn   what DeepSeek-V2 keeps for a token instead of keys and values, how its up-projections are absorbed into the
            query and the output, and what that trades: fewer bytes, more arithmetic
Laptop      python -m ch07_sglang_routing.mla
GPU node    python -m ch07_sglang_routing.mla --preset deepseek-v2 --context 32768 --batch 1
            (full keys and values of one layer in float32 are 5 GiB, and twice that while they are made; a --batch of 4
            takes four times as much)
Cluster     nothing to do there: the cache of a token lies on one device, or a copy of it on each tensor parallel rank
You see     bytes a token by formula and as the tensors have them; equal outputs in float64; the time of a decode step

After DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1, with its decoupled rotary part: each head's key is a part made
from the latent vector, and one that carries the position and that all heads share.

Tensors: b sequences, t positions, h heads, n size of a head's key without position, p with position (rotated), v of its
value, r of the latent vector, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ch07_sglang_routing.fusion import median_ms
from common import dist, script

# Sizes: DeepSeek-V2 and -V3 as their config.json have them (layers 60 and 61), others their config.json's too.
# layers x elements a token and layer, of 2 bytes: for the table of published models.
PUBLISHED = {
    "Llama-2-7B    (multi-head)": (32, 2 * 32 * 128),
    "Llama-3-70B   (8 KV heads)": (80, 2 * 8 * 128),
    "DeepSeek-V2   (its heads, unpacked)": (60, 128 * (128 + 64 + 128)),
    "DeepSeek-V2   (latent)": (60, 512 + 64),
    "DeepSeek-V3   (latent)": (61, 512 + 64),
}


@dataclass(frozen=True)
class Sizes:
    hidden: int = 512
    heads: int = 16
    nope: int = 64  # n
    rope: int = 32  # p
    value: int = 64  # v
    latent: int = 128  # r

    def full_elements(self) -> int:
        """Of a token, in one layer: each head's key and value."""
        return self.heads * (self.nope + self.rope + self.value)

    def latent_elements(self) -> int:
        """The latent vector, and the one key with position that all heads share."""
        return self.latent + self.rope


PRESETS = {"small": Sizes(), "deepseek-v2": Sizes(5120, 128, 128, 64, 128, 512)}


class LatentAttention:
    """The weights of one layer, as torch.nn.Linear would have them but per head. Decode steps only: one new token."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        s, random = sizes, torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> torch.Tensor:  # the last dimension is summed over
            made = torch.randn(shape, generator=random, dtype=torch.float64) / shape[-1] ** 0.5
            return made.to(device=device, dtype=dtype)

        self.sizes, self.scale = s, (s.nope + s.rope) ** -0.5
        self.query_hnd, self.query_hpd = weight(s.heads, s.nope, s.hidden), weight(s.heads, s.rope, s.hidden)
        self.down_rd, self.key_pd = weight(s.latent, s.hidden), weight(s.rope, s.hidden)  # into the cache
        self.key_hnr, self.value_hvr = (
            weight(s.heads, s.nope, s.latent),
            weight(s.heads, s.value, s.latent),
        )  # out of it
        self.out_dhv = weight(s.hidden, s.heads * s.value).view(s.hidden, s.heads, s.value)

    def latent_cache(self, x_btd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What MLA keeps of these positions: [b, t, r] and the rotated [b, t, p]."""
        positions_t = torch.arange(x_btd.shape[1], device=x_btd.device)
        return x_btd @ self.down_rd.t(), rotate(x_btd @ self.key_pd.t(), positions_t)

    def full_cache(self, latent_btr: torch.Tensor, key_btp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What multi-head attention with the same heads keeps: keys [b, h, t, n + p], values [b, h, t, v]."""
        key_bhtn = torch.einsum("btr,hnr->bhtn", latent_btr, self.key_hnr)
        shared_bhtp = key_btp.unsqueeze(1).expand(-1, self.sizes.heads, -1, -1)
        value_bhtv = torch.einsum("btr,hvr->bhtv", latent_btr, self.value_hvr)
        return torch.cat([key_bhtn, shared_bhtp], dim=-1), value_bhtv.contiguous()

    def queries(self, x_bd: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        query_bhp = torch.einsum("bd,hpd->bhp", x_bd, self.query_hpd)
        at = torch.tensor([position], device=x_bd.device)
        return torch.einsum("bd,hnd->bhn", x_bd, self.query_hnd), rotate(query_bhp.unsqueeze(2), at).squeeze(2)

    def attend_full(self, x_bd: torch.Tensor, keys: torch.Tensor, values_bhtv: torch.Tensor) -> torch.Tensor:
        """Multi-head attention over full keys and values: the reference. [b, d]"""
        query = torch.cat(self.queries(x_bd, keys.shape[2] - 1), dim=-1)
        score_bh1t = query.unsqueeze(2) @ keys.transpose(2, 3) * self.scale
        head_bhv = (score_bh1t.softmax(dim=-1) @ values_bhtv).squeeze(2)
        return torch.einsum("bhv,dhv->bd", head_bhv, self.out_dhv)

    def attend_latent(self, x_bd: torch.Tensor, latent_btr: torch.Tensor, key_btp: torch.Tensor) -> torch.Tensor:
        """The same from the latent cache, nothing unpacked. [b, d]

        query . (K c) = (K^T query) . c, so K goes into the query; sum_t p_t (V c_t) = V (sum_t p_t c_t), so V comes
        last.
        """
        query_bhn, query_bhp = self.queries(x_bd, latent_btr.shape[1] - 1)
        query_bhr = torch.einsum("bhn,hnr->bhr", query_bhn, self.key_hnr)  # absorbed
        score_bht = (query_bhr @ latent_btr.transpose(1, 2) + query_bhp @ key_btp.transpose(1, 2)) * self.scale
        mixed_bhr = score_bht.softmax(dim=-1) @ latent_btr
        head_bhv = torch.einsum("bhr,hvr->bhv", mixed_bhr, self.value_hvr)
        return torch.einsum("bhv,dhv->bd", head_bhv, self.out_dhv)


def rotate(x: torch.Tensor, positions_t: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of [..., t, p]: pairs (i, i + p/2) turn by position * 10000^(-2i/p)."""
    half = x.shape[-1] // 2
    rates = 10000 ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle_ti = positions_t.to(torch.float64)[:, None] * rates
    cos, sin = angle_ti.cos().to(x.dtype), angle_ti.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def flops_over_bytes(sizes: Sizes, latent: bool, element_bytes: int) -> float:
    """Arithmetic of attention for each byte of cache it reads: 2 FLOPs an element of query . key and of p . value."""
    s = sizes
    flops = 2 * s.heads * (2 * s.latent + s.rope if latent else s.nope + s.rope + s.value)
    return flops / ((s.latent_elements() if latent else s.full_elements()) * element_bytes)


def largest_difference(sizes: Sizes, context: int, batch: int, device: torch.device, seed: int) -> float:
    """Of both forms in float64, relative to the largest output."""
    layer = LatentAttention(sizes, torch.float64, device, seed)
    random = torch.Generator().manual_seed(seed + 1)
    x_btd = torch.randn(batch, context, sizes.hidden, generator=random, dtype=torch.float64).to(device)
    cache = layer.latent_cache(x_btd)
    wanted = layer.attend_full(x_btd[:, -1], *layer.full_cache(*cache))
    return float((layer.attend_latent(x_btd[:, -1], *cache) - wanted).abs().max() / wanted.abs().max())


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--context", type=script.at_least(2), default=4096, help="tokens in the cache")
    parser.add_argument("--batch", type=script.at_least(1), default=4)
    parser.add_argument("--rounds", type=script.at_least(1), default=10)
    args = parser.parse_args(argv)
    script.start(__file__, args)
    device, sizes = dist.pick_device(args.device, dist.read_launch()), PRESETS[args.preset]

    print("bytes a token, all layers, bf16, by formula:")
    for name, (layers, elements) in PUBLISHED.items():
        print(f"  {name:36}{layers * elements * 2:>12,}")

    layer = LatentAttention(sizes, torch.float32, device, args.seed)
    random = torch.Generator().manual_seed(args.seed + 1)
    x_btd = torch.randn(args.batch, args.context, sizes.hidden, generator=random).to(device)
    latent = layer.latent_cache(x_btd)
    full = layer.full_cache(*latent)
    tokens = args.batch * args.context
    held = {
        name: sum(a.untyped_storage().nbytes() for a in cache) for name, cache in (("full", full), ("latent", latent))
    }
    new_bd = x_btd[:, -1]
    ms = median_ms(
        {"full": lambda: layer.attend_full(new_bd, *full), "latent": lambda: layer.attend_latent(new_bd, *latent)},
        args.rounds, device,
    )  # fmt: skip
    difference = largest_difference(sizes, min(args.context, 256), args.batch, device, args.seed)

    predicted = {"full": 4 * sizes.full_elements(), "latent": 4 * sizes.latent_elements()}
    print(f"one layer of {args.preset}, {args.batch} x {args.context} tokens, float32 on {device.type}:")
    print(f"{'':10}{'bytes a token':>15}{'measured':>10}{'FLOPs a byte':>14}{'decode ms':>11}")
    found: dict[str, Any] = {"context": args.context, "batch": args.batch, "difference": difference}
    for name in ("full", "latent"):
        ratio = flops_over_bytes(sizes, name == "latent", 4)
        print(f"{name:10}{predicted[name]:15,}{held[name] / tokens:10,.0f}{ratio:14.2f}{ms[name]:11.3f}")
        found |= {f"{name}_bytes_per_token": held[name] / tokens, f"{name}_predicted_bytes_per_token": predicted[name]}
        found |= {f"{name}_ms": ms[name], f"{name}_flops_per_byte": ratio}
    found["full_over_latent_bytes"] = held["full"] / held["latent"]
    found["full_over_latent_time"] = ms["full"] / ms["latent"]
    print(f"largest difference of the outputs, float64: {difference:.1e}")
    return found


if __name__ == "__main__":
    script.run(main)
