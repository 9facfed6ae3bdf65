"""Recording where tokens are routed: every choice once, the same numbers, nothing left behind."""

import pytest
import torch
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.errors import RequestError
from comfyui_hywu.hywu_core.lora.routing import recording
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.hywu_core.sampling.taylor import TaylorSettings

from ..placement.plans import stage
from ..placement.test_arrangements import LAYERS, LENGTH, folder, load, run  # noqa: F401

TOP_K, EXPERTS = 2, 8


@pytest.fixture
def plain(folder):  # noqa: F811
    return load(folder)


def free(backbone) -> bool:
    return all(layer.mlp.gate.counts_E is None for layer in backbone.model.layers)


def test_it_counts_what_the_routers_choose(plain):
    chosen, expected = [], run(plain)
    hooks = [layer.mlp.gate.register_forward_hook(lambda gate, given, out, number=number: chosen.append((number, out[0])))
             for number, layer in enumerate(plain.model.layers)]
    with recording(plain) as routing:
        assert torch.equal(run(plain), expected)
    for hook in hooks:
        hook.remove()
    wanted = torch.zeros(LAYERS, EXPERTS, dtype=torch.int64)
    for number, expert_TK in chosen:
        wanted[number] += torch.bincount(expert_TK.flatten(), minlength=EXPERTS)
    assert torch.equal(routing.counts(), wanted)
    assert routing.counts().dtype == torch.int64
    # Two rows of a prompt and three tokens.
    assert (routing.counts().sum(1) == 2 * (LENGTH + 3) * TOP_K).all()
    assert free(plain)


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "as ComfyUI runs it"])
@pytest.mark.parametrize(("stages", "changes"), [
    ((stage(0, 2), stage(2, 3)), {"waves": True}),
    ((stage(0, 2, (0, 1)), stage(2, 3, (3,), "disk")), {"waves": True}),
    ((stage(0, 5, range(5), "disk"),), {}),
    ((stage(0, 5, range(5), on_host=True),), {}),
], ids=["waves", "waves, streamed", "from disk", "experts on the host"])
def test_an_arrangement_changes_no_count(folder, plain, stages, changes, inference):  # noqa: F811
    with recording(plain) as expected:
        run(plain)
    placed = load(folder, *stages, **changes)
    with torch.inference_mode(inference), recording(placed) as found:
        run(placed)
    assert torch.equal(found.counts(), expected.counts())
    assert free(placed)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_after_an_error_or_cancel(plain, error):
    with pytest.raises(error), recording(plain) as routing:
        run(plain)
        raise error
    assert free(plain) and routing.counts().sum() > 0
    before = routing.counts()
    run(plain)
    assert torch.equal(routing.counts(), before)


def test_a_second_recording_is_refused(plain):
    with recording(plain), pytest.raises(RequestError, match="recorded already"), recording(plain):
        pass
    assert free(plain)


def test_layers_without_experts_have_zeros(tmp_path):
    from ..tiny import write_backbone

    placed = load(write_backbone(tmp_path / "dense", moe_layer_num_skipped=1))
    with recording(placed) as routing:
        run(placed)
    counts = routing.counts()
    assert (counts[0] == 0).all() and counts[1].sum() > 0


def test_a_picture_is_the_same_bits_and_skipped_steps_do_not_count(tiny_model, photo):
    condition = encode(tiny_model, [photo], "make it blue")
    settings = {"steps": 4, "guidance": 2.5, "seed": 3}
    with recording(tiny_model.backbone) as whole:
        latent = sample(tiny_model, condition, **settings)
    assert torch.equal(latent, sample(tiny_model, condition, **settings))
    with recording(tiny_model.backbone) as skipping:
        sample(tiny_model, condition, **settings, taylor=TaylorSettings(interval=2, first_steps=1))
    assert (skipping.counts().sum(1) < whole.counts().sum(1)).all()
