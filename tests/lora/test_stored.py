"""LoRA files in smaller forms: what a reader gets, the error that is stated, and headers that lie."""

import base64
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError, RequestError
from comfyui_hywu.hywu_core.lora.algebra import Selection, masked, scaled
from comfyui_hywu.hywu_core.lora.files import load_lora, read_summary, save_lora
from comfyui_hywu.hywu_core.lora.spectrum import spectra
from comfyui_hywu.hywu_core.lora.stored import AS_IT_IS, STORED, expert_energy, kept_experts
from comfyui_hywu.hywu_core.lora.thumbnail import LIMIT, SIDE, thumbnail_bytes, thumbnail_text
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

ORIGIN = Provenance(backbone_fingerprint="0123456789abcdef", generator_fingerprint="fedcba9876543210",
                    instruction="Färbe es blau, \"now\"\n🎨", thinking="<think>…</think>", picture_digests=("aa", "bb"),
                    seed=-5)


def make_lora(dtype: torch.dtype = torch.float32, experts: int = 4, weights=None, made: str = "", layers: int = 2) -> LoRA:
    """Experts whose sizes differ a lot, and a linear, in an order that is not alphabetical."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(0, -3, experts * layers)[torch.randperm(experts * layers, generator=generator)].view(layers, experts)
    shapes = {"self_attn.o_proj": ((2, 6), (10, 2)), "mlp.experts.w1": ((experts, 2, 5), (experts, 4, 2)),
              "mlp.experts.w2": ((experts, 2, 4), (experts, 5, 2)), "mlp.experts.w3": ((experts, 2, 5), (experts, 4, 2))}
    tensors = {}
    for layer in range(layers):
        for i, side in enumerate("AB"):
            for name, pair in shapes.items():
                value = torch.randn(pair[i], generator=generator)
                if len(pair[i]) == 3:
                    value *= sizes[layer][:, None, None]
                tensors[f"model.layers.{layer}.{name}.lora_{side}"] = value.to(dtype)
    return LoRA.from_tensors(tensors, 7.5, Provenance(**{**vars(ORIGIN), "made": made}), rank_weights=weights)


def update(lora: LoRA) -> torch.Tensor:
    """The whole update, formed: (all values,) fp64."""
    return torch.cat([((b.double() * lora.scale_R) @ a.double()).flatten()
                      for layer in range(lora.num_layers) for a, b in lora.layer(layer).values()])


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, tensors=None, **changes: str | None) -> None:
    """Write the file again with other metadata (None drops a key) or other tensors."""
    with safe_open(path, framework="pt") as file:
        found, there = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    save_file(there | (tensors or {}), path, {key: value for key, value in {**found, **changes}.items() if value is not None})


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("keep", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [None, (0.5, -3.0)])
def test_what_a_reader_gets_is_what_was_said(tmp_path, stored, keep, dtype, weights):
    lora = make_lora(dtype, weights=weights, made="a blend")
    saved = save_lora(lora, tmp_path / "x.safetensors", stored=stored, keep=keep)
    back, summary = load_lora(saved.path), read_summary(saved.path)
    error = float((update(lora) - update(back)).norm() / update(lora).norm())
    assert saved.error == pytest.approx(error, rel=1e-6, abs=1e-9)
    assert summary.error == pytest.approx(error, rel=1e-6, abs=1e-9)
    assert (error > 0) == (stored == "fp8" or keep < 1 or (stored == "bfloat16" and dtype == torch.float32))
    assert saved.digest == summary.digest == back.digest
    assert list(back.tensors) == list(lora.tensors)
    assert (back.provenance, back.targets, back.alpha, back.rank_weights) == (
        lora.provenance, lora.targets, lora.alpha, lora.rank_weights)
    assert back.dtype == (dtype if stored == AS_IT_IS else torch.bfloat16)
    assert all(tensor.dtype == back.dtype for tensor in back.tensors.values())
    assert saved.nbytes == summary.nbytes == saved.path.stat().st_size
    assert saved.experts == ((8 if keep == 1 else sum(map(len, summary.form.kept))), 8)


def test_fp8_rounds_each_row_to_three_bits(tmp_path):
    lora = make_lora()
    back = load_lora(save_lora(lora, tmp_path / "x.safetensors", stored="fp8").path)
    for key, tensor in lora.tensors.items():
        # Half a step of e4m3 (2^-4 of the value), its smallest step under the row's largest value, and bf16's rounding.
        bound = tensor.abs() * (2**-4 + 2**-8) + tensor.abs().amax(-1, keepdim=True) * 2**-9 / 448 * 1.01
        assert ((back.tensors[key].float() - tensor).abs() <= bound).all(), key


def test_a_generated_lora_keeps_the_bytes_of_version_1(tmp_path):
    """The digests are of files that the first release wrote."""
    from comfyui_hywu.tests.lora.test_files import make_lora as first

    for dtype, digest in ((torch.float32, "f835d1e378f9e7b56a2a370c8dee8d2c635b1f3e771948719e55509c793626ee"),
                          (torch.bfloat16, "22bfb57e6cc13b16bdf81217e57920f39c72f6b53c93b50b6e58cbe7dca4a51a")):
        save_lora(first(dtype), tmp_path / "x.safetensors")
        assert hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("options, weights, made, version", [
    ({}, None, "", "1"), ({"picture": Image.new("RGB", (9, 9))}, None, "", "1"), ({}, None, "a mean", "1"),
    ({"stored": "bfloat16"}, None, "", "1"), ({"stored": "fp8"}, None, "", "2"), ({"keep": 0.5}, None, "", "2"),
    ({}, (1.0, 2.0), "", "2")])
def test_only_what_old_readers_would_read_wrongly_is_version_2(tmp_path, options, weights, made, version):
    path = save_lora(make_lora(weights=weights, made=made), tmp_path / "x.safetensors", **options).path
    assert metadata(path)["version"] == version


def test_the_same_lora_gives_the_same_bytes(tmp_path):
    options = {"stored": "fp8", "keep": 0.8, "picture": Image.linear_gradient("L")}
    first, second = (save_lora(make_lora(), tmp_path / name, **options).path for name in ("a.safetensors", "b.safetensors"))
    assert first.read_bytes() == second.read_bytes()


# ---- experts


def test_energy_is_the_spectras():
    lora = make_lora(weights=(2.0, -0.5))
    torch.testing.assert_close(expert_energy(lora), spectra(lora).expert_energy(), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(energy=st.lists(st.floats(0, 1e6), min_size=6, max_size=6), share=st.floats(0.01, 0.9999))
def test_the_kept_experts_are_the_fewest_that_hold_the_share(energy, share):
    energy_NE = torch.tensor(energy, dtype=torch.float64).view(2, 3)
    kept = kept_experts(energy_NE, share)
    held = torch.stack([energy_NE[layer, expert] for layer, row in enumerate(kept) for expert in row])
    total = float(energy_NE.sum())
    assert float(held.sum()) >= share * total * (1 - 1e-12)
    assert float(held.sum() - held.min()) < share * total or len(held) == 1
    rest = [energy_NE[layer, expert] for layer in range(2) for expert in range(3) if expert not in kept[layer]]
    assert all(value <= held.min() for value in rest)


def test_dropped_experts_are_not_in_the_file_and_read_as_zeros(tmp_path):
    lora = make_lora()
    saved = save_lora(lora, tmp_path / "x.safetensors", keep=0.7)
    kept, back = read_summary(saved.path).form.kept, load_lora(saved.path)
    assert 0 < sum(map(len, kept)) < 8
    assert saved.path.stat().st_size < save_lora(lora, tmp_path / "all.safetensors").nbytes
    for key, tensor in lora.tensors.items():
        layer = int(key.split(".")[2])
        if tensor.ndim == 2:
            assert torch.equal(back.tensors[key], tensor)
            continue
        for expert in range(4):
            expected = tensor[expert] if expert in kept[layer] else torch.zeros_like(tensor[expert])
            assert torch.equal(back.tensors[key][expert], expected)


def test_a_layer_without_any_expert_comes_back(tmp_path):
    lora = masked(make_lora(), Selection(layers=[0], groups=["experts"]))
    saved = save_lora(lora, tmp_path / "x.safetensors", keep=0.999)
    assert read_summary(saved.path).form.kept[1] == ()
    back = load_lora(saved.path)
    assert back.tensors["model.layers.1.mlp.experts.w3.lora_A"].shape == (4, 2, 5)
    assert not back.tensors["model.layers.1.mlp.experts.w3.lora_A"].any()
    assert saved.error == pytest.approx(float((update(lora) - update(back)).norm() / update(lora).norm()), rel=1e-6)


def test_a_lora_whose_experts_do_nothing_keeps_one(tmp_path):
    lora = masked(make_lora(), Selection(groups=["attention"]))
    saved = save_lora(lora, tmp_path / "x.safetensors", keep=0.9)
    assert saved.experts == (1, 8) and saved.error == 0
    assert torch.equal(update(load_lora(saved.path)), update(lora))


def test_a_lora_without_experts_has_none_to_drop(tmp_path):
    tensors = {key: tensor for key, tensor in make_lora().tensors.items() if tensor.ndim == 2}
    saved = save_lora(LoRA.from_tensors(tensors, 7.5), tmp_path / "x.safetensors", keep=0.1)
    assert (saved.error, saved.experts, metadata(saved.path)["version"]) == (0, (0, 0), "1")


@pytest.mark.parametrize("options, message", [
    ({"stored": "int8"}, "'int8': choose one of 'as it is', 'bfloat16', 'fp8'"), ({"keep": 0}, "0 of the experts' energy"),
    ({"keep": 1.01}, "1.01 of"), ({"keep": float("nan")}, "nan of")])
def test_forms_that_are_none(tmp_path, options, message):
    with pytest.raises(RequestError, match=message):
        save_lora(make_lora(), tmp_path / "x.safetensors", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", ["fp8", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])
def test_values_that_a_form_cannot_hold_are_refused(tmp_path, stored, value):
    tensors = {key: tensor.clone() for key, tensor in make_lora().tensors.items()}
    tensors["model.layers.1.mlp.experts.w2.lora_B"][0, 0, 0] = value
    with pytest.raises(LoRAError, match=f"w2.lora_B holds .* for {stored} in 1 of 40 values"):
        save_lora(LoRA.from_tensors(tensors, 7.5), tmp_path / "x.safetensors", stored=stored)
    assert not list(tmp_path.iterdir())


def test_ticks_count_up_and_cancel_leaves_nothing(tmp_path):
    ticks = []
    save_lora(make_lora(), tmp_path / "x.safetensors", lambda *tick: ticks.append(tick), stored="fp8", keep=0.5)
    assert ticks == [(done, 24, None) for done in range(1, 25)]  # 8 pairs ranked, 16 matrices written

    def cancel(done, total, latent):
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_lora(make_lora(), tmp_path / "y.safetensors", cancel, stored="fp8", keep=0.5)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_saving_and_loading_take_no_second_copy(tmp_path):
    """In a process of its own: a LoRA of 96 MB is saved as fp8 and read; the peak grows by a layer or two, and by the file."""
    root = Path(__file__).resolve().parents[2]
    script = (
        "import sys, resource; sys.path.insert(0, sys.argv[1]); import conftest, torch\n"
        "from pathlib import Path\n"
        "from comfyui_hywu.hywu_core.lora.files import load_lora, save_lora\n"
        "from comfyui_hywu.hywu_core.lora.value import LoRA\n"
        "torch.manual_seed(0)\n"
        "lora = LoRA.from_tensors({f'model.layers.{layer}.mlp.experts.w1.lora_{side}': torch.randn(8, *shape)\n"
        "    for layer in range(12) for side, shape in (('A', (16, 4096)), ('B', (12288, 16)))}, 16.0)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "small = LoRA.from_tensors({k: v[:1, :, :9].clone() if k.endswith('A') else v[:1, :9].clone()\n"
        "    for k, v in lora.tensors.items()}, 16.0)\n"
        "path = Path(sys.argv[2]) / 'x.safetensors'\n"
        "save_lora(small, path, stored='fp8', keep=0.9); load_lora(path)\n"
        "before = peak()\n"
        "save_lora(lora, path, stored='fp8', keep=0.9)\n"
        "saving = peak()\n"
        "back = load_lora(path)\n"
        "print(lora.nbytes / 1e6, path.stat().st_size / 1e6, saving - before, peak() - before)\n")
    result = subprocess.run([sys.executable, "-c", script, str(root / "tests"), str(tmp_path)], capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"})
    nbytes, size, saving, both = map(float, result.stdout.split())
    assert 90 < nbytes < 110 and size < 30
    assert saving < 0.7 * nbytes, f"saving {nbytes} MB took {saving} MB"
    assert both < 0.7 * nbytes + 1.5 * size


# ---- pictures


def decoded(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 600), height=st.integers(1, 600), mode=st.sampled_from(["RGB", "RGBA", "L", "P", "LA", "1"]))
def test_any_picture_becomes_a_small_one(width, height, mode):
    text = thumbnail_text(Image.new(mode, (width, height)))
    assert len(text) <= LIMIT
    size = decoded(thumbnail_bytes(text)).size
    assert max(size) <= SIDE and size == Image.new("1", size).size
    assert (max(width, height) <= SIDE) == (size == (width, height))


def test_noise_fits_and_transparent_is_white():
    noise = Image.frombytes("RGB", (256, 256), torch.randint(0, 256, (256 * 256 * 3,), dtype=torch.uint8).numpy().tobytes())
    assert len(thumbnail_text(noise)) <= LIMIT
    assert decoded(thumbnail_bytes(thumbnail_text(Image.new("RGBA", (8, 8))))).getpixel((4, 4)) == (255, 255, 255)


def encoded(picture: Image.Image, format: str, **options) -> str:
    data = io.BytesIO()
    picture.save(data, format, **options)
    return base64.b64encode(data.getvalue()).decode()


def bomb(text: str) -> str:
    """A JPEG that says that it has 65,000 x 65,000 pixels."""
    data = bytearray(base64.b64decode(text))
    at = data.index(b"\xff\xc0") + 5
    data[at:at + 4] = (65_000).to_bytes(2, "big") * 2
    return base64.b64encode(bytes(data)).decode()


def test_what_is_no_thumbnail_is_none():
    good = encoded(Image.new("RGB", (20, 20)), "JPEG")
    assert thumbnail_bytes(good) is not None
    bad = {
        "none": None, "empty": "", "html": "<img src=x onerror=alert(1)>", "no base64": good[:-2] + "!!", "odd": good[:-3],
        "half": good[:len(good) // 8 * 4], "png": encoded(Image.new("RGB", (20, 20)), "PNG"),
        "gif": encoded(Image.new("P", (20, 20)), "GIF"), "text": base64.b64encode(b"no picture").decode(),
        "wide": encoded(Image.new("RGB", (257, 1)), "JPEG"), "bomb": bomb(good),
        "long": base64.b64encode(base64.b64decode(good) + bytes(LIMIT)).decode(),
        "moving": encoded(Image.new("RGB", (20, 20)), "WEBP", save_all=True,
                          append_images=[Image.new("RGB", (20, 20), "red")]),
    }
    assert {name: thumbnail_bytes(text) for name, text in bad.items()} == dict.fromkeys(bad)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), value=st.integers(0, 255), format=st.sampled_from(["JPEG", "WEBP"]))
def test_a_damaged_picture_raises_nothing(at, value, format):
    data = bytearray(base64.b64decode(encoded(Image.radial_gradient("L").resize((40, 40)).convert("RGB"), format)))
    data[at % len(data)] = value
    thumbnail_bytes(base64.b64encode(bytes(data)).decode())


def test_the_thumbnail_is_in_the_file_and_a_bad_one_is_none(tmp_path):
    path = save_lora(make_lora(), tmp_path / "x.safetensors", picture=Image.new("RGB", (1024, 512), "red")).path
    assert decoded(read_summary(path).thumbnail).size == (256, 128)
    assert read_summary(path).digest == load_lora(path).digest
    rewrite(path, thumbnail="x" * 100_000)
    assert read_summary(path).thumbnail is None
    assert load_lora(path).digest == read_summary(path).digest


# ---- headers that lie


@pytest.fixture
def packed(tmp_path) -> Path:
    """fp8, weights of ranks, and experts of both layers dropped, some."""
    return save_lora(make_lora(weights=(1.0, 2.0)), tmp_path / "x.safetensors", stored="fp8", keep=0.999).path


@pytest.mark.parametrize("changes, message", [
    ({"version": "1"}, "says version '1' but is packed"),
    ({"stored": "int3"}, "stored as 'int3', known are"),
    ({"stored": "as it is"}, "float8|disagree|expected"),
    ({"kept": "[[0,1]]"}, "experts of 1 layers were kept, the LoRA has 2"),
    ({"kept": "[[0],[0,1,2,3]]"}, "tensors are not as the metadata says"),
    ({"kept": "[[1,0],[0]]"}, "in order"), ({"kept": "[[0,0],[0]]"}, "in order"), ({"kept": "[[-1],[0]]"}, "in order"),
    ({"kept": "[[4],[0]]"}, "numbers below 4"), ({"kept": "[[true],[0]]"}, "in order"), ({"kept": "[[],[]]"}, "in order"),
    ({"kept": "[" * 100_000}, "in order"), ({"kept": "9" * 5000}, "in order"), ({"kept": None}, "no 'kept'"),
    ({"experts": "0"}, "'0' experts, expected 1 to 4096"), ({"experts": "99999999999"}, "experts, expected 1 to 4096"),
    ({"experts": None}, "no 'experts'"), ({"experts": "²"}, "experts, expected"),
    ({"rank_weights": "[1]"}, "1 rank weights"), ({"rank_weights": "[NaN, 1]"}, "finite numbers"),
    ({"rank_weights": "[1e999, 1]"}, "finite numbers"), ({"rank_weights": f"[{'9' * 400}, 1]"}, "finite numbers"),
    ({"rank_weights": "{}"}, "finite numbers"), ({"rank_weights": "[true, 1]"}, "finite numbers"),
    ({"rank": "nan"}, "rank nan"),
])
def test_a_packed_header_is_not_trusted(packed, changes, message):
    rewrite(packed, **changes)
    for reader in (load_lora, read_summary):
        with pytest.raises(LoRAError, match=message) as caught:
            reader(packed)
        assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("stored", STORED)
def test_a_value_that_changed_on_the_disk_is_found_by_the_digest(tmp_path, stored):
    lora, picture = make_lora(made="a blend"), Image.new("RGB", (8, 8))
    path = save_lora(lora, tmp_path / "x.safetensors", stored=stored, picture=picture).path
    load_lora(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # the last value's lowest or highest byte: finite in every form
    path.write_bytes(raw)
    with pytest.raises(LoRAError, match="digest .* it is damaged"):
        load_lora(path)


@pytest.mark.parametrize("key, value", [("lora_A", float("nan")), ("lora_A_scale", float("nan")),
                                        ("lora_A_scale", float("inf")), ("lora_B_scale", 3e38)])
def test_packed_values_are_checked(packed, key, value):
    name = f"model.layers.0.self_attn.o_proj.{key}"
    with safe_open(packed, framework="pt") as file:
        tensor = file.get_tensor(name).float().clone()
    tensor.view(-1)[0] = value
    rewrite(packed, {name: tensor.to(torch.float32 if "scale" in key else torch.float8_e4m3fn)})
    with pytest.raises(LoRAError, match="o_proj.lora_[AB].* (holds|has) NaN or Inf in [0-9]+ of"):
        load_lora(packed)


def test_a_scale_without_its_matrix_and_a_surplus_one(packed):
    rewrite(packed, {"model.layers.0.self_attn.o_proj.lora_C": torch.zeros(2, 2)})
    with pytest.raises(LoRAError, match="no HY-WU LoRA tensor"):
        load_lora(packed)


def test_a_surplus_scale_is_refused(packed):
    rewrite(packed, {"model.layers.7.self_attn.o_proj.lora_A_scale": torch.zeros(2, 1)})
    with pytest.raises(LoRAError, match="layers.7.*expected none, found"):
        load_lora(packed)


@pytest.mark.parametrize("changes", [
    {"digest": "g" * 64}, {"digest": "0" * 64}, {"digest": "<script>"}, {"digest": None}, {"error": "nan"}, {"error": "1e999"},
    {"error": "-1"}, {"error": "9.000000e+999"}, {"error": None}, {"made": "<b>" * 1_000_000},
    {"thumbnail": "../../etc/passwd"},
    {"sketch": "9" * 10_000_000}, {"instruction": "<img src=x onerror=alert(1)>" * 300_000}])
def test_what_is_only_shown_does_no_harm(packed, changes):
    whole = load_lora(packed).digest
    rewrite(packed, **changes)
    summary = read_summary(packed)
    assert load_lora(packed).digest == whole
    assert summary.digest == (None if "digest" in changes else whole)
    assert summary.error is None or "error" not in changes
    assert len(summary.provenance.made) <= 2000


def test_names_of_megabytes_make_short_messages(packed):
    rewrite(packed, format="x" * 10_000_000)
    with pytest.raises(LoRAError) as caught:
        load_lora(packed)
    assert len(str(caught.value)) < 1000
    rewrite(packed, format="hywu-lora", targets=json.dumps(["y" * 10_000_000]))
    with pytest.raises(LoRAError) as caught:
        load_lora(packed)
    assert len(str(caught.value)) < 3000


def test_weights_of_ranks_survive(tmp_path):
    half = scaled(make_lora(), 0.5)
    back = load_lora(save_lora(half, tmp_path / "x.safetensors").path)
    assert back.rank_weights == (0.5, 0.5) and back.digest == half.digest and back.provenance.made == half.provenance.made
