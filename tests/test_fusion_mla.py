"""Chapter 7's two ideas in plain torch: fusion moves the bytes it says, latent attention is attention."""

from __future__ import annotations

import pytest
import torch

from ch06_vllm.engine import kernels
from ch07_sglang_routing import fusion, mla

CPU = torch.device("cpu")


@pytest.mark.parametrize(("t", "d", "o"), [(1, 16, 8), (7, 32, 96), (64, 48, 1)])
def test_the_bytes_of_both_forms_are_those_at_the_dispatcher(t: int, d: int, o: int) -> None:
    x, r, g, w = fusion.tensors(t, d, o, torch.float32, CPU, seed=0)
    for name, form in (("unfused", fusion.unfused), ("folded", fusion.folded)):
        with fusion.Traffic() as traffic:
            form(x, r, g, w)
        assert traffic.bytes == fusion.predicted_bytes(name, t, d, o, 4)


def test_a_folded_weight_gives_the_same_projection_in_float64() -> None:
    x, r, g, w = fusion.tensors(33, 64, 20, torch.float64, CPU, seed=3)
    n = torch.nn.functional.rms_norm(x + r, (64,), g, fusion.EPS)
    for form, weight in ((fusion.unfused, w), (fusion.folded, w * g)):
        y, h = form(x, r, g, weight)
        torch.testing.assert_close(y, n @ w.t(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(h, x + r, rtol=0, atol=0)
    y, _ = fusion.folded(x, r, g, w)
    assert not torch.allclose(y, n @ w.t())  # not by itself: the norm's weight must be in W


def test_the_fused_kernel_gives_the_same_in_float32() -> None:
    loops = kernels.kernels("cpu", torch.float32, 64)
    if not isinstance(loops, kernels.InC):
        pytest.skip("needs a C compiler")
    x, r, g, w = fusion.tensors(5, 64, 20, torch.float32, CPU, seed=1)
    wanted = fusion.unfused(x, r, g, w)
    for found, one in zip(fusion.fused_kernel(loops)(x.clone(), r, g, w), wanted, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-5, atol=1e-5)


SIZES = mla.Sizes(hidden=48, heads=3, nope=8, rope=4, value=6, latent=10)


@pytest.mark.parametrize("context", [1, 2, 37])
def test_attention_over_the_latent_cache_is_that_over_full_keys_and_values(context: int) -> None:
    assert mla.largest_difference(SIZES, context, 2, CPU, seed=4) < 1e-12
    assert mla.largest_difference(mla.PRESETS["small"], context, 1, CPU, seed=5) < 1e-12


def test_the_reference_is_attention_as_torch_has_it() -> None:
    layer = mla.LatentAttention(SIZES, torch.float64, CPU)
    x_btd = torch.randn(2, 9, SIZES.hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys, values = layer.full_cache(*layer.latent_cache(x_btd))
    query = torch.cat(layer.queries(x_btd[:, -1], 8), dim=-1).unsqueeze(2)
    heads = torch.nn.functional.scaled_dot_product_attention(query, keys, values).squeeze(2)
    wanted = torch.einsum("bhv,dhv->bd", heads, layer.out_dhv)
    torch.testing.assert_close(layer.attend_full(x_btd[:, -1], keys, values), wanted, rtol=1e-12, atol=1e-12)


def test_the_cache_has_the_bytes_of_the_formula() -> None:
    layer = mla.LatentAttention(SIZES, torch.float32, CPU)
    x_btd = torch.randn(3, 11, SIZES.hidden)
    latent = layer.latent_cache(x_btd)
    for cache, elements in ((latent, SIZES.latent_elements()), (layer.full_cache(*latent), SIZES.full_elements())):
        assert sum(a.untyped_storage().nbytes() for a in cache) == 3 * 11 * elements * 4
    assert 2 * 60 * mla.PRESETS["deepseek-v2"].latent_elements() == 69_120  # bf16, its 60 layers


def test_rotation_makes_a_score_depend_on_the_distance_alone() -> None:
    a, b = torch.randn(2, 1, 8, dtype=torch.float64)
    scores = [
        float((mla.rotate(a, torch.tensor([m])) * mla.rotate(b, torch.tensor([n]))).sum())
        for m, n in ((5, 2), (93, 90), (5, 3))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-12)
    assert scores[0] != pytest.approx(scores[2], abs=1e-6)
