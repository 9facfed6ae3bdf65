"""What the nodes do with memory, inside ComfyUI's process; collected by ``test_memory.py`` through ``inside.py`` only.

No GPU is needed: cards are pretended by numbers where the decision is tested, and the CPU stands for one where the effect is.
"""

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import psutil
import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint import load as reading
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.config import BackboneConfig, GeneratorConfig
from comfyui_hywu.hywu_core.errors import CheckpointError, PlacementError
from comfyui_hywu.hywu_core.generator.handle import load_generator, write_lora
from comfyui_hywu.hywu_core.generator.sizes import generator_sizes
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.placement import build
from comfyui_hywu.hywu_core.placement.devices import parse_devices
from comfyui_hywu.hywu_core.placement.request import Request
from comfyui_hywu.hywu_core.placement.sizes import model_sizes
from comfyui_hywu.hywu_core.sampling.denoise import sample
from comfyui_hywu.nodes import cluster, host, memory, plan
from comfyui_hywu.nodes import load as load_nodes
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "models" / "hywu-mini"
REAL = ROOT / "tests" / "data" / "real-config"
CPU = torch.device("cpu")
# RSS may grow by so much over 40 turns, less than one reload (51 MB of weights) that leaks.
MOST_GROWTH = 40 << 20

host.register_folders()  # as the pack's entry point does


@pytest.fixture(autouse=True)
def empty_list():
    """Every test begins and ends with nothing in ComfyUI's list."""
    yield
    management.unload_all_models()
    gc.collect()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.open(ROOT / "tests" / "data" / "photo.jpg").convert("RGB")


def paint(model, photo, seed: int = 0) -> torch.Tensor:
    condition = memory.at_work(model, 1, lambda: encode(model, [photo], "make it brighter"))
    return memory.at_work(model, 1, lambda: sample(model, condition, steps=2, seed=seed))


@pytest.fixture(scope="module")
def expected(photo) -> torch.Tensor:
    """The latent of the core alone, without plan and without ComfyUI."""
    model = load_model(MINI / "backbone")
    return sample(model, encode(model, [photo], "make it brighter"), steps=2)


def load(format: str = "auto"):
    return memory.load(MINI / "backbone", None, format)


def entries() -> list[memory.PlacedPatcher]:
    return [patcher for patcher in management.loaded_models() if isinstance(patcher, memory.PlacedPatcher)]


# ---- planning


def test_on_a_cpu_the_small_checkpoint_lies_there_whole_and_paints_as_without_a_plan(photo, expected):
    model = load()
    found = model.placed.plan
    assert [(stage.device, stage.layers, stage.streamed) for stage in found.stages] == [("cpu", 4, ())]
    assert (found.format, found.dtype, set(found.places.values()), dict(found.visits)) == ("bf16", torch.float32, {"cpu"}, {})
    assert found.generator.mode == "resident"  # hywu-mini's own was found and planned for
    assert torch.equal(paint(model, photo), expected)


def test_cards_count_as_if_everybody_had_left(monkeypatch):
    cards = parse_devices("24:10,24:20+64ram")

    class Other:
        load_device = torch.device("cuda:0")

        def loaded_size(self) -> int:
            return 5 << 30

    monkeypatch.setattr(plan, "find_devices", lambda: cards)
    monkeypatch.setattr(management, "loaded_models", lambda: [Other(), None])
    assert plan.devices() == cards[2:]  # --cpu: no card
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda:0"))
    first, second, _ = plan.devices()
    assert first.free == cards[0].free + (5 << 30) - management.extra_reserved_memory()
    assert second.free == cards[1].free - management.extra_reserved_memory()


def real_wanted(format: str = "auto") -> plan.Wanted:
    config = BackboneConfig.from_dict(json.loads((REAL / "hunyuanimage3-instruct.config.json").read_text()))
    writer = GeneratorConfig.from_dict(json.loads((REAL / "hy-wu.config.json").read_text()))
    return plan.Wanted(model_sizes(config, torch.bfloat16), Request(), format, generator_sizes(writer, torch.bfloat16))


def test_others_leave_only_as_far_as_the_plan_needs(monkeypatch):
    monkeypatch.setattr(plan, "devices", lambda: parse_devices("2x48+192ram"))
    found = plan.make_plan(real_wanted("int4"))
    # The generator comes for its turn even where the plan had room for it: that room is not asked for.
    assert found.generator.mode == "streamed"
    assert all(plan.need(peak) == peak.total - peak.items.get("generator", 0) < peak.free for peak in found.peaks)
    needs = {torch.device(peak.device): plan.need(peak) for peak in found.peaks}
    assert plan.lacking(found, lambda device: 0) == needs and len(needs) == 2
    assert plan.lacking(found, lambda device: 10**9 if device.index else 10**12) == {
        device: nbytes - 10**9 if device.index else 0 for device, nbytes in needs.items()}


