"""Small checkpoint folders for the tests here: sound ones through the safetensors library, hostile ones byte by byte."""

import json

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def save_shards(tmp_path):
    """``save(shards, name="model")``: one file for one dict of tensors, else numbered shards and an index; gives the folder."""

    def save(*shards: dict[str, torch.Tensor], name: str = "checkpoint"):
        folder = tmp_path / name
        folder.mkdir()
        if len(shards) == 1:
            save_file(shards[0], folder / "model.safetensors")
            return folder
        weight_map = {}
        for number, tensors in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(tensors, folder / file)
            weight_map |= dict.fromkeys(tensors, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    return save


@pytest.fixture
def save_raw(tmp_path):
    """``save(header, data, length=None)``: a folder whose only file has exactly this header (dict or bytes) and data."""

    def save(header: dict | bytes, data: bytes = b"", length: int | None = None):
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)
        return folder

    return save
