"""Golden stages of the pictures and their towers: e_preprocess and f_vision_vae_embed."""

from contextlib import ExitStack, contextmanager

import torch
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.vision.buckets import Buckets
from comfyui_hywu.hywu_core.vision.pictures import load_picture, prepare_picture, resize_for_vit, restore_size
from torch import nn

from ..case import Case
from ..checks import Checks
from .backbone import check_embedders

_FITS = {"center": "crop", "resize": "stretch"}


def check_preprocess(case: Case, stage: str, checks: Checks) -> None:
    """Bucket tables, sizes, and the exact tensors of every picture in both fits."""
    golden, meta = case.tensors(stage), case.meta(stage)
    config = BackboneConfig.from_folder(case.base)
    buckets = Buckets(meta["base_size"])
    checks.exact("base_size", config.image_base_size, meta["base_size"])
    for key, table in meta.items():
        if key.startswith("resolution_group"):
            base = int(key.rpartition("_")[2]) if key != "resolution_group" else meta["base_size"]
            checks.exact(key, [[bucket.height, bucket.width] for bucket in Buckets(base).entries], table)
    for size, info in meta["gen_image_info"].items():
        bucket = buckets.parse(size)
        checks.exact(f"gen_image {size}", [bucket.index, bucket.height, bucket.width, *bucket.grid],
                     [info[key] for key in ("ratio_index", "image_height", "image_width", "token_height", "token_width")])

    originals_hw = {}
    names = sorted({key.rpartition(".")[0] for key in meta if key.rpartition(".")[2] in _FITS})
    for name in names:
        image = load_picture(case.folder / "images" / f"{name}.png")
        for theirs, ours in _FITS.items():
            if f"{name}.{theirs}" not in meta:
                continue
            info, source = meta[f"{name}.{theirs}"], prepare_picture(image, config, ours)
            originals_hw[name] = source.original_hw
            checks.exact(f"{name}.{theirs} original", list(source.original_hw)[::-1], info["orig"])
            checks.exact(f"{name}.{theirs} bucket", [source.bucket.width, source.bucket.height], info["target_wh"])
            checks.exact(f"{name}.{theirs} index", source.bucket.index, info["vae_info"]["ratio_index"])
            checks.exact(f"{name}.{theirs} grid", list(source.grid),
                         [info["vit_info"]["token_height"], info["vit_info"]["token_width"]])
            checks.exact(f"{name}.{theirs}.vae", source.pixels_chw, golden[f"{name}.{theirs}.vae"])
        _check_vit_input(checks, name, image, source, golden, config)

    for decision in meta["postprocess"]:
        width, height = decision["out_bucket"]
        bucket = buckets.at(decision["ratio_index"])
        checks.exact(f"bucket {bucket.index}", [bucket.height, bucket.width], [height, width])
        restored = restore_size(bucket, [originals_hw[name] for name in decision["cond"]], buckets)
        checks.exact(f"post {decision['cond']} in {width} x {height}", list(restored)[::-1], decision["result"])


def _check_vit_input(checks, name, image, source, golden, config) -> None:
    checks.exact(f"{name}.vit_spatial_shapes", torch.tensor(source.grid), golden[f"{name}.vit_spatial_shapes"])
    checks.exact(f"{name}.vit_mask", source.patch_mask, golden[f"{name}.vit_mask"])
    resized = resize_for_vit(image, config.vit["patch_size"], config.vit_max_num_patches)
    want, patches = golden[f"{name}.vit_resized_uint8"], golden[f"{name}.vit_pixel_values"]
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        checks.exact(f"{name}.vit_resized_uint8", resized, want)
        checks.close(f"{name}.vit_pixel_values", source.patches, patches)
    else:
        # Without AVX2 torch resizes bytes in another way, which may round to the neighbour (spec section 10).
        checks.exact(f"{name}.vit_resized_uint8 within 1", bool(((resized.int() - want.int()).abs() <= 1).all()), True)
        checks.close(f"{name}.vit_pixel_values", source.patches, patches, (0.0, 1.001 / 127.5))


