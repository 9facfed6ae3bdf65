"""The steps of an edit on a tiny random checkpoint: counts, seeds, settings, cancel, variants of the backbone, bad requests."""

from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core import edit as edit_module
from comfyui_hywu.hywu_core.backbone import inputs
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.edit import edit
from comfyui_hywu.hywu_core.errors import LoRAError, PictureError, PromptError, RequestError
from comfyui_hywu.hywu_core.generator.handle import load_generator, write_lora
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.sampling import denoise as denoise_module
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.sampling.schedule import Schedule
from comfyui_hywu.hywu_core.sampling.taylor import TaylorSettings
from comfyui_hywu.hywu_core.text.template import Sequence
from comfyui_hywu.hywu_core.think import Continuation, think
from comfyui_hywu.tests.tiny import write_backbone, write_generator
from PIL import Image

THOUGHT = "<think>it is dark</think><recaption>a bright picture</recaption>"


@pytest.fixture(scope="module")
def condition(tiny_model, photo):
    return encode(tiny_model, [photo], "make it brighter", THOUGHT)


@pytest.fixture(scope="module")
def adapted(tiny_model, tiny_generator, condition):
    return inject(tiny_model, write_lora(tiny_generator, condition))


def carried(model) -> int:
    return sum(len(module.attached()) for _, module in model.backbone.adapted_modules())


class Counting:
    """Counts the calls of some methods of a module while the block runs."""

    def __init__(self, monkeypatch, owner, *names):
        self.calls = dict.fromkeys(names, 0)
        for name in names:
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def _counted(self, name, function):
        def call(*arguments, **keywords):
            self.calls[name] += 1
            return function(*arguments, **keywords)
        return call


def test_an_edit_encodes_each_source_once_and_prefills_once(tiny_model, tiny_generator, photo, monkeypatch):
    """One run of the stages for condition and ratio, one for the beginning of both guidance rows, one a denoise step."""
    vae = Counting(monkeypatch, tiny_model.backbone.vae, "encode")
    walk = Counting(monkeypatch, tiny_model.backbone, "run")
    edit(tiny_model, tiny_generator, [photo, photo.rotate(90)], "combine them", thinking=THOUGHT, steps=3)
    assert vae.calls["encode"] == 2
    assert walk.calls["run"] == 1 + 1 + 3


def test_the_same_request_gives_the_same_bits_and_another_seed_another_picture(adapted, condition):
    def run(seed):
        return sample(adapted, condition, steps=2, seed=seed)

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))


def test_requested_steps_guidance_and_shift_are_honoured(adapted, condition):
    steps = []
    sample(adapted, condition, steps=5, on_tick=lambda done, total, latent: steps.append((done, total)))
    assert steps[-1] == (5, 5)
    base = sample(adapted, condition, steps=2)
    assert not torch.equal(base, sample(adapted, condition, steps=2, guidance=4.0))
    assert not torch.equal(base, sample(adapted, condition, steps=2, shift=1.0))
    defaults = adapted.generation
    same = sample(adapted, condition, steps=2, guidance=defaults.diff_guidance_scale, shift=defaults.flow_shift)
    assert torch.equal(base, same)


def test_later_steps_on_the_cache_equal_full_passes(adapted, condition, monkeypatch):
    """Run step 1 as if it were step 0: same velocity up to rounding, so nothing stale is read from the cache."""
    latent = torch.randn(1, adapted.config.vae.latent_channels, 4, 4, generator=torch.Generator().manual_seed(3))
    bucket = denoise_module.choose_bucket(adapted, condition, "1:1")
    sequence = denoise_module.canvas_sequence(adapted, condition, bucket, 2.5)
    schedule = Schedule(3, 3.0)
    straight = denoise_module.denoise(adapted, condition, sequence, schedule, 2.5, latent)
    for step in range(3):
        single = Schedule(3, 3.0)
        single.timesteps, single.sigmas = schedule.timesteps[step:step + 1], schedule.sigmas[step:step + 2]
        monkeypatch.setattr(single, "next_timestep", lambda _, step=step: schedule.next_timestep(step))
        monkeypatch.setattr(single, "advance", lambda _, x, v, step=step: x + (
            schedule.sigmas[step + 1] - schedule.sigmas[step]) * v)
        latent = denoise_module.denoise(adapted, condition, sequence, single, 2.5, latent)
    torch.testing.assert_close(straight, latent, rtol=1e-4, atol=1e-4)


def test_guidance_1_needs_one_row_and_is_the_conditional_row(adapted, condition, monkeypatch):
    bucket = denoise_module.choose_bucket(adapted, condition, "auto")
    assert denoise_module.canvas_sequence(adapted, condition, bucket, 1.0).ids_BL.shape[0] == 1
    assert denoise_module.canvas_sequence(adapted, condition, bucket, 1.5).ids_BL.shape[0] == 2
    one = sample(adapted, condition, steps=2, guidance=1.0)
    almost = sample(adapted, condition, steps=2, guidance=1.0 + 1e-6)
    torch.testing.assert_close(one, almost, rtol=1e-4, atol=1e-4)


