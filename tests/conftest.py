"""Makes the repository importable as ``comfyui_hywu`` whatever folder it was cloned into, installed or not."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load_package() -> None:
    spec = importlib.util.spec_from_file_location(
        "comfyui_hywu", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_hywu"] = module
    spec.loader.exec_module(module)


if "comfyui_hywu" not in sys.modules:
    _load_package()


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> tuple[Path, Path]:
    """(backbone, generator) folders of a tiny random checkpoint; not to be changed."""
    from comfyui_hywu.tests.tiny import write_backbone, write_generator

    root = tmp_path_factory.mktemp("tiny")
    backbone = write_backbone(root / "backbone")
    return backbone, write_generator(root / "generator", backbone)


@pytest.fixture(scope="session")
def tiny_model(tiny_folders):
    """The tiny backbone, loaded; a frozen value that tests share."""
    from comfyui_hywu.hywu_core.handle import load_model

    return load_model(tiny_folders[0])


@pytest.fixture(scope="session")
def tiny_generator(tiny_folders):
    from comfyui_hywu.hywu_core.generator.handle import load_generator

    return load_generator(tiny_folders[1])


@pytest.fixture(scope="session")
def photo():
    """A smooth 80 x 60 picture with structure in it."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:60, 0:80]
    return Image.fromarray(np.stack([x * 3, y * 4, (x + y) * 1.8], axis=-1).clip(0, 255).astype(np.uint8))