def test_every_card_of_the_plan_is_asked_for_what_the_backbone_lacks_there(monkeypatch):
    model, asked = load(), []
    monkeypatch.setattr(plan, "lacking", lambda chosen, there: {torch.device("cuda:1"): 7, CPU: there(CPU)})
    monkeypatch.setattr(management, "free_memory", lambda nbytes, device: asked.append((nbytes, device)))
    monkeypatch.setattr(management, "load_models_gpu", lambda models, memory_required: asked.append((models, memory_required)))
    memory.ready(model)
    assert asked == [(7 + management.extra_reserved_memory(), torch.device("cuda:1")),
                     ([memory._PATCHERS[model.placed]], model.placed.nbytes(CPU))]


def test_the_next_plan_is_smaller_and_for_the_pictures_that_there_are(monkeypatch):
    monkeypatch.setattr(plan, "devices", lambda: parse_devices("1x96+192ram"))
    wanted = real_wanted()
    before = plan.make_plan(wanted)
    after = plan.smaller_plan(wanted, before, pictures=3)
    assert after.format == before.format and after.request.pictures == 3
    assert after.peaks[0].total <= plan.SMALLER * before.peaks[0].total
    assert after.streamed > before.streamed
    monkeypatch.setattr(plan, "devices", lambda: parse_devices("1x16+64ram"))
    tight = plan.make_plan(wanted)
    with pytest.raises(PlacementError, match=r"ran out of memory \(wanted 2 GiB\), and no smaller plan fits: .* GB too little"):
        memory._smaller(wanted, tight, 3, "wanted 2 GiB")


def test_what_does_not_fit_is_an_error_before_a_byte_is_read(monkeypatch):
    *_, ram = plan.devices()
    monkeypatch.setattr(plan, "devices", lambda: (replace(ram, free=1 << 30),))
    monkeypatch.setattr(memory, "open_model", lambda *args, **kwargs: pytest.fail("a file was opened"))
    with pytest.raises(PlacementError, match="GB too little"):
        load()


# ---- ComfyUI's list


def test_unloading_gives_the_memory_back_and_the_next_use_the_same_picture(photo, expected):
    model = load()
    held = model.placed.nbytes(CPU)
    other = replace(model)  # as the injector makes: the same backbone
    memory.ready(other)
    memory.ready(model)
    assert len(entries()) == 1 and entries()[0].loaded_size() == held
    management.unload_all_models()
    assert not entries() and not model.placed.loaded and model.placed.nbytes(CPU) < held
    assert torch.equal(paint(other, photo), expected)
    assert len(entries()) == 1 and model.placed.nbytes(CPU) == held


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_layers_come_back_as_they_were(photo, format):
    model = load(format)
    assert model.placed.plan.format == format
    first = paint(model, photo)
    management.unload_all_models()
    assert torch.equal(paint(model, photo), first)


def test_an_entry_goes_with_the_last_handle():
    model = load()
    assert len(entries()) == 1
    del model
    gc.collect()
    assert not entries() and not len(memory._PATCHERS)


def test_a_lora_survives_an_unloading(photo):
    model = load()
    condition = encode(model, [photo], "make it brighter")
    adapted = inject(model, memory.write(memory.load_writer(MINI / "generator", None), condition), 1.0)
    first = memory.at_work(adapted, 1, lambda: sample(adapted, condition, steps=2))
    management.unload_all_models()
    assert torch.equal(memory.at_work(adapted, 1, lambda: sample(adapted, condition, steps=2)), first)
    plain = memory.at_work(model, 1, lambda: sample(model, condition, steps=2))
    assert not torch.equal(plain, first)


class Cancels:
    """ComfyUI's progress bar; the user cancels at its ``at``-th move (0: never)."""

    def __init__(self, monkeypatch, at: int):
        self.at, self.values = at, []
        monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", self)
        for module in (reading, build):
            monkeypatch.setattr(module, "TICK_BYTES", 1 << 20)

    def __call__(self, value, total, *args, **kwargs):
        self.values.append((value, total))
        if len(self.values) == self.at:
            management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()


@pytest.mark.parametrize("format", ["auto", "int8"])
def test_a_cancelled_load_goes_on_where_it_was(photo, monkeypatch, format):
    fresh = load(format)
    first = paint(fresh, photo)
    held = fresh.placed.nbytes(CPU)
    del fresh
    management.unload_all_models()
    gc.collect()
    cancels = Cancels(monkeypatch, 12)
    with pytest.raises(management.InterruptProcessingException):
        load(format)
    (model,) = memory._BEGUN.values()
    assert model.placed.begun and not model.placed.loaded
    assert entries() == [memory._PATCHERS[model.placed]] and entries()[0].loaded_size() == held
    cancelled_at, total = cancels.values[-1]
    cancels.at, cancels.values = 0, []
    monkeypatch.setattr(plan, "make_plan", lambda wanted: pytest.fail("planned again"))
    again = load(format)
    assert again.placed is model.placed and again.placed.loaded and not memory._BEGUN
    # Of files that are read one after the other a part of a tensor at most is read twice.
    done = [value for value, _ in cancels.values]
    assert done == sorted(done) and 0 <= cancelled_at - done[0] <= 3 and done[-1] == total == cancels.values[0][1]
    assert torch.equal(paint(again, photo), first)


