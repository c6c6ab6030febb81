"""Operator fusion: residual, norm and projection as six operators, as two, and with the norm's weight folded away.

You learn   why an engine fuses: an operator by itself reads and writes its whole tensor, and between two products of
            matrices that traffic, not arithmetic, is the time; and which fusions are exact
Laptop      python -m ch07_sglang_routing.fusion                    (--compile: torch.compile too, half a minute more)
GPU node    python -m ch07_sglang_routing.fusion --compile --hidden 4096 --outputs 1024 --tokens 8192     (some GB)
Cluster     nothing to do there: fusion is inside one device
You see     bytes of each form by formula and as counted at torch's dispatcher, the same; equal outputs; times

    h = x + r                   the residual stream
    n = h / rms(h) * g          RMSNorm (Zhang and Sennrich 2019), rms(h) = sqrt(mean(h^2) + eps)
    y = n W^T                   the projection behind it

Tensors: t tokens, d hidden size, o outputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ch06_vllm.engine import kernels
from common import dist, script

EPS = 1e-5
Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def unfused(x_td: torch.Tensor, r_td: torch.Tensor, g_d: torch.Tensor, w_od: torch.Tensor):
    """One operator after the other. Returns y and h, which the next residual needs."""
    h_td = x_td + r_td
    square_td = h_td * h_td
    mean_t1 = square_td.mean(dim=-1, keepdim=True)
    scale_t1 = torch.rsqrt(mean_t1 + EPS)
    n_td = h_td * scale_t1
    n_td = n_td * g_d
    return torch.mm(n_td, w_od.t()), h_td


def folded(x_td: torch.Tensor, r_td: torch.Tensor, _: torch.Tensor, wg_od: torch.Tensor):
    """With W' = W diag(g), made once at loading, and the rows scaled behind the product, as it is linear:

    y = (h / rms(h) * g) W^T = (h W'^T) / rms(h). Neither the square nor the normalised h is ever written.
    """
    h_td = x_td + r_td
    length_t1 = torch.linalg.vector_norm(h_td, dim=-1, keepdim=True)
    y_to = torch.mm(h_td, wg_od.t())
    return y_to.mul_(torch.rsqrt(length_t1.square_() / h_td.shape[-1] + EPS)), h_td


def fused_kernel(loops: kernels.InC) -> Form:
    """Residual and norm in one pass over each row, in C: chapter 6's. The projection stays the library's."""

    def form(x_td: torch.Tensor, r_td: torch.Tensor, g_d: torch.Tensor, w_od: torch.Tensor):
        h_td = x_td  # in place: h takes the place of x
        n_td = loops.add_norm(h_td, r_td, g_d, EPS)
        return torch.mm(n_td, w_od.t()), h_td

    return form


def predicted_bytes(form: str, t: int, d: int, o: int, size: int) -> int:
    """Read and written, if no operator's tensor stays in a cache for the next. size: bytes of an element."""
    product = d * o + t * o + t * d  # weight, result, input
    elements = {
        # + (3td), square (2td: one tensor twice is read once), mean (td + t), + eps (2t), rsqrt (2t), * (2td + t), * g
        "unfused": 3 * t * d + 2 * t * d + (t * d + t) + 2 * t + 2 * t + (2 * t * d + t) + (2 * t * d + d) + product,
        # + (3td), norm (td + t), product, square, / d, + eps, rsqrt (2t each), * (2to + t)
        "folded": 3 * t * d + (t * d + t) + product + 8 * t + (2 * t * o + t),
        # x, r in, h, n out; the row is in the core's first cache for its second and third reading
        "kernel": 4 * t * d + d + product,
    }
    return elements[form] * size


class Traffic(TorchDispatchMode):
    """Counts the bytes of every tensor that an operator reads or writes, once each; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operators = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = {id(a): a for a in args if isinstance(a, torch.Tensor)}
            written = out if isinstance(out, torch.Tensor) else out[0]
            self.operators += 1
            self.bytes += sum(a.numel() * a.element_size() for a in [*read.values(), written])
        return out


def median_ms(forms: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Of each form, in turns: what else runs on the machine meets them all alike."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(rounds + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            form()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(found) for name, found in times.items()}


def tensors(t: int, d: int, o: int, dtype: torch.dtype, device: torch.device, seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(t, d), (t, d), (d,), (o, d)]
    x, r, g, w = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return [a.to(device=device, dtype=dtype) for a in (x, r, g, w / d**0.5)]


def largest_difference(forms: dict[str, Form], args: Any, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Of y and h against the unfused form, of the largest y; float64 tells rounding from a wrong formula."""
    x, r, g, w = tensors(min(args.tokens, 64), args.hidden, args.outputs, dtype, device, args.seed)
    wanted, found = unfused(x, r, g, w), {}
    for name, form in forms.items():
        y, h = form(x.clone(), r, g, w * g if name == "folded" else w)
        found[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip((y, h), wanted, strict=True))
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = script.parser(__doc__)
    parser.add_argument("--tokens", type=script.at_least(1), default=4096, help="of a prefill step; decode has few")
    parser.add_argument("--hidden", type=script.at_least(16), default=512)
    parser.add_argument("--outputs", type=script.at_least(1), default=128)
    parser.add_argument("--rounds", type=script.at_least(1), default=15)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well (needs a C++ compiler, or a GPU)")
    args = parser.parse_args(argv)
    script.start(__file__, args)
    device = dist.pick_device(args.device, dist.read_launch())
    t, d, o = args.tokens, args.hidden, args.outputs

    exact: dict[str, Form] = {"folded": folded}
    if args.compile:
        exact["compiled"] = torch.compile(unfused, dynamic=False)
    forms: dict[str, Form] = {"unfused": unfused} | exact
    loops = kernels.kernels(device.type, torch.float32, 64)
    if isinstance(loops, kernels.InC):
        forms["kernel"] = fused_kernel(loops)
    errors = largest_difference(exact, args, torch.float64, device)
    if "kernel" in forms:  # it is in float32
        errors |= largest_difference({"kernel": forms["kernel"]}, args, torch.float32, device)

    x, r, g, w = tensors(t, d, o, torch.float32, device, args.seed)
    wg, scratch = w * g, x.clone()
    calls = {
        name: lambda f=form, n=name: f(scratch if n == "kernel" else x, r, g, wg if n == "folded" else w)  # type: ignore[misc]
        for name, form in forms.items()
    }
    counted: dict[str, int] = {}
    operators: dict[str, int] = {}
    for name in ("unfused", "folded"):
        with Traffic() as traffic:
            calls[name]()
        counted[name], operators[name] = traffic.bytes, traffic.operators
    calls["product alone"] = lambda: torch.mm(x, w.t())
    ms = median_ms(calls, args.rounds, device)

    print(f"{t} tokens, hidden {d}, {o} outputs, float32 on {device.type}")
    print(f"{'':14}{'operators':>10}{'MB predicted':>14}{'MB counted':>12}{'ms':>9}{'difference':>12}")
    found: dict[str, Any] = {"tokens": t, "hidden": d, "outputs": o}
    for name in calls:
        known = name in ("unfused", "folded", "kernel")
        predicted = predicted_bytes(name, t, d, o, 4) if known else None
        columns = [operators.get(name), predicted and predicted / 1e6, counted.get(name, 0) / 1e6 or None]
        cells = [f"{c:{w_}.4g}" if c else " " * w_ for c, w_ in zip(columns, (10, 14, 12), strict=True)]
        print(f"{name:14}{''.join(cells)}{ms[name]:9.3f}{errors.get(name, 0.0):12.1e}")
        key = name.replace(" ", "_")
        found[f"{key}_ms"] = ms[name]
        if predicted:
            found[f"{key}_predicted_bytes"] = predicted
        if name in errors:
            found[f"{key}_difference"] = errors[name]
            found[f"unfused_over_{key}"] = ms["unfused"] / ms[name]
    found["predicted_is_counted"] = all(predicted_bytes(name, t, d, o, 4) == n for name, n in counted.items())
    return found


if __name__ == "__main__":
    script.run(main)
