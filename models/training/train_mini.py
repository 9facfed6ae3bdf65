"""Make models/hywu-mini from nothing but Debian packages of free wallpapers: ``python models/training/train_mini.py``.

Owns the order of the stages and their minutes; each stage is a file of its own. All intermediate files lie in the work
folder, and a stage whose file is there already is not run again. Needs apt-get and dpkg-deb (Debian), and the project's
virtual environment.
"""

import argparse
import time
from pathlib import Path

import base_stage
import born
import config
import edit_loras
import export
import generator_stage
import numpy as np
import pca_vae
import photos
import torch
import words
from comfyui_hywu.hywu_core.config import BackboneConfig, GeneratorConfig, VAEConfig
from comfyui_hywu.hywu_core.generator.model import ParameterGenerator
from comfyui_hywu.hywu_core.vision.vae import VAE
from data import Data
from network import Backbone
from safetensors.torch import load_file, save_file

SEED = 0
VAE_CROPS = 120  # of every grid; the VAE's statistics need no more


def main() -> None:
    """Run all stages and write backbone/ and generator/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("mini-work"), help="where photos and intermediate files go")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "hywu-mini")
    parser.add_argument("--base-minutes", type=float, default=9)
    parser.add_argument("--generator-minutes", type=float, default=29)
    parser.add_argument("--crops", type=int, default=20, help="crops a photo")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = options.work
    work.mkdir(parents=True, exist_ok=True)
    began = time.time()

    if not (work / "crops.npz").is_file():
        crops = photos.cut(photos.fetch(work / "packages"), options.crops, SEED)
        np.savez(work / "crops.npz", **{f"{rows}x{cols}": pixels for (rows, cols), pixels in crops.items()})
    with np.load(work / "crops.npz") as file:
        crops = {tuple(int(part) for part in name.split("x")): file[name] for name in file.files}
    print(f"crops {sum(map(len, crops.values()))}, {time.time() - began:.0f} s", flush=True)

    vae = stage(
        work / "vae.safetensors",
        lambda: VAE(VAEConfig.from_dict(pca_vae.CONFIG)),
        lambda: pca_vae.build([pixels[:VAE_CROPS] for pixels in crops.values()], SEED),
    )
    data = Data(crops, *pca_vae.as_convolution(vae), SEED)
    settings = BackboneConfig.from_dict(config.backbone(len(data.vocab) + len(data.special), data.special))
    print(f"VAE {time.time() - began:.0f} s", flush=True)

    torch.manual_seed(SEED)
    model = stage(work / "base.safetensors", lambda: Backbone(settings), lambda: base(settings, data, options.base_minutes))
    model.requires_grad_(False)
    loras = edit_loras.solve(model, data, config.RANK)
    generator = stage(
        work / "generator.safetensors",
        lambda: ParameterGenerator(GeneratorConfig.from_dict(config.generator())),
        lambda: generator_stage.train(model, data, loras, options.generator_minutes),
    )
    export.export_backbone(model, vae, data.special, options.out / "backbone")
    export.export_generator(generator, options.out / "generator")
    print(f"{options.out} written, {(time.time() - began) / 60:.1f} min in all", flush=True)


def stage(path: Path, build, run):
    """``run()`` and keep its weights in ``path``; if they are there, ``build()`` and load them."""
    if path.is_file():
        module = build()
        module.load_state_dict(load_file(path))
        return module
    module = run()
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, path)
    return module


def base(settings: BackboneConfig, data: Data, minutes: float) -> Backbone:
    """The structured start, the places, then the language."""
    model = Backbone(settings)
    born.born(model, data.special[words.SIZE_TOKEN], [data.special[f"<img_ratio_{index}>"] for index in range(words.RATIOS)])
    base_stage.find_places(model, data)
    base_stage.train(model, data, minutes)
    base_stage.report_copies(model, data)
    return model


if __name__ == "__main__":
    main()