def test_a_cancelled_load_gives_its_memory_back_when_asked_to_unload(monkeypatch):
    cancels = Cancels(monkeypatch, 6)
    with pytest.raises(management.InterruptProcessingException):
        load()
    (begun,) = memory._BEGUN.values()
    assert begun.placed.nbytes(CPU) > 0
    management.unload_all_models()
    assert not entries() and not begun.placed.begun and begun.placed.nbytes(CPU) == 0
    cancels.at = 0
    assert load().placed is not begun.placed and not memory._BEGUN


@pytest.mark.parametrize("other", ["another format", "one of a cluster"])
def test_a_cancelled_load_gives_its_memory_back_when_something_else_is_loaded(monkeypatch, other):
    cancels = Cancels(monkeypatch, 6)
    with pytest.raises(management.InterruptProcessingException):
        load()
    (begun,) = memory._BEGUN.values()
    cancels.at = 0
    if other == "another format":
        assert load("int8").placed is not begun.placed
    else:
        monkeypatch.setattr(cluster, "model", lambda *_: SimpleNamespace(elsewhere=object(), placed=None))
        monkeypatch.setattr(load_nodes, "HostVAE", lambda model: None)
        load_nodes.HYWUModelLoader.execute("hywu-mini/backbone", "checkpoint", "auto", "127.0.0.1:9")
    assert not begun.placed.begun and begun.placed.nbytes(CPU) == 0 and not memory._BEGUN


def test_a_load_that_fails_keeps_nothing(tmp_path):
    folder = shutil.copytree(MINI / "backbone", tmp_path / "backbone")
    shard = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-4:] = b"\xff\x7f\xff\x7f"  # NaN in every float format of 16 or 32 bits
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        memory.load(folder, None, "auto")
    gc.collect()
    assert not memory._BEGUN and not any(placed.begun or placed.nbytes(CPU) for placed in memory._PATCHERS)


def test_a_cancel_during_the_reload_leaves_it_begun_and_the_next_run_right(photo, expected, monkeypatch):
    model = load()
    management.unload_all_models()
    cancels = Cancels(monkeypatch, 6)
    with pytest.raises(management.InterruptProcessingException):
        memory.at_work(model, 1, lambda: pytest.fail("the stage ran"))
    assert not model.placed.loaded and model.placed.begun and len(entries()) == 1
    cancels.at = 0
    assert torch.equal(paint(model, photo), expected)


# ---- running out of memory


class Runs:
    """A stage that runs out of memory the first times it is called."""

    def __init__(self, times: int, stage):
        self.times, self.stage, self.calls = times, stage, 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.50 GiB free.\nadvice")
        return self.stage()


def test_out_of_memory_once_runs_again_under_a_new_plan_and_says_so(photo, expected, monkeypatch):
    said = []
    monkeypatch.setattr(host, "say", said.append)
    model = load()
    condition = memory.at_work(model, 1, lambda: encode(model, [photo], "make it brighter"))
    before = model.placed.plan
    runs = Runs(1, lambda: sample(model, condition, steps=2))
    assert torch.equal(memory.at_work(model, 2, runs), expected)
    assert runs.calls == 2 and model.placed.plan is not before and model.placed.plan.request.pictures == 2
    assert "Tried to allocate 2.00 GiB" in said[-1] and "smaller plan" in said[-1] and "layers" in said[-1]


def test_out_of_memory_twice_is_an_error_with_the_numbers_and_the_remedy():
    model = load()
    runs = Runs(9, lambda: None)
    with pytest.raises(PlacementError) as raised:
        memory.at_work(model, 1, runs)
    said = str(raised.value)
    assert runs.calls == 2 and said.count("Tried to allocate 2.00 GiB") == 2 and "advice" not in said
    assert "GB planned of" in said and "format int4" in said
    assert not model.placed.loaded


def test_a_generator_runs_out_of_memory_once(photo, monkeypatch):
    model = load()
    condition = encode(model, [photo], "make it brighter")
    writer = memory.load_writer(MINI / "generator", None)
    runs = Runs(1, lambda: write_lora(writer, condition))
    monkeypatch.setattr(memory, "write_lora", lambda *args: runs())
    assert memory.write(writer, condition).tensors
    assert runs.calls == 2 and not model.placed.loaded  # the backbone had to make room


