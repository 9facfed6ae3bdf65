"""LoRAs made of LoRAs: nothing is made before it is asked for, and files, digests and processes carry them unchanged."""

import copy
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.config import GeneratorConfig
from comfyui_hywu.hywu_core.json_fields import read_json
from comfyui_hywu.hywu_core.lora.algebra import GROUPS, Selection, blend, masked, mean, noted, scaled
from comfyui_hywu.hywu_core.lora.compress import compressed
from comfyui_hywu.hywu_core.lora.files import load_lora, read_summary, save_lora
from comfyui_hywu.hywu_core.lora.value import DTYPES, LoRA
from hypothesis import given, settings
from hypothesis import strategies as st

from .test_algebra import EXPERTS, LAYERS, ORIGIN, dense, few, loras, make_lora

CONFIG = Path(__file__).resolve().parent.parent / "data" / "real-config" / "hy-wu.config.json"


class Counting(Mapping):
    """Tensors that count how often each is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.tensors, self.asked = tensors, Counter()

    def __getitem__(self, key: str) -> torch.Tensor:
        self.asked[key] += 1
        return self.tensors[key]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.fixture(scope="module")
def published() -> LoRA:
    """All of the published sizes, every matrix a single number in memory."""
    config, tensors = GeneratorConfig.from_dict(read_json(CONFIG)), {}
    for layer in range(config.num_base_model_layers):
        for target in config.targets:
            for side, shape in (("A", target.a_shape(config.rank)), ("B", target.b_shape(config.rank))):
                tensors[f"{config.prefix}{layer}.{target.name}.lora_{side}"] = torch.full((), 0.5).bfloat16().expand(shape)
    return LoRA.from_tensors(tensors, config.alpha, ORIGIN)


DERIVE = {
    "scaled": lambda one, two: scaled(one, -0.5),
    "blend": lambda one, two: blend([one, two], [0.5, 2]),
    "updates": lambda one, two: mean([one, two], "updates"),
    "matrices": lambda one, two: mean([one, two]),
    "masked": lambda one, two: masked(one, Selection((1,), ("experts", "shared"), (0, 2))),
    "inverted": lambda one, two: masked(one, Selection((1,), ("experts", "shared"), (0, 2), inverted=True)),
    "nested": lambda one, two: blend([masked(scaled(blend([one, two], [1, 2]), 3), Selection((0,))), one], [1, -1]),
}


@pytest.mark.parametrize("derive", DERIVE.values(), ids=DERIVE)
def test_full_size_loras_are_combined_without_asking_for_a_matrix(published, derive):
    assert published.num_values == 722_993_152
    one, two = (replace(published, tensors=Counting(published.tensors)) for _ in range(2))
    found = derive(one, two)
    assert list(found.tensors) == list(published.tensors) and len(found.tensors) == 448
    assert found.num_values == published.num_values // 16 * found.rank
    assert not one.tensors.asked and not two.tensors.asked
    key = "model.layers.1.self_attn.o_proj.lora_B"
    assert found.tensors[key].shape == (4096, found.rank) and found.tensors[key].dtype == found.dtype
    assert set(one.tensors.asked) | set(two.tensors.asked) <= {key}
    with pytest.raises(KeyError):
        found.tensors["model.layers.32.self_attn.o_proj.lora_B"]


def test_what_is_masked_out_takes_no_memory(published):
    only = masked(published, Selection(groups=GROUPS[:1]))
    zeros = only.tensors["model.layers.31.mlp.experts.w2.lora_B"]
    assert zeros.shape == (64, 4096, 16) and zeros.untyped_storage().nbytes() == 2 and not zeros.any()


def test_a_derived_lora_follows_its_shapes_and_dtype():
    """What is said without a matrix (rank, dtype, targets) is what the matrices are."""
    for derive in DERIVE.values():
        found = derive(make_lora(0, 2, torch.bfloat16), make_lora(1, 2, torch.float64))
        checked = LoRA.from_tensors(dict(found.tensors), found.alpha, rank_weights=found.rank_weights)
        assert (checked.rank, checked.dtype, checked.targets) == (found.rank, found.dtype, found.targets)
        assert checked.nbytes == found.nbytes == sum(matrix.nbytes for matrix in checked.tensors.values())
        assert checked.digest == found.digest == derive(make_lora(0, 2, torch.bfloat16), make_lora(1, 2, torch.float64)).digest


@st.composite
def derived(draw) -> LoRA:
    """One to three steps of algebra."""
    found = draw(loras())
    for step in draw(st.lists(st.sampled_from(["scale", "blend", "mask", "mean", "compress"]), min_size=1, max_size=3)):
        if step == "scale":
            found = scaled(found, draw(st.sampled_from([0.0, -1.0, 1 / 3])))
        elif step == "blend":
            found = blend([found, draw(loras())], [draw(st.sampled_from([-0.1, 0.7])), 1.0])
        elif step == "mask":
            layers = draw(st.sampled_from([None, (0,), (LAYERS - 1,)]))
            experts = draw(st.sampled_from([None, (1,), range(EXPERTS)]))
            found = masked(found, Selection(layers, experts=experts))
        elif step == "mean":
            found = mean([found, scaled(found, 1)])
        else:
            found = compressed(found, draw(st.integers(1, 4))).lora
    return found


@settings(few, max_examples=25)
@given(derived())
def test_a_file_holds_what_was_saved(tmp_path_factory, lora):
    path = tmp_path_factory.getbasetemp() / "derived.safetensors"
    saved = save_lora(lora, path)
    back = load_lora(path)
    assert saved.digest == lora.digest == back.digest and saved.error == 0
    assert (back.rank_weights, back.alpha, back.rank, back.dtype, back.targets, back.provenance) == (
        lora.rank_weights, lora.alpha, lora.rank, lora.dtype, lora.targets, lora.provenance)
    assert list(back.tensors) == list(lora.tensors)
    for key, matrix in lora.tensors.items():
        assert torch.equal(back.tensors[key], matrix) and back.tensors[key].dtype == matrix.dtype
    before = path.read_bytes()
    save_lora(back, path)
    assert path.read_bytes() == before
    assert read_summary(path).digest in (None, lora.digest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("derive", DERIVE.values(), ids=DERIVE)
def test_derived_loras_of_every_dtype_are_saved_whole(tmp_path, derive, dtype):
    lora = derive(make_lora(0, 2, dtype), make_lora(1, 2, dtype))
    saved = save_lora(lora, tmp_path / "x.safetensors")
    assert load_lora(saved.path).digest == saved.digest == lora.digest


@pytest.mark.parametrize("seed", range(8))
def test_loras_that_cancel_each_other_are_saved_in_fp8_too(tmp_path, seed):
    """The norm of nothing, from products of large numbers, must not come out below 0."""
    one = make_lora(seed, 5)
    saved = save_lora(blend([one, one, one], [1, -3, 2]), tmp_path / "x.safetensors", stored="fp8")
    assert saved.error == 0 and load_lora(saved.path).rank == 15


@pytest.mark.parametrize("send", [copy.deepcopy, lambda lora: pickle.loads(pickle.dumps(lora))])
@pytest.mark.parametrize("derive", DERIVE.values(), ids=DERIVE)
def test_it_can_be_sent(send, derive):
    lora = derive(make_lora(0), make_lora(1))
    arrived = send(lora)
    assert arrived.digest == lora.digest and arrived.provenance == lora.provenance
    for place, update in dense(lora).items():
        assert torch.equal(dense(arrived)[place], update)


def test_a_digest_sees_factors_but_not_notes():
    lora = make_lora()
    twice = LoRA.from_tensors(lora.tensors, lora.alpha, rank_weights=(2.0, 2.0))
    assert scaled(lora, 2).digest == twice.digest != lora.digest
    assert len({found.digest for found in (lora, scaled(lora, 2), scaled(lora, -2), scaled(lora, 0))}) == 4
    assert replace(lora, provenance=noted(ORIGIN, "a note")).digest == lora.digest
