"""The VAE socket inside ComfyUI's process: tiles, decoding after running out of memory and after the backbone was unloaded.

Collected by ``test_memory.py`` through ``inside.py`` only.
"""

import comfy.model_management as management
import numpy as np
import pytest
import torch
from comfyui_hywu.nodes.vae import HostVAE
from comfyui_hywu.tests.comfy.inside_memory import ROOT, Runs, empty_list, entries, load  # noqa: F401  (a fixture)
from PIL import Image


@pytest.fixture(scope="module")
def latent() -> tuple[HostVAE, torch.Tensor, torch.Tensor]:
    """The VAE of a loaded backbone, a latent of 12 x 28 cells, and its plain decode."""
    vae = HostVAE(load())
    photo = Image.open(ROOT / "tests" / "data" / "photo.jpg").convert("RGB")
    wide = np.asarray(photo.resize((448, 192))).astype(np.float32) / 255
    samples = vae.encode(torch.from_numpy(wide)[None])
    return vae, samples, vae.decode(samples)


def seam(tiled: torch.Tensor, plain: torch.Tensor) -> float:
    """The largest step of the error between two neighbouring columns, in grey levels, as a mean over the column."""
    error = 255 * (tiled - plain)[0].mean(dim=2)
    return float((error[:, 1:] - error[:, :-1]).mean(dim=0).abs().max())


def tiled_decode(vae: HostVAE, samples: torch.Tensor, overlap: int) -> torch.Tensor:
    import nodes

    return nodes.VAEDecodeTiled().decode(vae, {"samples": samples}, 128, overlap)[0]


def test_tiles_blend_without_seams(latent):
    vae, samples, plain = latent
    blended, cut = tiled_decode(vae, samples, 32), tiled_decode(vae, samples, 0)
    assert blended.shape == plain.shape == (1, 192, 448, 3)
    print(f"mean error {255 * (blended - plain).abs().mean():.2f}, seam {seam(blended, plain):.2f}, "
          f"without overlap {255 * (cut - plain).abs().mean():.2f} and {seam(cut, plain):.2f} grey levels")
    # Measured: 0.09 and 0.09, without overlap 0.30 and 1.02.
    assert 255 * (blended - plain).abs().mean() < 0.5
    assert seam(blended, plain) < 0.2 and seam(blended, plain) < 0.5 * seam(cut, plain)


def test_a_decode_that_runs_out_of_memory_is_done_in_tiles(latent, monkeypatch):
    vae, samples, plain = latent
    stage = vae.first_stage_model
    runs = Runs(1, lambda: None)
    decode = stage.decode
    monkeypatch.setattr(stage, "decode", lambda z: runs() or decode(z))
    tiled = vae.decode(samples)
    assert runs.calls > 3
    print(f"mean error {255 * (tiled - plain).abs().mean():.2f}, seam {seam(tiled, plain):.2f} grey levels")
    assert 255 * (tiled - plain).abs().mean() < 0.5 and seam(tiled, plain) < 0.2


def test_tiles_after_running_out_of_memory_are_a_quarter_of_the_published_size(latent, monkeypatch):
    """ComfyUI's own would be the whole picture again. The decoder is a plain enlargement, so tiles must add up to it."""
    vae, _, _ = latent
    sizes = []

    def enlarge(z: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(z.shape[2:]))
        if z.shape[2:] == (64, 64):
            raise torch.OutOfMemoryError("the whole picture is too much")
        return torch.nn.functional.interpolate(z[:, :3], scale_factor=16, mode="nearest")

    monkeypatch.setattr(vae.first_stage_model, "decode", enlarge)
    samples = torch.rand(1, vae.latent_channels, 64, 64, generator=torch.Generator().manual_seed(0))
    decoded = vae.decode(samples).movedim(-1, 1)
    whole = torch.nn.functional.interpolate(samples[:, :3] / 2 + 0.5, scale_factor=16, mode="nearest")
    assert torch.allclose(decoded, whole, atol=1e-5)
    assert max(height * width for height, width in sizes[1:]) <= 32 * 32


def test_the_vae_decodes_without_its_backbone(latent):
    vae, samples, plain = latent
    management.unload_all_models()
    assert torch.equal(vae.decode(samples), plain)
    assert not entries()  # nobody loaded the backbone for it
    assert len(vae.get_sd()) == len(vae._backbone.vae.state_dict()) > 0
