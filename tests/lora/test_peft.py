"""PEFT folders: the real peft library loads what is exported, and what is imported does the same as in peft."""

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.errors import LoRAError, RequestError
from comfyui_hywu.hywu_core.lora.algebra import Selection, blend, masked, scaled
from comfyui_hywu.hywu_core.lora.peft import export_peft
from comfyui_hywu.hywu_core.lora.peft_import import import_peft
from comfyui_hywu.hywu_core.lora.targets import PUBLISHED, Adapted, adapted, targets_of
from comfyui_hywu.hywu_core.lora.value import LoRA, Provenance
from comfyui_hywu.kernels import reference
from comfyui_hywu.kernels.reference import Adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

SIZES = Adapted(2, targets_of(width=12, attention=8, qkv=16, shared=10, inner=6, experts=3))
ORIGIN = Provenance(backbone_fingerprint="0123456789abcdef", instruction="blue \"now\" 🎨", seed=7, picture_digests=("a",))


def make_lora(rank: int = 4, dtype: torch.dtype = torch.float32, weights=None, sizes: Adapted = SIZES, seed: int = 0) -> LoRA:
    generator = torch.Generator().manual_seed(seed)
    return LoRA.from_tensors({
        f"model.layers.{layer}.{target.name}.lora_{side}": torch.randn(shape, generator=generator).to(dtype)
        for layer in range(sizes.num_layers) for target in sizes.targets
        for side, shape in (("A", target.a_shape(rank)), ("B", target.b_shape(rank)))}, 7.5, ORIGIN, rank_weights=weights)


def tree() -> nn.Module:
    """The published module tree around the adapted projections, and some of what must stay as it is."""
    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    def mlp(inner: int) -> nn.Module:
        return nn.ModuleDict({"gate_and_up_proj": linear(12, 2 * inner), "down_proj": linear(inner, 12)})

    torch.manual_seed(3)
    layers = [nn.ModuleDict({
        "self_attn": nn.ModuleDict({"qkv_proj": linear(12, 16), "o_proj": linear(8, 12), "query_layernorm": nn.LayerNorm(2)}),
        "mlp": nn.ModuleDict({"gate": nn.ModuleDict({"wg": linear(12, 3)}), "shared_mlp": mlp(10),
                              "experts": nn.ModuleList(mlp(6) for _ in range(3))})}) for _ in range(2)]
    return nn.ModuleDict({
        "model": nn.ModuleDict({"wte": nn.Embedding(5, 12), "layers": nn.ModuleList(layers)}), "lm_head": linear(12, 5),
        "vision_model": nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({
            "self_attn": nn.ModuleDict({"q_proj": linear(4, 4), "o_proj": linear(4, 4)}), "mlp": mlp(5)})])})})})


def in_peft(folder: Path) -> dict[str, torch.Tensor]:
    """Adapted module -> what peft adds to its output for the identity, (I, O)."""
    from peft import PeftModel

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in tree().items():
                self.add_module(name, child)

    plain = dict(tree().named_modules())
    model = PeftModel.from_pretrained(Whole(), str(folder)).eval()
    found = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            eye = torch.eye(plain[name].in_features)
            with torch.no_grad():
                found[name] = module(eye) - plain[name](eye)
    return found


def ours(lora: LoRA) -> dict[str, torch.Tensor]:
    """Published module -> our update (I, O)."""
    found = {}
    for layer in range(lora.num_layers):
        updates = {name: ((b.double() * lora.scale_R) @ a.double()).mT.float() for name, (a, b) in lora.layer(layer).items()}
        path = f"model.layers.{layer}."
        found |= {path + name: update for name, update in updates.items() if update.ndim == 2}
        for expert in range(SIZES.targets[-1].experts):
            up, gate, down = (updates[f"mlp.experts.{name}"][expert] for name in ("w3", "w1", "w2"))
            found[f"{path}mlp.experts.{expert}.gate_and_up_proj"] = torch.cat([up, gate], dim=-1)
            found[f"{path}mlp.experts.{expert}.down_proj"] = down
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, update in expected.items():
        torch.testing.assert_close(found[name], update, rtol=tolerance, atol=tolerance * max(1.0, float(update.abs().max())))


