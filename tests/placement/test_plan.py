"""Plans for machines that people have: sane, within what is free, faster with more hardware; and errors that help."""

import random
import re
from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.cli import main
from comfyui_hywu.hywu_core.errors import PlacementError
from comfyui_hywu.hywu_core.placement.build import whole
from comfyui_hywu.hywu_core.placement.devices import GIB, parse_devices
from comfyui_hywu.hywu_core.placement.plan import plan
from comfyui_hywu.hywu_core.placement.request import Request
from comfyui_hywu.hywu_core.placement.table import describe

from ..tiny import write_backbone
from .conftest import DATA

MACHINES = (
    ("8x40", "auto"), ("4x80", "auto"), ("2x141", "auto"), ("1x141", "fp8"), ("1x96", "int4"), ("2x48", "auto"),
    ("2x48", "int4"), ("1x24+64ram", "auto"), ("24,48+96ram", "auto"), ("48:24+64ram", "auto"), ("24:16+64ram", "int4"),
    ("cpu+24ram", "auto"), ("cpu+192ram", "auto"), ("3x24,1x12+64ram", "int4"))


@pytest.fixture(scope="module")
def planned(sizes, generator):
    made = {}

    def get(machine, format="auto", **request):
        key = (machine, format, *sorted(request.items()))
        if key not in made:
            made[key] = plan(sizes, parse_devices(machine), Request(**request), format=format, generator=generator)
        return made[key]

    return get


@pytest.mark.parametrize(("machine", "format"), MACHINES)
def test_a_plan_fits_and_has_every_layer_once(planned, machine, format):
    made = planned(machine, format)
    assert [layer for stage in made.stages for layer in range(stage.first, stage.first + stage.layers)] == list(range(32))
    for stage in made.stages:
        assert set(stage.streamed) <= set(range(stage.first, stage.first + stage.layers))
        assert len(set(stage.streamed)) == len(stage.streamed) and bool(stage.streamed) == bool(stage.ring)
        assert stage.compute_buffer == (made.format != "bf16")
    for peak in (*made.peaks, made.ram):
        assert peak.total == sum(peak.items.values()) <= peak.free
        assert max(peak.phases.values()) == peak.total
    phases = [value for name, value in made.seconds.items() if name not in ("total", "step")]
    assert made.seconds["total"] == pytest.approx(sum(phases))
    text = describe(made)
    assert len(text.splitlines()) < 40 and max(map(len, text.splitlines())) <= 128
    for words in (made.format, made.home, made.generator.mode, "s a step"):
        assert words in text


def test_eight_cards_of_40_hold_everything_in_bf16(planned):
    made = planned("8x40")
    assert made.format == "bf16" and not made.streamed and made.waves and made.generator.mode == "resident"
    assert [stage.layers for stage in made.stages] == [4] * 8
    assert made.generator.device != made.home  # no card holds both


@pytest.mark.parametrize("machine", ("4x80", "2x141"))
def test_large_cards_hold_everything_in_bf16(planned, machine):
    made = planned(machine)
    assert made.format == "bf16" and not made.streamed and made.waves and made.generator.mode == "resident"
    assert len({stage.layers for stage in made.stages}) == 1 and set(made.places.values()) == {made.home}


def test_one_h200_holds_fp8_and_the_generator(planned):
    made = planned("1x141", "fp8")
    assert not made.streamed and made.generator.mode == "resident" and set(made.places.values()) == {"cuda:0"}
    assert made.peaks[0].total == pytest.approx(113e9, rel=0.03)  # 108 GB and a compute buffer


def test_one_card_of_96_holds_four_bits(planned):
    made = planned("1x96", "int4")
    assert not made.streamed and made.generator.mode == "resident" and made.ram.total < 6e9


def test_two_cards_of_48_hold_four_bits(planned):
    made = planned("2x48", "int4")
    assert not made.streamed and [stage.layers for stage in made.stages] == [16, 16]