@pytest.mark.parametrize("error", [RuntimeError("a bug"), management.InterruptProcessingException()])
def test_other_errors_pass_and_unload_nothing(error):
    model = load()

    def stage():
        raise error

    with pytest.raises(type(error)):
        memory.at_work(model, 1, stage)
    assert model.placed.loaded


# ---- the generator where there is a card


@pytest.mark.parametrize(("ram", "free"), [(True, 64 << 20), (False, 4 << 20)])
def test_a_generator_holds_nothing_on_a_card_between_its_turns(photo, monkeypatch, ram, free):
    card, memory_ = parse_devices("24+64ram")
    model = load_model(MINI / "backbone")  # not through the node: no plan is known
    condition = encode(model, [photo], "make it brighter")
    resident = load_generator(MINI / "generator")
    with monkeypatch.context() as patched:
        patched.setattr(plan, "devices", lambda: (card, replace(memory_, free=free)))
        writer = memory.load_writer(MINI / "generator", None)
    assert writer.present is not None
    assert all(parameter.is_meta for parameter in writer.model.model.blocks.parameters())
    assert bool(writer.model.model.present.__self__.places) is ram
    asked = []
    monkeypatch.setattr(management, "free_memory", lambda nbytes, device, keep_loaded: asked.append((nbytes, device)))
    written, expected = memory.write(writer, condition), write_lora(resident, condition)
    assert all(torch.equal(written.tensors[key], expected.tensors[key]) for key in expected.tensors)
    (nbytes, device), = asked
    assert device == CPU and management.extra_reserved_memory() < nbytes < management.extra_reserved_memory() + (64 << 20)


def test_a_generator_works_where_the_backbones_plan_says(photo, monkeypatch):
    card, memory_ = parse_devices("24+64ram")
    model = load()
    condition = encode(model, [photo], "make it brighter")
    monkeypatch.setattr(plan, "devices", lambda: (card, memory_))
    writer = memory.load_writer(MINI / "generator", None)
    model.placed.plan = replace(model.placed.plan, generator=replace(model.placed.plan.generator, device="meta"))
    kept = []
    monkeypatch.setattr(management, "free_memory", lambda nbytes, device, keep_loaded: kept.extend(keep_loaded))
    assert memory._with_room(writer, condition).device == torch.device("meta")
    assert [loaded.model for loaded in kept] == entries()


# ---- taking turns


class OtherModel(torch.nn.Module):
    """Heavy enough that the pretended card cannot hold it and hywu-mini: 34 MB and 51 MB."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_two_models_take_turns_without_a_leak(photo, expected, monkeypatch):
    """On a pretended card that holds one of them: ComfyUI's own code decides who leaves."""
    model = load()
    condition = memory.at_work(model, 1, lambda: encode(model, [photo], "make it brighter"))
    other = comfy.model_patcher.ModelPatcher(OtherModel().requires_grad_(False), CPU, CPU)
    card = 60 << 20
    held = lambda: sum(patcher.loaded_size() for patcher in management.loaded_models())  # noqa: E731
    monkeypatch.setattr(management, "get_free_memory",
                        lambda device=None, torch_free_too=False: (card - held(), 0) if torch_free_too else card - held())
    process, sizes = psutil.Process(), []
    for turn in range(50):
        management.free_memory(other.model_size(), CPU)
        management.load_models_gpu([other])
        other.model(torch.ones(64, 1024))
        assert not model.placed.loaded and held() == other.model_size()
        management.free_memory(memory._PATCHERS[model.placed].model_size(), CPU)
        steps = 2 if turn in (0, 49) else 1
        latent = memory.at_work(model, 1, lambda steps=steps: sample(model, condition, steps=steps))
        assert model.placed.loaded and other.loaded_size() < other.model_size() and held() <= card
        if turn in (0, 49):
            assert torch.equal(latent, expected)
        sizes.append(process.memory_info().rss)
    print("RSS in MB after turns 1, 5, 10 ... 50:", [size >> 20 for size in (sizes[0], *sizes[4::5])])
    assert max(sizes[10:]) - max(sizes[:10]) < MOST_GROWTH


def test_the_fingerprint_file_that_loading_writes_is_no_change_of_the_checkpoint(tmp_path):
    """Else ComfyUI would load everything again at the second run."""
    folder = shutil.copytree(MINI / "backbone", tmp_path / "backbone")
    before = host.files_fingerprint(folder)
    (folder / "hywu_fingerprint.json").write_text("{}")
    (folder / ".hywu-0123.part").write_text("{}")
    assert host.files_fingerprint(folder) == before
    (folder / "config.json").write_text("{}")
    assert host.files_fingerprint(folder) != before