@pytest.mark.parametrize("weights", [None, (-0.5,) * 4, (1.0, 0.0, -2.0, 0.3)])
def test_peft_does_what_we_do(tmp_path, weights):
    lora = make_lora(weights=weights)
    assert_same(in_peft(export_peft(lora, tmp_path / "adapter")), ours(lora))


def test_an_expert_in_peft_is_an_expert_of_our_backbone(tmp_path):
    """The order of gate and up, proven with the arithmetic that an edit runs: published expert in peft, stacked expert here."""
    from peft import PeftModel

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tree()["model"]

    lora, whole = make_lora(), Whole()
    experts = whole.model["layers"][1]["mlp"]["experts"]
    gate_up, down = (torch.stack([expert[name].weight.detach() for expert in experts])
                     for name in ("gate_and_up_proj", "down_proj"))
    x_TD, expert_TK = torch.randn(5, 12), torch.tensor([[0], [1], [2], [1], [0]])
    pairs = lora.layer(1)
    adapters = {side: Adapter(*pairs[f"mlp.experts.{name}"], lora.scale_R.float())
                for side, name in (("up", "w3"), ("gate", "w1"), ("down", "w2"))}
    expected = reference.expert_mlp(x_TD, gate_up, down, expert_TK, torch.ones(5, 1), **adapters)
    adapted_model = PeftModel.from_pretrained(whole, str(export_peft(lora, tmp_path / "adapter"))).eval()
    layers = adapted_model.get_base_model().model["layers"]
    rows = []
    for row, (chosen,) in zip(x_TD, expert_TK.tolist(), strict=True):
        expert = layers[1]["mlp"]["experts"][chosen]
        up, gate = expert["gate_and_up_proj"](row[None]).chunk(2, dim=-1)  # spec section 2: first half up, second half gate
        rows.append(expert["down_proj"](up * nn.functional.silu(gate)))
    torch.testing.assert_close(torch.cat(rows).detach(), expected, rtol=1e-4, atol=1e-4)


def test_the_names_are_the_published_checkpoints(tmp_path):
    """Of the real key list (spec/real-config/real_keys.json) these are layer 0's and expert 0's projections."""
    published = {f"model.layers.0.{name}" for name in (
        "self_attn.qkv_proj", "self_attn.o_proj", "mlp.shared_mlp.gate_and_up_proj", "mlp.shared_mlp.down_proj",
        "mlp.experts.0.gate_and_up_proj", "mlp.experts.0.down_proj")}
    with safe_open(export_peft(make_lora(), tmp_path / "a") / "adapter_model.safetensors", framework="pt") as file:
        found = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in file.keys()}  # noqa: SIM118
    assert {name for name in found if name.startswith("model.layers.0.") and "experts.1" not in name
            and "experts.2" not in name} == published
    assert sum(math.prod(shape) for target in PUBLISHED.targets for shape in (target.a_shape(16), target.b_shape(16))
               ) * PUBLISHED.num_layers == 722_993_152


# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_and_import_give_the_lora_back(tmp_path, dtype):
    lora = make_lora(dtype=dtype)
    back = import_peft(export_peft(lora, tmp_path / "a"))
    assert back.digest == lora.digest and back.provenance == lora.provenance


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 5), weights=st.lists(st.floats(-4, 4), min_size=5, max_size=5),
       layers=st.sets(st.integers(0, 1)), experts=st.sets(st.integers(0, 2)), inverted=st.booleans(), seed=st.integers(0, 99))
def test_any_lora_survives_the_round_trip(tmp_path_factory, rank, weights, layers, experts, inverted, seed):
    lora = make_lora(rank, weights=tuple(weights[:rank]), seed=seed)
    if layers and experts and not (inverted and len(layers) == 2 and len(experts) == 3):  # that would leave nothing
        lora = masked(lora, Selection(layers=layers, experts=experts, inverted=inverted))
    back = import_peft(export_peft(lora, tmp_path_factory.mktemp("peft") / "a"))
    assert_same(ours(back), ours(lora))
    assert back.provenance == lora.provenance


