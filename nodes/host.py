"""The ComfyUI side of things: model folders, pictures, progress with cancel, and text in a node.

Owns no maths of HY-WU and no memory: that is ``plan.py``'s and ``memory.py``'s, the VAE socket ``vae.py``'s.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui
from comfy_execution.utils import get_executing_context
from PIL import Image

from ..hywu_core.checkpoint.fingerprint import KEPT
from ..hywu_core.condition import MAX_PICTURES
from ..hywu_core.errors import CheckpointError, LoRAError, PictureError, RequestError
from ..hywu_core.lora.peft_config import WEIGHTS
from ..hywu_core.progress import Tick
from ..hywu_core.vision.vae import VAE

MODELS = "hywu"  # models/hywu and `hywu:` in extra_model_paths.yaml
LORAS = "hywu_loras"  # models/hywu_loras, output/hywu_loras and `hywu_loras:` in extra_model_paths.yaml
BUNDLED = Path(__file__).resolve().parent.parent / "models"  # the small checkpoint that comes with the pack
BACKBONE = "hunyuan_image_3_moe"  # model_type in config.json
GENERATOR = "parameter_generator"
# Checkpoints lie at most this deep below a model folder ("publisher/model/part"); a list is made at every look at the graph.
MAX_DEPTH = 3
# A preview shows at most so many latent cells a side: decoding stays cheap next to a denoise step at any size.
PREVIEW_CELLS = 16
PREVIEW_PIXELS = 512
# After a preview, so many times its own duration pass without one: previews take at most a fifth of the time on any machine.
PREVIEW_PAUSE = 4.0


def register_folders() -> None:
    """Make the pack's model folders known; entries of extra_model_paths.yaml, read earlier, stay in front."""
    folder_paths.add_model_folder_path(MODELS, os.path.join(folder_paths.models_dir, "hywu"))
    folder_paths.add_model_folder_path(LORAS, os.path.join(folder_paths.models_dir, "hywu_loras"))
    folder_paths.add_model_folder_path(LORAS, os.path.join(folder_paths.get_output_directory(), "hywu_loras"))


# ---- checkpoints on disk


def _roots() -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths(MODELS)] + [BUNDLED]


def folders_with(file: str, folder: Path, depth: int, itself: bool = True) -> Iterator[Path]:
    """Folders that hold ``file``, below which none is looked for: ``folder`` if it may be one, and down to ``depth`` below."""
    if itself and (folder / file).is_file():
        yield folder
    elif depth and os.access(folder, os.R_OK | os.X_OK) and folder.is_dir():
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.name.startswith("."):
                yield from folders_with(file, inner, depth - 1)


def _model_type(folder: Path) -> str:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return ""  # not ours, or damaged: then loading it by name says what is wrong


def checkpoint_names(model_type: str) -> list[str]:
    """Names of all checkpoints of one kind, relative to their model folder; read from disk at every call, so always fresh."""
    names = {folder.relative_to(root).as_posix(): None for root in _roots()
             for folder in folders_with("config.json", root, MAX_DEPTH) if _model_type(folder) == model_type}
    return list(names)