@contextmanager
def _watch(modules: dict[str, nn.Module]):
    """Collect the first input and the output of modules by name while the block runs."""
    seen: dict[str, torch.Tensor] = {}

    def hook(name):
        def collect(module, inputs, output):
            seen[f"{name}.in"] = inputs[0]
            seen[f"{name}.out"] = output[0] if isinstance(output, tuple) else output
        return collect

    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield seen


def check_vision(case: Case, stage: str, checks: Checks) -> None:
    """VAE both ways, vision tower, aligner; the embedders of the same stage are the backbone's."""
    golden = case.tensors(stage)
    _check_vae(checks, case.model.backbone.vae, golden)
    _check_tower(checks, case.model.backbone, golden)
    check_embedders(case, checks)


def _check_vae(checks: Checks, vae, golden: dict[str, torch.Tensor]) -> None:
    watched = {f"enc.down{i}.downsample": level.downsample for i, level in enumerate(vae.encoder.down)
               if hasattr(level, "downsample")}
    watched |= {f"dec.up{i}.upsample": level.upsample for i, level in enumerate(vae.decoder.up) if hasattr(level, "upsample")}
    for side, half in (("enc", vae.encoder), ("dec", vae.decoder)):
        watched |= {f"{side}.mid.{name}": module for name, module in half.mid.named_children()}
    with _watch(watched) as seen:
        posterior = vae.encode(golden["vae.x"])
        frames = vae.decode_frames(golden["vae.z"].squeeze(2))
    for name, want in golden.items():
        if name.startswith(("enc.", "dec.")):
            checks.close(name, seen[name], want)
    mean, logvar = golden["vae.moments"].squeeze(2).chunk(2, dim=1)
    checks.close("vae.moments mean", posterior.mean, mean)
    checks.close("vae.moments logvar", posterior.logvar, logvar.clamp(-30, 20))
    checks.close("vae.mode", posterior.mode(), golden["vae.mode"].squeeze(2))
    sample = posterior.sample(golden["vae.noise"].squeeze(2))
    checks.close("vae.sample", sample, golden["vae.sample"].squeeze(2))
    checks.close("vae.latent_scaled", vae.scale(sample), golden["vae.latent_scaled"])
    checks.close("vae.unscale", vae.unscale(golden["vae.latent_scaled"]), golden["vae.sample"].squeeze(2))
    checks.close("vae.decoded_all_frames_mean", frames.mean(dim=(3, 4)), golden["vae.decoded_all_frames_mean"])
    checks.close("vae.decoded", vae.decode(golden["vae.z"].squeeze(2)), golden["vae.decoded"].squeeze(2))


def _check_tower(checks: Checks, backbone, golden: dict[str, torch.Tensor]) -> None:
    names = {key.split(".")[1] for key in golden if key.startswith("vit.")}
    for name in sorted(names):
        want = {key.removeprefix(f"vit.{name}."): tensor for key, tensor in golden.items() if key.startswith(f"vit.{name}.")}
        patches, grids = want["pixel_values"], [tuple(want["spatial_shapes"].tolist())]
        tower = backbone.vision_model
        checks.close(f"vit.{name}.embeddings", tower.embed(patches, grids), want["embeddings.out"])
        with _watch({"layer0": tower.encoder.layers[0]}) as seen:
            last = tower(patches, want["mask"].unsqueeze(0), grids)
        checks.close(f"vit.{name}.layer0", seen["layer0.out"], want["layer0.out"])
        checks.close(f"vit.{name}.last_hidden_state", last, want["last_hidden_state"])
        checks.close(f"vit.{name}.aligned", backbone.vision_aligner(last), want["aligned"])


STAGES = {"e_preprocess": check_preprocess, "f_vision_vae_embed": check_vision}