def test_a_blend_can_be_exported(tmp_path):
    mixed = blend([make_lora(), make_lora(2, seed=1)], [0.7, -1.2])
    back = import_peft(export_peft(mixed, tmp_path / "a"))
    assert back.rank == 6 and back.provenance.made == mixed.provenance.made
    assert_same(ours(back), ours(mixed))
    assert_same(in_peft(tmp_path / "a"), ours(mixed))


def test_a_negative_or_zero_factor_stays_one(tmp_path):
    for factor in (-1.5, 0.0):
        back = import_peft(export_peft(scaled(make_lora(), factor), tmp_path / f"{factor}"))
        assert_same(ours(back), ours(scaled(make_lora(), factor)))


# ---- ordinary folders


def peft_folder(path: Path, targets: str = r".*\.(qkv_proj|o_proj)", **options) -> Path:
    """As a training with peft leaves it: made and saved by the library, B filled with noise."""
    from peft import LoraConfig, get_peft_model

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tree()["model"]

    model = get_peft_model(Whole(), LoraConfig(target_modules=targets, **{"r": 3, "lora_alpha": 5} | options))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(str(path))
    return path


ALL = r"model\.layers\.\d+\.(self_attn\.(qkv_proj|o_proj)|mlp\.(shared_mlp|experts\.\d+)\.(gate_and_up_proj|down_proj))"


@pytest.mark.parametrize("targets, options", [
    (r".*\.(qkv_proj|o_proj)", {}), (r".*\.o_proj", {"use_rslora": True}), (ALL, {}), (ALL, {"use_rslora": True}),
    (r".*\.layers\.1\..*experts\.2\.gate_and_up_proj", {"lora_alpha": 16}),
    (ALL, {"rank_pattern": {"qkv_proj": 7, r"experts\.\d+\.down_proj": 2}, "alpha_pattern": {"o_proj": 11, "shared_mlp.*": 1}}),
    (ALL, {"alpha_pattern": {"self_attn.qkv_proj": 20}, "use_rslora": True, "lora_dropout": 0.1}),
    (ALL, {"rank_pattern": {"model.layers.0.self_attn.qkv_proj": 1}, "init_lora_weights": "gaussian"}),
    (["qkv_proj", "down_proj"], {"layers_to_transform": [1]})])
def test_an_ordinary_lora_does_what_it_does_in_peft(tmp_path, targets, options):
    folder = peft_folder(tmp_path / "a", targets, **options)
    ticks = []
    lora = import_peft(folder, SIZES, lambda done, total, _: ticks.append((done, total)))
    expected = {name: update for name, update in in_peft(folder).items() if name.startswith("model.")}
    zero = {name: torch.zeros_like(update) for name, update in ours(lora).items()}
    assert_same(ours(lora), zero | expected)
    assert [(target.name, target.in_features) for target in lora.targets] == [
        (target.name, target.in_features) for target in SIZES.targets]
    assert ticks == [(done, 2 * len(expected)) for done in range(1, 2 * len(expected) + 1)]
    assert lora.provenance.made == "imported from the PEFT folder a"


def test_what_is_missing_takes_no_memory(tmp_path):
    lora = import_peft(peft_folder(tmp_path / "a"), SIZES)
    missing = lora.tensors["model.layers.0.mlp.experts.w1.lora_A"]
    assert missing.untyped_storage().nbytes() == 4 and missing.shape == (3, 3, 12) and not missing.any()


def test_a_whole_lora_says_its_sizes_itself_and_a_part_is_taken_for_the_published_models(tmp_path):
    assert import_peft(peft_folder(tmp_path / "a", ALL)).num_layers == 2
    with pytest.raises(LoRAError, match="goes from .* expected 4096 to .* 32 layers and 64 experts: if .* name that"):
        import_peft(peft_folder(tmp_path / "b"))
    with pytest.raises(LoRAError, match="trained on another model"):
        import_peft(tmp_path / "b", PUBLISHED)


