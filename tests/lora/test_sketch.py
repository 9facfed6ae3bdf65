"""Sketches: the same numbers everywhere, unbiased, no worse than the theory says, and nothing odd read from a file."""

import base64

import numpy as np
import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError
from comfyui_hywu.hywu_core.lora.algebra import blend, scaled
from comfyui_hywu.hywu_core.lora.sketch import LENGTH, error_limit, sketch, sketch_of_text, sketch_text
from comfyui_hywu.hywu_core.lora.spectrum import inner, pairs, spectra
from comfyui_hywu.hywu_core.lora.value import LoRA

SHAPES = {"self_attn.qkv_proj": (24, 40, 0), "mlp.experts.w1": (24, 16, 5)}
RANK, LAYERS, SALTS = 3, 3, 300


def lora(seed: int, near: LoRA | None = None, **changes) -> LoRA:
    """Random; with ``near`` its B is half the other's."""
    noise, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(LAYERS):
        for name, (width, out, experts) in SHAPES.items():
            front, path = (experts,) * bool(experts), f"model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A"] = torch.randn(*front, RANK, width, generator=noise)
            tensors[f"{path}.lora_B"] = torch.randn(*front, out, RANK, generator=noise)
            if near is not None:
                tensors[f"{path}.lora_A"] = near.tensors[f"{path}.lora_A"]
                tensors[f"{path}.lora_B"] += near.tensors[f"{path}.lora_B"]
    return LoRA.from_tensors(tensors, 6.0, **changes)


def exact(one: LoRA, two: LoRA) -> float:
    return float(sum(inner(left, right) for left, right in zip(pairs(one), pairs(two), strict=True)))


@pytest.mark.parametrize("case", ["itself", "near", "unrelated", "opposite"])
def test_inner_products_are_right_in_the_mean_and_as_close_as_promised(case):
    one = lora(0)
    two = {"itself": one, "near": lora(1, one), "unrelated": lora(2), "opposite": scaled(one, -0.5)}[case]
    norms = spectra(one), spectra(two)
    size = norms[0].norm * norms[1].norm
    wanted = exact(one, two) / size
    found = np.array([float(sketch(one, salt=salt).double() @ sketch(two, salt=salt).double()) for salt in range(SALTS)]) / size
    limit = error_limit(*norms, wanted)
    assert abs(found.mean() - wanted) < 4 * limit / SALTS**0.5
    assert found.std() < 1.1 * limit
    # The bound is no idle one: without it the test would pass with any error.
    assert limit < 0.4


def test_one_sketch_is_within_four_deviations():
    loras = [lora(seed) for seed in range(6)] + [lora(9, lora(0))]
    sketches, norms = [sketch(each) for each in loras], [spectra(each) for each in loras]
    for left in range(len(loras)):
        for right in range(left):
            size = norms[left].norm * norms[right].norm
            wanted = exact(loras[left], loras[right]) / size
            limit = error_limit(norms[left], norms[right], wanted)
            assert abs(float(sketches[left] @ sketches[right]) / size - wanted) < 4 * limit


def test_a_sketch_is_linear_and_does_not_hang_on_how_the_update_is_written():
    one, two = lora(0), lora(1)
    together = sketch(blend([one, two], [2.0, -0.5]))
    torch.testing.assert_close(together, 2 * sketch(one) - 0.5 * sketch(two), rtol=1e-4, atol=1e-3)
    turned = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(3)))[0]
    same = LoRA.from_tensors({key: turned @ tensor if key.endswith("A") else tensor @ turned.T
                              for key, tensor in one.tensors.items()}, one.alpha)
    torch.testing.assert_close(sketch(same), sketch(one), rtol=1e-4, atol=1e-3)


def test_the_numbers_are_those_that_were_written_into_files():
    """Ones everywhere: whoever changes the random numbers must raise VERSION."""
    ones = LoRA.from_tensors({key: torch.ones_like(tensor) for key, tensor in lora(0).tensors.items()}, 1.0)
    found = sketch(ones)
    assert found.shape == (LENGTH,) and found.dtype == torch.float32
    assert [round(float(value), 3) for value in found[:6]] == KNOWN
    assert round(float(found.double().square().sum())) == KNOWN_SQUARE


KNOWN, KNOWN_SQUARE = [6.25, 0.5, -1.0, 1.0, 4.25, 2.75], 6008


def test_targets_in_another_order_change_nothing():
    one = lora(0)
    turned = LoRA.from_tensors(one.tensors, one.alpha, target_order=tuple(reversed(SHAPES)))
    torch.testing.assert_close(sketch(turned), sketch(one), rtol=1e-5, atol=1e-4)


def test_ticks():
    seen = []
    sketch(lora(0), lambda done, total, latent: seen.append((done, total)))
    assert seen == [(done, LAYERS * len(SHAPES)) for done in range(1, LAYERS * len(SHAPES) + 1)]


# ---- as text


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6, 0.0])
def test_text_keeps_three_digits_at_any_scale(factor):
    values = sketch(scaled(lora(0), factor))
    text = sketch_text(values)
    assert len(text) < 3000 and text.isascii()
    assert (sketch_of_text(text) - values).abs().max() <= 5e-4 * values.abs().max()


def hostile() -> dict[str, str]:
    good = sketch_text(sketch(lora(0)))
    raw = bytearray(base64.b64decode(good[2:]))
    raw[4:6] = np.float16("nan").tobytes()
    infinite = bytearray(base64.b64decode(good[2:]))
    infinite[:4] = np.float32("inf").tobytes()
    return {"nothing": "", "another version": "2" + good[1:], "short": good[:-8], "long": good + "AAAA",
            "no base64": "1:" + "ä" * 40, "NaN": "1:" + base64.b64encode(raw).decode(),
            "infinite": "1:" + base64.b64encode(infinite).decode(), "huge": "1:" + "A" * 1_000_000}


@pytest.mark.parametrize("name", hostile())
def test_what_is_no_sketch_is_refused(name):
    with pytest.raises(LoRAError, match="stored sketch"):
        sketch_of_text(hostile()[name])


def test_what_is_not_finite_is_not_written():
    broken = sketch(lora(0))
    broken[3] = float("nan")
    with pytest.raises(LoRAError, match="finite"):
        sketch_text(broken)
