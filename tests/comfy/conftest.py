"""One ComfyUI server for all tests of this folder, with the committed golden case's random checkpoint as its models.

The random checkpoint makes no sensible pictures, but runs every stage in milliseconds.
"""

import shutil

import pytest
from comfyui_hywu.tests.comfy.deep import write_deep_checkpoint
from comfyui_hywu.tests.comfy.graphs import DATA
from comfyui_hywu.tests.comfy.server import ComfyServer
from comfyui_hywu.tests.golden.nano import nano_case


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory):
    """A running ComfyUI whose models/hywu holds nano/ and deep/, and whose input folder holds the two photos."""
    nano = nano_case()
    base = tmp_path_factory.mktemp("comfyui")
    models = base / "models" / "hywu"
    models.mkdir(parents=True)
    (models / "nano").symlink_to(nano, target_is_directory=True)
    write_deep_checkpoint(nano, models / "deep")
    elsewhere = base / "elsewhere"
    shutil.copytree(nano / "pg", elsewhere / "more_models" / "other_pg")
    yaml = base / "paths.yaml"
    yaml.write_text(f"tests:\n  base_path: {elsewhere}\n  hywu: more_models\n", encoding="utf-8")
    # One thread: the tensors are so small that several only wait for each other (10 times slower on a busy machine).
    running = ComfyServer(base, ("--extra-model-paths-config", str(yaml)), {"OMP_NUM_THREADS": "1"})
    shutil.copy(DATA / "photo.jpg", running.folder("input") / "example.png")
    shutil.copy(DATA / "coffee.jpg", running.folder("input") / "coffee.jpg")
    with running:
        yield running