def test_an_attention_lora_of_the_published_size_is_imported_without_the_model(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    save_file({f"base_model.model.model.layers.31.self_attn.o_proj.lora_{side}.weight": torch.randn(shape).bfloat16()
               for side, shape in (("A", (2, 4096)), ("B", (4096, 2)))}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3}))
    lora = import_peft(folder)
    assert (lora.num_layers, lora.rank, lora.dtype, lora.targets) == (32, 2, torch.bfloat16, PUBLISHED.targets)
    assert lora.scale == 1.5 and lora.tensors["model.layers.31.self_attn.o_proj.lora_B"].any()


def test_sizes_come_from_a_backbones_configuration(tiny_folders, tiny_model):
    from comfyui_hywu.hywu_core.config import BackboneConfig
    from comfyui_hywu.hywu_core.lora.attach import check_targets

    sizes = adapted(BackboneConfig.from_folder(tiny_folders[0]))
    check_targets(tiny_model.backbone, make_lora(sizes=sizes))


# ---- refusals


def config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("changes, message", [
    ({"use_dora": True}, "'use_dora' is True, expected nothing"), ({"bias": "all"}, "bias is 'all', expected 'none'"),
    ({"modules_to_save": ["lm_head"]}, "'modules_to_save'"), ({"lora_bias": True}, "'lora_bias'"),
    ({"fan_in_fan_out": True}, "'fan_in_fan_out'"), ({"trainable_token_indices": [1]}, "'trainable_token_indices'"),
    ({"target_parameters": ["x"]}, "'target_parameters'"), ({"of_the_future": {"a": 1}}, "'of_the_future'"),
    ({"layer_replication": [[0, 1]]}, "'layer_replication'"), ({"init_lora_weights": "pissa"}, "'pissa'.*base weights"),
    ({"init_lora_weights": [[["x"]]]}, "init_lora_weights"), ({"peft_type": "IA3"}, "'IA3', expected 'LORA'"),
    ({"r": 0}, "r is 0"), ({"r": True}, "r is True"), ({"r": "3"}, "r is '3'"), ({"r": 10**30}, "r is 1000"),
    ({"r": 5}, "rank 5 in adapter_config.json"), ({"lora_alpha": None}, "lora_alpha is None"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"), ({"lora_alpha": 10**400}, "lora_alpha"),
    ({"rank_pattern": {"o_proj": 2.5}}, "2.5, expected a whole"), ({"rank_pattern": [1]}, "expected an object"),
    ({"alpha_pattern": {"o_proj": "9"}}, "expected a finite number"), ({"alpha_pattern": {"(a+)+$": 1}}, "write it simpler"),
    ({"alpha_pattern": {"(a|a)*x": 1}}, "write it simpler"), ({"alpha_pattern": {".*.*.*.*x": 1}}, "write it simpler"),
    ({"alpha_pattern": {"(o_proj": 1}}, "no regular expression"), ({"alpha_pattern": {"(?<=a)b": 1}}, "write it simpler"),
    ({"alpha_pattern": {"a" * 300: 1}}, "write it simpler"), ({"rank_pattern": {"o_proj": 2}}, "rank 2 in adapter_config")])
def test_what_a_lora_of_ours_cannot_be_is_refused(tmp_path, changes, message):
    folder = peft_folder(tmp_path / "a")
    config(folder, **changes)
    with pytest.raises(LoRAError, match=message) as caught:
        import_peft(folder, SIZES)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("name, shape, message", [
    ("lm_head.lora_A.weight", (3, 12), "1 of 9 tensors belong to no projection.*lm_head"),
    ("model.layers.0.mlp.gate.wg.lora_A.weight", (3, 12), "gate.wg"),
    ("model.layers.0.self_attn.o_proj.lora_magnitude_vector", (12,), "lora_magnitude_vector"),
    ("model.layers.0.self_attn.o_proj.lora_B.bias", (12,), "lora_B.bias"),
    ("../../etc/passwd", (1,), "etc/passwd"),
    ("model.layers.0.mlp.shared_mlp.down_proj.lora_A.weight", (3, 10), "expected A .rank, in. and B"),
    ("model.layers.0.self_attn.o_proj.lora_A.weight", (3, 8, 3, 3), "expected a matrix.*convolutions"),
    ("model.layers.0.self_attn.o_proj.lora_A.weight", (2, 8), "rank 3 in adapter_config.json"),
    ("model.layers.0.self_attn.o_proj.lora_A.weight", (3, 9), "goes from 9 to 12, expected 8 to 12"),
    ("model.layers.0.self_attn.o_proj.lora_A.weight", (3, 0), "expected a matrix")])
def test_tensors_that_have_no_place_are_refused(tmp_path, name, shape, message):
    folder = peft_folder(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights) | {f"base_model.model.{name}": torch.zeros(shape)}, weights)
    with pytest.raises(LoRAError, match=message):
        import_peft(folder, SIZES)


