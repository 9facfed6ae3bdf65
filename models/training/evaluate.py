"""What the small checkpoint can do: held-out photos and phrasings through the ordinary edit flow of the core.

Owns the measurements in models/hywu-mini/README.md. Usage: python models/training/evaluate.py FOLDER SHEET.png PHOTO...
(FOLDER holds backbone/ and generator/; the photos must not have been trained on, scikit-image's are not).
"""

import sys
import time
from pathlib import Path

import numpy as np
import photos
import torch
import words
from comfyui_hywu.hywu_core.condition import encode
from comfyui_hywu.hywu_core.edit import decode
from comfyui_hywu.hywu_core.generator.model import load_generator, write_lora
from comfyui_hywu.hywu_core.handle import load_model
from comfyui_hywu.hywu_core.lora.attach import inject
from comfyui_hywu.hywu_core.sampling.denoise import choose_bucket, sample
from comfyui_hywu.hywu_core.think import think
from comfyui_hywu.hywu_core.vision.buckets import Buckets
from PIL import Image


def psnr(one: Image.Image, other: np.ndarray) -> float:
    """dB between a picture and an array (h, w, 3) in 0..1."""
    return float(-10 * np.log10(np.square(np.asarray(one, np.float32) / 255 - other).mean()))


def main(folder: Path, sheet: Path, paths: list[str]) -> None:
    """Print one line a photo and edit, the thinking's accuracy, and draw the sheet: source, plain backbone, the edits."""
    model, generator = load_model(folder / "backbone"), load_generator(folder / "generator")
    pictures = [Image.open(path).convert("RGB") for path in paths]
    cell, rows = 208, []
    scores: dict[str, list[tuple[float, ...]]] = {edit: [] for edit in photos.EDITS}
    for number, (path, picture) in enumerate(zip(paths, pictures, strict=True)):
        row = []
        bucket = Buckets.of(model.config).nearest(picture.height, picture.width)
        source = picture.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS)
        pixels = np.asarray(source).astype(np.float32) / 255
        vae = model.backbone.vae
        with torch.no_grad():
            latent = vae.scale(vae.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None] * 2 - 1).mean)
        ceiling = psnr(decode(model, latent), pixels)
        for edit in photos.EDITS:
            phrasings = words.HELD_OUT[edit]
            instruction = phrasings[(number * 5) % len(phrasings)]
            began = time.time()
            thinking = think(model, [picture], instruction, seed=number)
            condition = encode(model, [picture], instruction, thinking, seed=number)
            lora = write_lora(generator, condition)
            if not row:
                plain = decode(model, sample(model, condition, seed=number))
                row = [source, plain]
            out = decode(model, sample(inject(model, lora), condition, seed=number))
            took = time.time() - began
            truth = photos.edited(pixels, edit)
            same_size = choose_bucket(model, condition, "auto") == bucket
            scores[edit].append(
                (psnr(out, truth) if same_size else 0.0, psnr(source, truth), words.ADJECTIVE[edit] in thinking)
            )
            print(
                f"{Path(path).name} {edit}: {scores[edit][-1][0]:.1f} dB (source {scores[edit][-1][1]:.1f}, VAE {ceiling:.1f}) "
                f"{'' if same_size else 'WRONG SIZE '}{took:.2f} s | {instruction} | {thinking}",
                flush=True,
            )
            row.append(out)
        rows.append(row)
    for edit, found in scores.items():
        print(
            f"{edit}: {np.mean([f[0] for f in found]):.2f} dB, source {np.mean([f[1] for f in found]):.2f} dB, "
            f"thinking right {np.mean([f[2] for f in found]):.2f}"
        )
    canvas = Image.new("RGB", (cell * len(rows[0]), cell * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, one in enumerate(row):
            one = one.copy()
            one.thumbnail((cell - 4, cell - 4))
            canvas.paste(one, (x * cell, y * cell))
    canvas.save(sheet)
    thinks(model, pictures)


def thinks(model, pictures: list[Image.Image]) -> None:
    """How often the thinking names the right edit, over all held-out phrasings, at the checkpoint's own temperature."""
    right, wrong = 0, []
    for edit in photos.EDITS:
        for number, instruction in enumerate(words.HELD_OUT[edit]):
            text = think(model, [pictures[number % len(pictures)]], instruction, seed=number)
            caption = text.split("<recaption>")[-1].split()
            if words.ADJECTIVE[edit] in caption:
                right += 1
            else:
                wrong.append(f"{edit}: {instruction!r} -> {text}")
    print(f"thinking names the right edit in {right} of {right + len(wrong)} held-out phrasings")
    print("\n".join(wrong))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
