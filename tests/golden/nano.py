"""The committed golden case: unpacks ``nano.tar.xz`` and writes the VAE's weights back, once, into the cache.

The archive holds the whole nano case but the pictures no stage uses and the VAE's tensors (93 % of its weights, pure noise):
these are made again from the seeds that the case's format names, ``randn`` seeded by sha256 of "{seed}:{name}".
``python -m comfyui_hywu.tests.golden.nano`` prints the folder; ``pack`` is how the archive was made.
"""

import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ARCHIVE = Path(__file__).with_name("nano.tar.xz")
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "golden"
RECIPE = "vae_recipe.json"  # tensor name -> [shape, mean, deviation]


def nano_case() -> Path:
    """The folder of the unpacked case."""
    folder = CACHE / f"nano-{hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()[:12]}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            with tarfile.open(ARCHIVE) as archive:
                archive.extractall(scratch, filter="data")
            _restore_vae(Path(scratch))
            Path(scratch).chmod(0o755)
            try:
                shutil.copytree(scratch, folder)
            except FileExistsError:
                pass  # another test process was faster
    return folder


def _restore_vae(folder: Path) -> None:
    weights = folder / "base" / "model.safetensors"
    tensors = load_file(weights)
    seed = json.loads((folder / "golden" / "manifest.json").read_text())["meta"]["seed"]
    for name, (shape, mean, deviation) in json.loads((folder / "base" / RECIPE).read_text()).items():
        tensors[name] = mean + deviation * _noise(seed, name, shape)
    save_file(tensors, weights)


def _noise(seed: int, name: str, shape: list[int]) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


def pack(case: Path) -> None:
    """Write the archive from a full case folder; raises ValueError if the VAE cannot be made again bit for bit."""
    seed = json.loads((case / "golden" / "manifest.json").read_text())["meta"]["seed"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for path in sorted(case.rglob("*")):
            unused = path.parent.name == "golden" and path.suffix == ".png" or path.stem in ("ultra", "ultrawide")
            if path.is_file() and not unused:
                target = folder / path.relative_to(case)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
        weights = folder / "base" / "model.safetensors"
        kept, recipe = load_file(weights), {}
        for name in [name for name in kept if name.startswith("vae.")]:
            tensor = kept.pop(name)
            noise = _noise(seed, name, list(tensor.shape))
            is_norm = torch.equal(1.0 + 0.1 * noise, tensor)
            mean, deviation = (1.0, 0.1) if is_norm else (0.0, float((tensor / noise).median()))
            if not torch.equal(mean + deviation * noise, tensor):
                raise ValueError(f"{name} is not mean + deviation * noise of seed {seed}")
            recipe[name] = [list(tensor.shape), mean, deviation]
        save_file(kept, weights)
        (folder / "base" / RECIPE).write_text(json.dumps(recipe))
        with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
            for part in ("base", "pg", "images", "golden"):
                archive.add(folder / part, arcname=part)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "pack":
        pack(Path(sys.argv[2]))
    print(nano_case())