def test_layers_and_experts_that_the_model_has_not(tmp_path):
    folder = peft_folder(tmp_path / "a", ALL)
    for sizes in (Adapted(1, SIZES.targets), Adapted(2, targets_of(12, 8, 16, 10, 6, experts=2))):
        with pytest.raises(LoRAError, match=f"{sizes.num_layers} layers and {sizes.targets[-1].experts} experts"):
            import_peft(folder, sizes)


def test_values_are_checked(tmp_path):
    folder = peft_folder(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(LoRAError, match="layers.1.self_attn.o_proj.lora_B holds NaN or Inf in 1 of"):
        import_peft(folder, SIZES)


def test_files_that_are_missing_cut_off_or_pickled(tmp_path):
    with pytest.raises(LoRAError, match="no PEFT folder"):
        import_peft(tmp_path)
    folder = peft_folder(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(LoRAError, match=rf"\({length} bytes\) is cut off"):
            import_peft(folder, SIZES)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(LoRAError, match="there is adapter_model.bin .* only safetensors are read"):
        import_peft(folder, SIZES)
    for text in ("{", "[]", "[" * 100_000, '{"r": ' + "9" * 5000 + "}"):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(LoRAError, match="no PEFT folder"):
            import_peft(folder, SIZES)
    (folder / "adapter_config.json").write_text(" " * (8 << 20) + "{}")
    with pytest.raises(LoRAError, match="bytes, expected at most"):
        import_peft(folder, SIZES)


def test_a_rank_above_the_limit(tmp_path):
    with pytest.raises(LoRAError, match="qkv_proj has rank 300, a LoRA of HY-WU has at most 256"):
        import_peft(peft_folder(tmp_path / "a", rank_pattern={"qkv_proj": 300}), SIZES)


@settings(max_examples=40, deadline=2000)
@given(pattern=st.text(alphabet=r"ab.*+?\d()|[0-9]^$", max_size=24))
def test_no_pattern_takes_for_ever(pattern):
    from comfyui_hywu.hywu_core.lora.peft_config import _patterns

    try:
        found = _patterns({"rank_pattern": {pattern: 1}}, "rank_pattern", Path("x"))
    except LoRAError:
        return
    started = time.perf_counter()
    for name in ("a" * 60, "ab" * 30, "model.layers.0.mlp.experts.63.gate_and_up_proj", "0" * 60, "a." * 30 + "!"):
        found[0][0].match(name)
    assert time.perf_counter() - started < 0.5


# ---- writing


def test_an_export_appears_whole_or_not_at_all(tmp_path):
    def cancel(done, total, latent):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_peft(make_lora(), tmp_path / "a", cancel)
    assert not list(tmp_path.iterdir())
    export_peft(make_lora(), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(RequestError, match="there already"):
        export_peft(make_lora(), tmp_path / "a")
    with pytest.raises(LoRAError, match="does not exist"):
        export_peft(make_lora(), tmp_path / "no" / "a")


def test_names_that_peft_would_not_find_are_refused(tmp_path):
    tensors = make_lora().tensors
    other = LoRA.from_tensors({key.replace("model.layers.", "blocks."): tensor for key, tensor in tensors.items()}, 1)
    half = LoRA.from_tensors({key: tensor for key, tensor in tensors.items() if ".w1." not in key}, 1)
    for lora in (other, half):
        with pytest.raises(LoRAError, match=re.escape("published module tree")):
            export_peft(lora, tmp_path / "a")
    assert not list(tmp_path.iterdir())