def checkpoint_folder(name: str) -> Path:
    """The folder of a listed checkpoint; the user's own folders come before the bundled one.

    Raises:
        CheckpointError: no model folder holds it (all places are named), or the name climbs out of them.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"the checkpoint name {name!r} must be a folder below {folder_paths.get_folder_paths(MODELS)[0]}")
    places = [root / name for root in _roots()]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"{name} is missing: put the checkpoint's files into {places[0]} (looked for config.json in "
        f"{', '.join(str(place) for place in places)})")


def check_checkpoint(name: str, model_type: str) -> bool | str:
    """For ``validate_inputs``: True, or what is missing and where it belongs."""
    try:
        folder = checkpoint_folder(name)
    except CheckpointError as error:
        return str(error)
    if _model_type(folder) == model_type:
        return True
    return f"{folder / 'config.json'} has the model_type {_model_type(folder)!r}, this node loads {model_type!r}"


def files_fingerprint(folder: Path) -> str:
    """Changes when a file of a checkpoint folder changes (size and time, as reading 160 GB for it would be absurd)."""
    own = (KEPT, ".hywu-")  # which loading writes, and what a file is called before it is whole
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(own) and path.is_file())
    return json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


# ---- saved LoRAs


def lora_names() -> list[str]:
    """Names of all LoRA files in the model and output folders, fresh at every call."""
    return [name for name in folder_paths.get_filename_list(LORAS)
            if name.endswith(".safetensors") and Path(name).name != WEIGHTS]  # a PEFT folder's, which is imported as a whole


def lora_folders() -> list[str]:
    """Folders below the model and output folders that hold LoRA files, however deep, as "a/b"; fresh at every call."""
    names = [Path(name) for name in lora_names()]
    return sorted({parent.as_posix() for name in names for parent in name.parents if parent != Path(".")})


def lora_path(name: str) -> Path:
    """Raises LoRAError if no folder holds the file, naming all of them."""
    path = folder_paths.get_full_path(LORAS, name)
    if path is None:
        raise LoRAError(f"{name} is missing: looked in {', '.join(folder_paths.get_folder_paths(LORAS))}")
    return Path(path)


def check_lora(name: str) -> bool | str:
    """For ``validate_inputs``: True, or what is missing and where it was looked for."""
    try:
        lora_path(name)
    except LoRAError as error:
        return str(error)
    return True


def next_output_path(prefix: str, suffix: str) -> Path:
    """The next free "prefix_00001_.suffix" in ComfyUI's output folder; its folder is made.

    Raises:
        RequestError: the prefix is empty or leads out of the output folder.
    """
    output = Path(folder_paths.get_output_directory()).resolve()
    # Backslashes separate folders on Windows only; refusing them everywhere keeps graphs portable.
    wanted = (output / prefix).resolve()
    if not prefix.strip() or "\\" in prefix or wanted == output or not wanted.is_relative_to(output):
        raise RequestError(
            f"filename_prefix {prefix!r} leads out of the output folder {output}: use a name such as 'hywu_loras/edit'")
    folder, filename, counter, _, _ = folder_paths.get_save_image_path(prefix, str(output))
    return Path(folder) / f"{filename}_{counter:05}_{suffix}"


# ---- pictures


def picture_inputs(first_tooltip: str) -> list[io.Input]:
    """The three optional picture sockets that Think and the Condition Encoder share."""
    more = "Another source picture; its content can be named in the instruction as the second or third picture."
    return [io.Image.Input(f"image_{number}", optional=True, tooltip=first_tooltip if number == 1 else more)
            for number in range(1, MAX_PICTURES + 1)]


def pictures(*images_BHWC: torch.Tensor | None) -> list[Image.Image]:
    """ComfyUI IMAGE tensors (B, H, W, C) in 0..1 -> PIL pictures in order; every picture of a batch counts as one.

    Raises:
        PictureError: more than three pictures in all, or values that are no numbers.
    """
    connected = [image for image in images_BHWC if image is not None]
    count = sum(len(image) for image in connected)
    if count > MAX_PICTURES:
        raise PictureError(f"{count} source pictures are connected, at most {MAX_PICTURES} can be used: "
                           "a batch counts as so many pictures, take one of it with Image From Batch")
    return [picture for image in connected for picture in frames(image)]


def frames(image_BHWC: torch.Tensor) -> list[Image.Image]:
    """The pictures of one IMAGE tensor."""
    return [_picture(frame_HWC) for frame_HWC in image_BHWC]


def _picture(frame_HWC: torch.Tensor) -> Image.Image:
    if not torch.isfinite(frame_HWC).all():
        raise PictureError("a source picture holds NaN or infinite values: the node that made it has failed")
    values = (frame_HWC.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    # Mode from the channels: 1 gray, 3 RGB, 4 RGBA (the core lays it on white).
    return Image.fromarray(np.ascontiguousarray(values[..., 0] if values.shape[-1] == 1 else values))


def image_tensor(picture: Image.Image) -> torch.Tensor:
    """PIL picture -> IMAGE tensor (1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float().div(255).unsqueeze(0)


# ---- progress and cancel


def ticker(vae: VAE | None = None) -> Tick:
    """The callback for a long stage: moves the node's progress bar, shows previews if ``vae`` is given, lets a cancel out.

    ComfyUI raises InterruptProcessingException inside the update; it passes through the core, which undoes what it attached.
    """
    bar = comfy.utils.ProgressBar(1)
    next_preview = 0.0

    def on_tick(done: int, total: int, latent: torch.Tensor | None = None) -> None:
        nonlocal next_preview
        preview = None
        if vae is not None and latent is not None and time.monotonic() >= next_preview:
            started = time.monotonic()
            preview = ("JPEG", preview_picture(vae, latent), PREVIEW_PIXELS)
            ended = time.monotonic()
            next_preview = ended + PREVIEW_PAUSE * (ended - started)
        bar.update_absolute(done, max(total, 1), preview)

    return on_tick


def say(text: str) -> None:
    """To the log, and as text into the node that is running, where there is a server to show it.

    A node's ``ui`` text is shown by ComfyUI's own preview nodes only: what a user has to see on the node is said.
    """
    logging.info("HY-WU: %s", text)
    # Not imported: without a server (a test, a script) ComfyUI's server module is never loaded.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    context = get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text, context.node_id)


def said(text: str) -> ui.PreviewText:
    """``say`` it, and the same for the ``ui`` of a node's output, which the API's callers read."""
    say(text)
    return ui.PreviewText(text)


def lines(text: str) -> str:
    """A report for a text output: Preview Any reads it as Markdown, where two spaces at its end keep a line from the next."""
    return text.replace("\n", "  \n")


def preview_picture(vae: VAE, latent_bchw: torch.Tensor) -> Image.Image:
    """A small decode of a diffusion latent (1, c, h, w), shrunk first, so that it costs the same at any size."""
    height, width = latent_bchw.shape[-2:]
    shrink = max(height, width) / PREVIEW_CELLS
    if shrink > 1:
        cells = (max(1, round(height / shrink)), max(1, round(width / shrink)))
        latent_bchw = torch.nn.functional.interpolate(latent_bchw.float(), cells, mode="area")
    with torch.no_grad():
        pixels_bchw = vae.decode(vae.unscale(latent_bchw.to(vae.device)))
    return _picture(torch.nan_to_num(pixels_bchw[0]).permute(1, 2, 0) / 2 + 0.5)
