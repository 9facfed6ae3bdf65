"""What crosses: every kind of value comes back as it went, and nothing else is read."""

import json
import pickle

import pytest
import torch
from comfyui_hywu.hywu_core import errors
from comfyui_hywu.hywu_core.backbone.pictures import EncodedPicture
from comfyui_hywu.hywu_core.cluster.wire import error_of, opened, pack, parcel, unpack
from comfyui_hywu.hywu_core.condition import Condition
from comfyui_hywu.hywu_core.errors import ClusterError
from comfyui_hywu.hywu_core.lora.value import Provenance
from comfyui_hywu.hywu_core.sampling.taylor import TaylorSettings
from comfyui_hywu.hywu_core.vision.buckets import Bucket
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text(max_size=5).filter(lambda key: not key.startswith("$")), inner, max_size=3), max_leaves=10)


@given(st.dictionaries(st.text(max_size=5).filter(lambda key: not key.startswith("$")), PLAIN, max_size=4))
@settings(max_examples=60, deadline=None)
def test_plain_values_come_back(message):
    assert unpack(pack(message)) == message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0,), (3, 1, 2)])
def test_tensors_come_back_bit_for_bit(dtype, shape):
    tensor = (torch.randn(shape) * 3).to(dtype)
    found = unpack(pack({"x": tensor, "y": [tensor.mT if tensor.ndim == 3 else tensor]}))
    assert found["x"].dtype == dtype and torch.equal(found["x"], tensor)
    again = opened(parcel(tensor), torch.device("cpu"))
    assert again.dtype == dtype and again.shape == tensor.shape and torch.equal(again, tensor)


def test_a_parcel_is_opened_into_memory_of_its_own():
    tensor = torch.ones(4)
    found = opened(parcel(tensor), torch.device("cpu"))
    found += 1
    assert tensor.tolist() == [1.0] * 4


def condition() -> Condition:
    picture = EncodedPicture(Bucket(3, 64, 32), (2, 3), torch.randn(4, 4, 2), torch.randn(8, 16).bfloat16(), torch.randn(5, 16),
                             (63, 31), "abc")
    return Condition(torch.randn(7, 16), 3, "heller", "<think>x</think>", "en_unified", -5, (picture, picture), "f" * 16)


def test_a_condition_comes_back():
    sent = condition()
    found = unpack(pack({"condition": sent}))["condition"]
    assert type(found) is Condition and torch.equal(found.hidden_SD, sent.hidden_SD) and found.picture_digests == ("abc", "abc")
    assert found.pictures[1].bucket == Bucket(3, 64, 32) and found.pictures[1].vae_tokens_LD.dtype == torch.bfloat16
    assert found.seed == -5 and found.pictures[0].grid == (2, 3)


def test_other_values_of_an_edit_come_back():
    message = {"taylor": TaylorSettings(3), "provenance": Provenance(instruction="a", picture_digests=("x", "y"))}
    assert unpack(pack(message)) == message


def test_pictures_come_back_as_rgb():
    picture = Image.new("RGBA", (20, 17), (10, 20, 30, 0))
    found = unpack(pack({"p": (picture,)}))["p"][0]
    assert found.mode == "RGB" and found.size == (20, 17) and found.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("value", [object(), {1: 2}, {"$tensor": "0"}, b"bytes", {1, 2}, print])
def test_other_values_are_not_sent(value):
    with pytest.raises(ClusterError, match="cannot be sent"):
        pack({"x": value})


def test_numbers_that_are_none_are_not_sent():
    with pytest.raises(ValueError):
        pack({"x": float("nan")})


def made(text: str, **tensors: torch.Tensor) -> bytes:
    from safetensors.torch import save

    return save(tensors or {"0": torch.zeros(2)}, metadata={"hywu": text})


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("data", [
    b"", b"short", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}", pickle.dumps(Bomb()),
    pack({"a": torch.ones(100)})[:-10], made("not json"), made('{"x": {"$tensor": "9"}}'), made('{"x": {"$Nobody": {}}}'),
    made('{"x": {"$Condition": {"seed": 1}}}'), made('{"x": {"$picture": {"$tensor": "0"}}}'), made('{"x": {"$tensor": [1]}}'),
    made(json.dumps({"x": {"$tensor": "0", "more": 1}})), made('{"x": {"$Bucket": 3}}')])
def test_hostile_bytes_are_refused(data, capsys):
    with pytest.raises(ClusterError):
        unpack(data)
    assert capsys.readouterr().out == ""


@given(st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_refused(data):
    with pytest.raises(ClusterError):
        unpack(data)


def test_errors_cross_by_their_names():
    assert type(error_of("LoRAError", "text")) is errors.LoRAError and str(error_of("LoRAError", "text")) == "text"
    for unknown in ("os", "Exception", "__doc__", "annotations"):
        assert type(error_of(unknown, "text")) is ClusterError