def test_without_a_lora_the_sampler_gives_the_plain_picture(tiny_model, adapted, condition):
    plain = sample(tiny_model, condition, steps=2)
    assert torch.equal(plain, sample(replace(adapted, loras=()), condition, steps=2))
    assert (plain - sample(adapted, condition, steps=2)).abs().max() > 1e-3


def test_without_pictures_it_paints_from_text(tiny_model, tiny_generator):
    result = edit(tiny_model, tiny_generator, [], "a red barn", thinking="", steps=1, size="1:1")
    assert result.picture.size == (64, 64) and result.condition.pictures == ()


@pytest.mark.parametrize("size, wanted", (("1:1", (64, 64)), ("64x64", (64, 64)), ("128x32", (128, 32)), ("700x300", None)))
def test_sizes_are_buckets(adapted, condition, size, wanted):
    latent = sample(adapted, condition, steps=1, size=size)
    height, width = (side * 16 for side in latent.shape[2:])
    if wanted:
        assert (height, width) == wanted
    else:
        assert height > width


def test_auto_restores_the_ratio_of_the_source(tiny_model, tiny_generator):
    """97:71 falls into a bucket of another ratio; if the backbone answers with that bucket the picture gets 97:71 back."""
    source = Image.new("RGB", (97, 71), (90, 120, 30))
    condition = encode(tiny_model, [source], "same size please", THOUGHT)
    matching = replace(condition, ratio_index=condition.pictures[0].bucket.index)
    bucket = matching.pictures[0].bucket
    painted = Image.new("RGB", (bucket.width, bucket.height))
    width, height = edit_module.restore(tiny_model, matching, painted).size
    assert abs(height / width - 71 / 97) < 0.03
    other = replace(condition, ratio_index=(bucket.index + 5) % 33)
    assert edit_module.restore(tiny_model, other, Image.new("RGB", (64, 64))).size == (
        denoise_module.choose_bucket(tiny_model, other, "auto").width,
        denoise_module.choose_bucket(tiny_model, other, "auto").height)


class Cancelled(Exception):
    pass


class CancelAt:
    """A tick that raises at its n-th call; counts calls."""

    def __init__(self, at=None):
        self.at, self.calls = at, 0

    def __call__(self, done, total, latent=None):
        if self.calls == self.at:
            raise Cancelled
        self.calls += 1


def stages(model, generator, condition, photo):
    return {
        "think": lambda tick: think(model, [photo], "brighter", max_new_tokens=4, on_tick=tick),
        "encode": lambda tick: encode(model, [photo], "brighter", THOUGHT, on_tick=tick).hidden_SD,
        "generate": lambda tick: write_lora(generator, condition, tick).digest,
        "sample": lambda tick: sample(model, condition, steps=3, on_tick=tick),
    }


@pytest.mark.parametrize("stage", ("think", "encode", "generate", "sample"))
def test_cancel_at_any_tick_stops_there_and_the_next_run_is_right(adapted, tiny_generator, condition, photo, stage):
    run = stages(adapted, tiny_generator, condition, photo)[stage]
    counter = CancelAt()
    wanted = run(counter)
    assert counter.calls >= 3
    for at in range(counter.calls):
        tick = CancelAt(at)
        with pytest.raises(Cancelled):
            run(tick)
        assert tick.calls == at and carried(adapted) == 0
    again = run(CancelAt())
    assert torch.equal(again, wanted) if isinstance(wanted, torch.Tensor) else again == wanted


def test_previews_are_estimates_of_the_clean_latent(adapted, condition):
    previews = []
    final = sample(
        adapted, condition, steps=3, on_tick=lambda done, total, latent: latent is None or previews.append(latent))
    assert len(previews) == 3
    # At the last step the estimate is the result: the step goes all the way to sigma 0.
    torch.testing.assert_close(previews[-1], final, rtol=1e-4, atol=1e-4)


def test_thinking_has_its_own_seed(tiny_model, photo):
    def run(seed, **options):
        return think(tiny_model, [photo], "brighter", seed=seed, max_new_tokens=6, **options)

    torch.manual_seed(1)
    first = run(3)
    torch.manual_seed(2)
    assert run(3) == first and first.startswith("<think>")
    assert len({run(seed) for seed in range(4)}) > 1
    assert run(3, mode="recaption").startswith("<recaption>")


def test_tokens_that_are_certain_can_be_told_together(tiny_model):
    ids = torch.randint(100, (1, 12), generator=torch.Generator().manual_seed(0))
    scores = []
    for together in ([[5], [6], [7], [8]], [[5, 6, 7], [8]]):
        continuation = Continuation(tiny_model, Sequence(ids), ())
        continuation([])
        scores.append([continuation(tokens) for tokens in together][-2:])
    for one_by_one, at_once in zip(*scores, strict=True):
        torch.testing.assert_close(at_once, one_by_one, rtol=1e-5, atol=1e-5)


