"""Pictures of LoRAs: right numbers in the right places, for odd LoRAs too, and no boxes instead of Chinese."""

import numpy as np
import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError
from comfyui_hywu.hywu_core.lora import drawing, pictures
from comfyui_hywu.hywu_core.lora.algebra import scaled
from comfyui_hywu.hywu_core.lora.map import Point, lora_map
from comfyui_hywu.hywu_core.lora.map_picture import _apart, map_picture
from comfyui_hywu.hywu_core.lora.report import comparison_report, panel_data, report
from comfyui_hywu.hywu_core.lora.sketch import LENGTH
from comfyui_hywu.hywu_core.lora.spectrum import Spectra, compare, spectra
from comfyui_hywu.hywu_core.lora.weight_norms import weight_norms
from PIL import Image

from .test_attach import random_lora


@pytest.fixture
def lora(tiny_model):
    return random_lora(tiny_model)


@pytest.fixture
def found(lora) -> Spectra:
    return spectra(lora)


def experts_of(found: Spectra) -> tuple[int, int]:
    return tuple(found.expert_energy().shape)


def has_colours(picture: Image.Image) -> bool:
    return picture.mode == "RGB" and len(picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).getcolors()) > 8


def test_norms_are_those_of_the_formed_updates_over_the_weights(tiny_model, lora, found):
    relative = pictures.relative_norms(found, weight_norms(tiny_model.backbone))
    layer = tiny_model.backbone.model.layers[1]
    (a, b), weight = lora.layer(1)["self_attn.o_proj"], layer.self_attn.o_proj.weight
    wanted = (lora.scale * b @ a).norm() / weight.norm()
    column = [target.name for target in lora.targets].index("self_attn.o_proj")
    assert float(relative[1, column]) == pytest.approx(float(wanted), rel=1e-5)
    a, b = lora.layer(0)["mlp.experts.w2"]
    wanted = (lora.scale * b @ a).norm() / tiny_model.backbone.model.layers[0].mlp.experts.down_proj.norm()
    column = [target.name for target in lora.targets].index("mlp.experts.w2")
    assert float(relative[0, column]) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(pictures.relative_norms(found, None), found.norms())


def test_every_picture_is_drawn(tiny_model, lora, found):
    routing = torch.randint(0, 50, experts_of(found))
    names, comparison = [target.name for target in lora.targets], compare(lora, random_lora(tiny_model, 1))
    for picture in (pictures.norm_map(found), pictures.norm_map(found, weight_norms(tiny_model.backbone)),
                    pictures.spectrum_plot(found), pictures.experts_picture(found), pictures.experts_picture(found, routing),
                    pictures.comparison_picture(names, comparison)):
        assert has_colours(picture) and 400 < picture.width < 1600


def test_a_larger_update_is_a_lighter_cell(found):
    """The cell of the largest norm is the lightest of the map: found by its colour, in its row and column."""
    values, name = dict(found.values), found.targets[1].name
    values[1, name] = values[1, name] * 100
    picture = np.asarray(pictures.norm_map(Spectra(values, found.num_layers, found.targets))).astype(int)
    lightest = abs(picture - [253, 231, 37]).sum(-1) < 6
    lightest[:, drawing.LEFT + 2 * 96 :] = False  # the colour bar
    rows, columns = np.nonzero(lightest)
    assert drawing.LEFT + 96 - 2 <= columns.min() and columns.max() - columns.min() > 80
    assert 30 < np.ptp(rows) <= 40  # one row, the second of seven
    assert abs(rows.min() - (56 + drawing.TOP - 24) - 40) < 3


def test_a_lora_of_zeros_and_one_without_experts_are_drawn(lora):
    nothing = spectra(scaled(lora, 0.0))
    linear = Spectra({key: value for key, value in spectra(lora).values.items() if "experts" not in key[1]}, lora.num_layers,
                     tuple(target for target in lora.targets if not target.experts))
    for case in (nothing, linear):
        for picture in (pictures.norm_map(case), pictures.spectrum_plot(case), pictures.experts_picture(case)):
            assert picture.width > 400
        assert report(lora, case)


def test_weights_and_routing_of_another_backbone_are_refused(tiny_model, lora, found):
    norms = weight_norms(tiny_model.backbone)
    fewer = type(norms)({key: value for key, value in norms.values.items() if key[0] == 0})
    with pytest.raises(LoRAError, match="differ in 7 of 14"):
        pictures.norm_map(found, fewer)
    with pytest.raises(LoRAError, match="routing"):
        pictures.experts_picture(found, torch.ones(3, 5, dtype=torch.int64))


# ---- report and panel


def test_the_report_says_what_is_in_the_pictures(tiny_model, lora, found):
    routing = torch.randint(0, 50, experts_of(found))
    text = report(lora, found, weight_norms(tiny_model.backbone), routing)
    for target in lora.targets:
        assert target.name in text
    assert "experts" in text and f"{int(routing.sum()):,}" in text and tiny_model.fingerprint in text
    other = random_lora(tiny_model, 1)
    assert "cosine" in comparison_report(lora, other, compare(lora, other))