def test_one_card_of_24_streams_four_bits_from_memory(planned):
    made = planned("1x24+64ram")
    assert made.format == "int4" and "bf16 does not fit" in made.reason
    (stage,) = made.stages
    assert stage.streamed_from == "ram" and 0 < len(stage.streamed) < 32 and made.generator.mode == "streamed"
    # Spread out: what is resident gives the link time to catch up.
    here = [layer for layer in range(32) if layer not in stage.streamed]
    gaps = [b - a for a, b in zip(here, here[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1 < min(gaps)


def test_chosen_experts_travel_or_are_computed_where_they_lie_whichever_is_faster(planned, sizes):
    """Plain weights in RAM are read faster by the CPU than they come over PCIe; packed ones and those on disk travel."""
    plain, packed = planned("1x24+192ram", "bf16"), planned("1x24+192ram", "int4")
    assert [stage.experts_on_host for stage in (*plain.stages, *packed.stages)] == [True, False]
    assert "single tokens on the CPU" in describe(plain)
    disk = planned("1x24+32ram", "bf16")
    assert disk.stages[0].streamed_from == "disk" and not disk.stages[0].experts_on_host
    # A link as fast as the memory: travelling costs less than 60 % of the memory's bandwidth.
    *cards, ram = parse_devices("1x24+192ram")
    near = plan(sizes, (replace(cards[0], link=ram.bandwidth), ram), Request(), format="bf16")
    assert near.streamed and not near.stages[0].experts_on_host


def test_unequal_cards_share_by_what_they_have(planned):
    made = planned("24,48+96ram", "int4")
    small, large = made.stages
    assert small.layers < large.layers and not made.streamed


def test_a_card_half_full_counts_as_what_is_free(planned):
    half, whole = planned("48:24+64ram"), planned("48+64ram", "int4")
    assert half.peaks[0].total < 24 * GIB and half.streamed and half.seconds["total"] > whole.seconds["total"]


def test_the_published_model_on_a_cpu_comes_from_disk(planned):
    made = planned("cpu+24ram")
    assert made.format == "bf16" and made.streamed == 32 and made.stages[0].streamed_from == "disk"
    assert any("disk" in note for note in made.notes)
    assert not planned("cpu+192ram").streamed


def test_more_hardware_is_faster(planned):
    assert planned("8x80").seconds["total"] < planned("4x80").seconds["total"]
    assert planned("4x80").seconds["total"] < planned("2x80", "fp8").seconds["total"]
    assert planned("1x32+64ram", "int4").seconds["total"] < planned("1x24+64ram", "int4").seconds["total"]
    # Two waves on two cards: 1.33 times as fast as one card with as much memory.
    one, two = planned("h200", "fp8"), planned("2xh200", "bf16")
    assert two.waves and one.seconds["step"] > 1.3 * two.seconds["step"]


def test_a_smaller_request_is_never_worse(planned):
    large = planned("1x24+64ram", "int4", pictures=2)
    for changes in ({"pictures": 1}, {"pictures": 0}, {"pictures": 2, "rows": 1}, {"pictures": 2, "size": "1024x768"}):
        assert planned("1x24+64ram", "int4", **changes).seconds["total"] < large.seconds["total"]


def test_more_memory_never_gives_a_slower_plan(sizes, generator):
    draw = random.Random(0)
    for _ in range(12):
        cards = [draw.choice((16, 24, 32, 48)) for _ in range(draw.choice((1, 1, 2)))]
        free = [draw.uniform(0.7, 0.95) * card for card in cards]
        form = draw.choice(("fp8", "int4"))
        request = Request(pictures=draw.choice((0, 1, 2)), thinking=draw.choice((0, 1000)))
        before = None
        for more in (1.0, 1.02, 1.04):
            line = "+".join(f"{card}:{amount * more:.2f}" for card, amount in zip(cards, free, strict=True)) + "+160ram"
            try:
                now = plan(sizes, parse_devices(line), request, format=form, generator=generator).seconds["total"]
            except PlacementError:
                assert before is None, f"{line} in {form} does not fit, with less memory it did"
                continue
            assert before is None or now <= before * (1 + 1e-6), f"{line} in {form}: {now} s, with less memory {before} s"
            before = now


def test_an_error_says_what_is_missing_and_what_fits(sizes, generator):
    devices = parse_devices("1x12+64ram")
    with pytest.raises(PlacementError) as caught:
        plan(sizes, devices, Request(), generator=generator)
    text = str(caught.value)
    numbers = re.search(r"need ([\d.]+) GB .* has ([\d.]+) GB .* ([\d.]+) GB too little", text)
    needed, given, short = map(float, numbers.groups())
    assert needed - given == pytest.approx(short, abs=0.11) and "cuda:0" in text
    assert text.count(" s an edit)") == 3 and "no guidance" in text
    # What it names does fit.
    assert plan(sizes, devices, Request(rows=1), generator=generator).format == "int4"
    assert plan(sizes, devices, Request(pictures=0), generator=generator).format == "int4"


def test_an_error_names_another_format_and_streaming(sizes, generator):
    with pytest.raises(PlacementError, match=r"--format int4.*") as caught:
        plan(sizes, parse_devices("1x24+64ram"), Request(), format="bf16", generator=generator, streaming="ram")
    assert "streaming from disk" in str(caught.value)
    with pytest.raises(PlacementError, match="streaming from ram"):
        plan(sizes, parse_devices("1x24+64ram"), Request(), format="int4", generator=generator, streaming="none")


def test_where_nothing_fits_it_says_so(sizes, generator):
    with pytest.raises(PlacementError, match="Nothing smaller fits"):
        plan(sizes, parse_devices("1x4+16ram"), Request(), generator=generator)


@pytest.mark.parametrize(("arguments", "says"), (
    ({"format": "nf4"}, "no format 'nf4'"), ({"streaming": "tape"}, "'tape' is none")))
def test_arguments_that_are_none(sizes, arguments, says):
    with pytest.raises(PlacementError, match=says):
        plan(sizes, parse_devices("4x80"), Request(), **arguments)


def test_packed_files_cannot_be_made_another_format(real_config):
    from comfyui_hywu.hywu_core.placement.sizes import model_sizes

    packed = model_sizes(real_config, torch.bfloat16, "int8")
    assert plan(packed, parse_devices("1x141"), Request()).format == "int8"
    with pytest.raises(PlacementError, match="int8 already"):
        plan(packed, parse_devices("1x141"), Request(), format="fp8")


def test_a_plan_is_a_value(planned):
    made = planned("4x80")
    with pytest.raises(AttributeError):
        made.waves = False
    with pytest.raises(TypeError):
        made.places["vae"] = "cpu"


def test_the_command_needs_no_weights(capsys):
    config, generator = DATA / "hunyuanimage3-instruct.config.json", DATA / "hy-wu.config.json"
    common = ["plan", str(config), "--generator", str(generator), "--devices", "1x24+64ram"]
    assert main([*common, "--format", "int4", "--steps", "8", "--guidance", "1", "--pictures", "2"]) == 0
    text = capsys.readouterr().out
    assert "8 steps" in text and "1 row " in text and "2 pictures" in text
    assert main([*common, "--format", "bf16", "--streaming", "none"]) == 1
    assert "would fit" in capsys.readouterr().err
    assert main(["plan", str(config), "--devices", "1xbig"]) == 1


def test_a_generator_for_another_backbone_is_refused(tiny_folders, capsys):
    assert main(["plan", str(tiny_folders[0]), "--generator", str(DATA / "hy-wu.config.json"), "--devices", "24+64ram"]) == 1
    said = capsys.readouterr().err
    assert "32 layers of width 4096" in said and "has 2 of width" in said and "made for it" in said


def test_a_generator_is_counted_in_the_dtype_that_it_is_loaded_in(capsys):
    """A CPU with room for it computes in float32, the generator too: 32.4 GB instead of 16.2."""
    config, generator = DATA / "hunyuanimage3-instruct.config.json", DATA / "hy-wu.config.json"
    assert main(["plan", str(config), "--generator", str(generator), "--devices", "cpu+1024ram"]) == 0
    text = capsys.readouterr().out
    assert "float32" in text and "generator 32.4" in text


def test_a_backbone_with_few_positions_is_planned_with_what_it_has(tmp_path, capsys):
    folder = write_backbone(tmp_path / "backbone", max_position_embeddings=300)
    assert main(["plan", str(folder), "--devices", "24+64ram", "--thinking", "20"]) == 0
    said = capsys.readouterr()
    assert re.search(r"rows? of 300 tokens", said.out)
    assert "20 tokens of thinking do not fit into the backbone's 300 positions, planned with 0" in said.err


def test_a_plan_that_nobody_made_says_where_things_are(real_config):
    text = describe(whole(real_config, torch.bfloat16, "cpu"))
    assert "0-31 on cpu" in text and "not planned" in text and "peak" not in text


def test_a_small_checkpoint_lies_where_it_is(tiny_folders, capsys):
    assert main(["plan", str(tiny_folders[0]), "--generator", str(tiny_folders[1]), "--devices", "cpu+8ram"]) == 0
    text = capsys.readouterr().out
    assert "float32" in text and "streamed" not in text and "resident on cpu" in text
