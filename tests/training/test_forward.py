"""The training forward is inference's: the same hidden states, the same words, the same painted picture."""

import pytest
import torch
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.lora.attach import attached_rows, inject
from comfyui_hywu.hywu_core.lora.value import LoRA
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.seeds import seeded
from comfyui_hywu.hywu_core.training.batches import Draws
from comfyui_hywu.hywu_core.training.forward import (
    GOOD_ENOUGH,
    decibels,
    embed_pictures,
    flow_errors,
    flow_loss,
    predict_clean,
    prefix_hidden,
    word_loss,
)
from PIL import Image

# Both sides use the exported weights in float32. What is left: latents by one convolution instead of the VAE's own (1e-5), and
# the order of additions. Hidden states reach 120, latents 10; measured are 1.4e-5 and 6e-5.
HIDDEN, LATENT = 2e-4, 5e-4


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=("thinking", "no thinking", "two pictures"))
def request_batch(request, square_batches):
    thinks, two = request.param != "no thinking", request.param == "two pictures"
    return square_batches.draw(2, Draws.of(4, request.param, 0), thinks=thinks, pictures=1 + two)


def condition_of(handle, batch, row: int):
    pictures = [Image.fromarray(source.pixels[row]) for source in batch.sources]
    return encode(handle, pictures, batch.instructions[row], batch.thinking[row])


def random_lora(backbone) -> LoRA:
    noise, tensors = torch.Generator().manual_seed(3), {}
    for name, module in backbone.adapted_modules():
        for target in module.targets():
            path = f"{name}.{target.name}".rstrip(".")
            a, b = (torch.randn(shape, generator=noise) for shape in (target.a_shape(4), target.b_shape(4)))
            tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"] = a * target.in_features**-0.5, 0.02 * b
    return LoRA.from_tensors(tensors, 4.0)


def test_the_prefix_is_the_condition(handle, request_batch):
    hidden = prefix_hidden(handle.backbone, request_batch, embed_pictures(handle.backbone, request_batch))
    for row in range(request_batch.rows):
        wanted = condition_of(handle, request_batch, row).hidden_SD
        torch.testing.assert_close(hidden[row], wanted, rtol=0, atol=HIDDEN)


def test_the_word_loss_is_inferences_surprise(handle, request_batch):
    """-log p of each taught token at its place, by the scores that inference makes of its condition."""
    backbone = handle.backbone
    loss, right = word_loss(
        backbone, prefix_hidden(backbone, request_batch, embed_pictures(backbone, request_batch)), request_batch)
    surprises, hits = [], []
    for row in range(request_batch.rows):
        scores = backbone.logits(condition_of(handle, request_batch, row).hidden_SD)
        for place, answer in enumerate(request_batch.answers_BL[row].tolist()):
            if answer >= 0:
                surprises.append(-scores[place].log_softmax(-1)[answer])
                hits.append(int(scores[place].argmax()) == answer)
    torch.testing.assert_close(loss, torch.stack(surprises).mean(), rtol=1e-4, atol=1e-4)
    assert right == pytest.approx(sum(hits) / len(hits))


def test_the_clean_picture_at_t_1_is_one_step_of_sampling(handle, request_batch):
    backbone, lora = handle.backbone, random_lora(handle.backbone)
    noise = torch.randn(1, 64, 12, 12, generator=seeded(5)).bfloat16().float()
    pictures, t = embed_pictures(backbone, request_batch), torch.ones(request_batch.rows)
    rows = noise.expand(request_batch.rows, -1, -1, -1)
    plain = predict_clean(backbone, request_batch, pictures, rows, t)
    with attached_rows(backbone, {key: value[None] for key, value in lora.tensors.items()}, lora.scale):
        edited = predict_clean(backbone, request_batch, pictures, rows, t)
    assert (edited - plain).abs().max() > 1  # the LoRA acts, so the comparison says something
    for row in range(request_batch.rows):
        condition = condition_of(handle, request_batch, row)
        for clean, model in ((plain, handle), (edited, inject(handle, lora))):
            wanted = sample(model, condition, steps=1, seed=5, size="192x192")
            torch.testing.assert_close(clean[row : row + 1], wanted, rtol=0, atol=LATENT)


def test_no_error_is_left_where_the_prediction_is_right(handle, request_batch, monkeypatch):
    """Errors are in pixels: a latent that is off by one in channel c costs weight_c² / 768 / 4, at every t."""
    weight = torch.linspace(0.5, 2, 64)
    off = torch.zeros_like(request_batch.wanted_bchw)
    where = "comfyui_hywu.hywu_core.training.forward.predict_clean"
    monkeypatch.setattr(where, lambda *_: request_batch.wanted_bchw + off)
    errors = flow_errors(handle.backbone, request_batch, [], weight, torch.Generator().manual_seed(0))
    assert errors.tolist() == [0.0] * request_batch.rows
    off[1, 7] = 1.0
    errors = flow_errors(handle.backbone, request_batch, [], weight, torch.Generator().manual_seed(0))
    assert errors[0] == 0 and float(errors[1]) == pytest.approx(float(weight[7]) ** 2 / 768 / 4)


def test_times_and_noise_come_from_the_generator_alone(handle, request_batch, monkeypatch):
    seen = []
    where = "comfyui_hywu.hywu_core.training.forward.predict_clean"
    monkeypatch.setattr(where, lambda backbone, batch, pictures, noise, t: seen.append((noise, t)) or batch.wanted_bchw)
    for seed in (0, 0, 1):
        flow_errors(handle.backbone, request_batch, [], torch.ones(64), torch.Generator().manual_seed(seed))
    (noise, t), (again, t_again), (other, _) = seen
    assert torch.equal(noise, again) and torch.equal(t, t_again) and not torch.equal(noise, other)
    assert not torch.equal(noise[0], noise[1])


def test_the_loss_counts_decibels_and_flattens_where_nothing_is_to_be_seen():
    errors = torch.tensor([1e-2, 1e-3])
    assert decibels(errors).tolist() == pytest.approx([20, 30])
    slopes = [float(torch.func.grad(flow_loss)(errors[i : i + 1])) * float(errors[i]) for i in range(2)]
    assert slopes == pytest.approx([1e-2 / (1e-2 + GOOD_ENOUGH), 0.5])