def test_taylor_cache_skips_steps(adapted, condition, monkeypatch):
    walk = Counting(monkeypatch, adapted.backbone, "run")
    sample(adapted, condition, steps=10, taylor=TaylorSettings(interval=4))
    assert walk.calls["run"] < 8
    walk.calls["run"] = 0
    # From the first step on, which the reference cannot: its step 0 has the whole sequence.
    sample(adapted, condition, steps=6, taylor=TaylorSettings(interval=2, first_steps=0))
    assert walk.calls["run"] < 6


@pytest.mark.parametrize("flags", (
    {"cfg_distilled": True}, {"cfg_distilled": True, "use_meanflow": True}, {"use_meanflow": True},
    {"cond_token_attn_type": "full"}, {"cond_token_attn_type": "full_causal"}, {"cond_token_attn_type": "causal"},
    {"moe_layer_num_skipped": 1}, {"num_key_value_heads": 4}), ids=str)
def test_variants_of_the_backbone(tmp_path, photo, flags, monkeypatch):
    """Distilled, mean flow (also without distillation, where the reference fails), the other masks, dense layers.

    What is spared (the rows' common beginning, the mask of the canvas) changes nothing in any of them.
    """
    folder = write_backbone(tmp_path / "backbone", **flags)
    model = load_model(folder)
    condition = encode(model, [photo], "brighter", THOUGHT)
    latent = sample(model, condition, steps=2)
    assert latent.isfinite().all() and latent.shape[1] == model.config.vae.latent_channels
    if "moe_layer_num_skipped" not in flags:
        generator = load_generator(write_generator(tmp_path / "generator", folder))
        adapted = inject(model, write_lora(generator, condition))
        assert not torch.equal(latent, sample(adapted, condition, steps=2))
    if flags.get("cfg_distilled"):
        assert not torch.equal(latent, sample(model, condition, steps=2, guidance=6.0))
    monkeypatch.setattr(Sequence, "shared_prefix", 0)
    monkeypatch.setattr(inputs, "canvas_sight", lambda backbone, sequence: inputs.mask(
        backbone, sequence, torch.arange(*sequence.later_slice)))
    plain = sample(model, condition, steps=2)
    assert (plain - latent).abs().max() <= 1e-5 * plain.abs().max()


def test_bf16_stays_close_to_fp32(tiny_folders, photo):
    """Weights rounded to bf16 everywhere: the condition's error against fp32 stays within bf16's own rounding."""
    wanted = encode(load_model(tiny_folders[0]), [photo], "brighter", THOUGHT).hidden_SD
    model = load_model(tiny_folders[0], dtype=torch.bfloat16)
    assert model.backbone.model.layers[0].mlp.gate.wg.weight.dtype == torch.float32
    got = encode(model, [photo], "brighter", THOUGHT)
    assert got.hidden_SD.dtype == torch.bfloat16
    error = (got.hidden_SD.float() - wanted).norm() / wanted.norm()
    # bf16 has 8 bits: 0.4 % a rounding, some tens of roundings deep; a wrong cast anywhere is far above.
    assert error < 0.05
    generator = load_generator(tiny_folders[1], dtype=torch.bfloat16)
    latent = sample(inject(model, write_lora(generator, got)), got, steps=2)
    assert latent.dtype == torch.float32 and latent.isfinite().all()


@pytest.mark.parametrize("settings, message", (
    ({"steps": 0}, "0 steps"), ({"steps": 1001}, "1001 steps"), ({"guidance": float("nan")}, "guidance nan"),
    ({"guidance": -1.0}, "guidance -1"), ({"shift": 0.0}, "shift 0"), ({"size": "huge"}, "size 'huge'")))
def test_settings_out_of_range_are_refused(adapted, condition, settings, message):
    with pytest.raises(RequestError, match=message):
        sample(adapted, condition, **{"steps": 1, **settings})


def test_bad_requests_are_refused(tiny_model, photo):
    with pytest.raises(PromptError, match="empty"):
        encode(tiny_model, [photo], "  ")
    with pytest.raises(PromptError, match="2600"):
        encode(tiny_model, [photo], "word " * 20_000)
    with pytest.raises(PictureError, match="9000"):
        encode(tiny_model, [Image.new("RGB", (1, 9000))], "brighter")
    with pytest.raises(PictureError, match="4 pictures"):
        encode(tiny_model, [photo] * 4, "combine")


def test_a_picture_of_nan_is_an_error_and_no_black_image(tiny_model, adapted, condition):
    lora = adapted.loras[0].lora
    huge = type(lora).from_tensors({key: tensor * 1e25 for key, tensor in lora.tensors.items()}, lora.alpha, lora.provenance)
    with pytest.raises(RequestError, match="NaN or Inf .*strengths: 1.5"):
        sample(inject(tiny_model, huge, 1.5), condition, steps=1)
    assert carried(tiny_model) == 0


def test_a_condition_of_another_backbone_is_refused(tiny_model, condition):
    with pytest.raises(LoRAError, match="0123456789abcdef"):
        sample(tiny_model, replace(condition, backbone_fingerprint="0123456789abcdef"), steps=1)