def test_a_zero_update_has_no_cosine_and_it_is_said_without_a_nan(lora):
    nothing = scaled(lora, 0.0)
    found = compare(lora, nothing)
    text = comparison_report(lora, nothing, found)
    assert "none, an update is zero" in text and "nan" not in text
    assert pictures.comparison_picture([target.name for target in lora.targets], found).mode == "RGB"


def test_the_panels_data_are_the_numbers(tiny_model, lora, found):
    import json

    routing = torch.randint(0, 50, experts_of(found))
    data = json.loads(json.dumps(panel_data(lora, found, weight_norms(tiny_model.backbone), routing), allow_nan=False))
    layers, experts = experts_of(found)
    assert data["layers"] == layers and data["routing"] == routing.tolist()
    assert [target["name"] for target in data["targets"]] == [target.name for target in lora.targets]
    for number, target in enumerate(lora.targets):
        assert data["norms"][1][number] == pytest.approx(float(found.norms()[1, number]), rel=1e-3)
        values = found.values[1, target.name]
        if target.experts:
            assert len(data["experts"][str(number)][1]) == experts
            assert data["experts"][str(number)][1][2] == pytest.approx(float(values[2].norm()), rel=1e-3)
            values = values.square().mean(0).sqrt()
        assert data["spectra"][1][number] == pytest.approx(values.tolist(), rel=1e-3)
    assert panel_data(lora, found)["relative"] is None and panel_data(lora, found)["routing"] is None


def test_the_panels_data_are_small_at_the_published_sizes():
    import json

    from comfyui_hywu.hywu_core.config import LoRATarget

    targets = [LoRATarget(f"self_attn.number_{number}", 8, 8) for number in range(4)]
    targets += [LoRATarget(f"mlp.experts.w{number}", 8, 8, 64) for number in (1, 2, 3)]
    noise = torch.Generator().manual_seed(0)
    values = {(layer, target.name): torch.rand((target.experts,) * bool(target.experts) + (16,), generator=noise,
                                               dtype=torch.float64) * 1e-3
              for layer in range(32) for target in targets}
    from types import SimpleNamespace

    lora = SimpleNamespace(rank=16, provenance=SimpleNamespace(instruction="x" * 400, made=""))
    data = panel_data(lora, Spectra(values, 32, tuple(targets)), None, torch.randint(0, 10**7, (32, 64)))
    assert len(json.dumps(data, separators=(",", ":"))) < 300_000


# ---- text and colours


def test_chinese_is_never_boxes(monkeypatch):
    chinese = "把天空变成蓝色"
    monkeypatch.setattr(drawing, "CJK_FONTS", ())
    drawing.cjk_font.cache_clear()
    assert drawing.drawable(chinese, 20) is None
    sheet = drawing.Sheet(200, 40)
    sheet.text(5, 5, chinese, 20)
    assert sheet.done().getextrema() == ((255, 255),) * 3
    drawing.cjk_font.cache_clear()


def test_text_is_one_line_without_what_no_font_has():
    assert drawing.drawable("make it\nblue \x00\u202e🎉!", 16)[0].split() == ["make", "it", "blue", "!"]
    assert drawing.drawable("", 16)[0] == ""


@pytest.mark.parametrize("text", ["word " * 200, "x" * 2_000_000], ids=["long", "endless"])  # Pillow refuses a million
def test_long_text_is_cut(text):
    sheet = drawing.Sheet(300, 40)
    sheet.text(0, 5, text, 16, width=100)
    shown = np.asarray(sheet.done())
    assert shown[:, 105:].min() == 255 and shown.min() < 128


def test_colours_run_from_dark_to_light():
    light = drawing.viridis(np.linspace(0, 1, 50)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light) > 0).all()
    assert drawing.blue_red(np.array([0.5])).tolist() == [[247, 247, 247]]


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 1.0], [0.01, 5.0], [np.nan, 2.0], [1e-30, 1.0]])
def test_scales_fit_their_values(values):
    scale = drawing.Scale.of(np.array(values))
    share = scale.share(np.array(values))
    assert np.nanmax(share) <= 1 + 1e-9
    assert scale.ticks()[-1] == pytest.approx(scale.high) and len(scale.ticks()) == 5


# ---- the map's picture


def point(number: int, thumbnail=None, instruction: str | None = None) -> Point:
    noise = torch.Generator().manual_seed(number)
    values = torch.randn(LENGTH, generator=noise)
    return Point(f"{number}.safetensors", instruction or f"request {number}", "f" * 16, values, thumbnail)


@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_maps_of_any_size_are_drawn(count):
    points = [point(number, Image.new("RGB", (40, 60), "orange") if number % 2 else None) for number in range(count)]
    picture = map_picture(lora_map(points))
    assert has_colours(picture)


def test_equal_loras_do_not_hide_each_other():
    places = np.full((12, 2), 500.0)
    tiles = _apart(places, 100, 100, (0, 0, 1000, 1000))
    gaps = abs(tiles[:, None] - tiles) + np.eye(12)[..., None] * 1000
    assert gaps.max(-1).min() > 80
    assert tiles.min() >= 50 and tiles.max() <= 950
