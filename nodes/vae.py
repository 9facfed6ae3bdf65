"""The backbone's VAE as the VAE that ComfyUI's own nodes take.

Owns bringing its weights for the time of a decode or encode, wherever the plan keeps them; the network is the core's.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from ..hywu_core.handle import ModelHandle
from ..hywu_core.placement.visits import visiting
from ..hywu_core.vision.vae import VAE

SPARE = 64 << 20  # beyond what is asked for, more than allocations are rounded up by
TILE_PIXELS = 512


class _FirstStage(torch.nn.Module):
    """Gives the pack's VAE the two methods that ComfyUI's VAE class calls.

    The VAE is not registered as a part: ComfyUI's patcher would move its weights to and fro, and the plan says where they lie.
    """

    def __init__(self, vae: VAE):
        super().__init__()
        self._parts = (vae,)

    def encode(self, pixels_bchw: torch.Tensor) -> torch.Tensor:
        return self._parts[0].encode(pixels_bchw).mode()

    def decode(self, z_bchw: torch.Tensor) -> torch.Tensor:
        return self._parts[0].decode(z_bchw)


class HostVAE(comfy.sd.VAE):
    """The backbone's VAE as ComfyUI's VAE type: VAE Decode, VAE Decode (Tiled), VAE Encode and the rest work on it.

    ComfyUI's own constructor builds networks from weights it recognises, which ours is not; so all attributes that its methods
    use are set here. The weights are the backbone's own, not a copy. Its patcher stands in ComfyUI's list so that room for the
    work is made; it moves nothing. Where the backbone keeps the VAE in RAM or on disk, or was unloaded, the weights come to
    ComfyUI's VAE device for the call.
    """

    def __init__(self, model: ModelHandle):
        self._backbone = model.backbone
        vae = model.backbone.vae
        config = vae.config
        self._weight_bytes = sum(parameter.nbytes for parameter in vae.parameters())
        # For ComfyUI's memory manager, what the plan counts (placement/activations.py): a decode that was planned for unloads
        # nobody. Five maps of the first width are alive at full size, for every frame, and the picture.
        per_pixel = 5 * config.ffactor_temporal * config.block_out_channels[0] + 3
        cell = config.ffactor_spatial
        self.memory_used_encode = lambda shape, dtype: self._weights_to_come() + (
            per_pixel * shape[2] * shape[3] * comfy.model_management.dtype_size(dtype))
        self.memory_used_decode = lambda shape, dtype: self._weights_to_come() + (
            per_pixel * shape[2] * shape[3] * cell * cell * comfy.model_management.dtype_size(dtype))
        self.downscale_ratio = self.upscale_ratio = cell
        self.latent_channels = config.latent_channels
        self.latent_dim = 2
        self.output_channels = 3
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: torch.clamp((image + 1.0) / 2.0, min=0.0, max=1.0)
        self.working_dtypes = [vae.dtype]
        self.disable_offload = False
        self.not_video = False
        self.size = None
        self.downscale_index_formula = None
        self.upscale_index_formula = None
        self.extra_1d_channel = None
        self.crop_input = True
        self.first_stage_model = _FirstStage(vae).eval()
        self.device = self._work_device()
        self.vae_dtype = vae.dtype
        self.output_device = comfy.model_management.intermediate_device()
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=torch.device("cpu"))

    # ComfyUI's own methods, each with the weights there; the tiles of a picture share one coming.

    def decode(self, samples_in: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        with self._there(self.memory_used_decode(samples_in.shape, self.vae_dtype)):
            return super().decode(samples_in, *args, **kwargs)

    def decode_tiled(self, samples: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        with self._there(self.memory_used_decode(samples.shape, self.vae_dtype)):
            return super().decode_tiled(samples, *args, **kwargs)

    def encode(self, pixel_samples: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        with self._there(self.memory_used_encode(pixel_samples.movedim(-1, 1).shape, self.vae_dtype)):
            return super().encode(pixel_samples, *args, **kwargs)

    def encode_tiled(self, pixel_samples: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        with self._there(self.memory_used_encode(pixel_samples.movedim(-1, 1).shape, self.vae_dtype)):
            return super().encode_tiled(pixel_samples, *args, **kwargs)

    def decode_tiled_(
        self, samples: torch.Tensor, tile_x: int | None = None, tile_y: int | None = None, overlap: int | None = None,
    ) -> torch.Tensor:
        """ComfyUI's default tile after an OOM, 64 cells, is 512 pixels of a usual VAE, but 1024 of this one: a whole picture,
        which would run out of memory again. Here it is 512 pixels."""
        tile = max(1, TILE_PIXELS // self.upscale_ratio)
        return super().decode_tiled_(samples, tile_x or tile, tile_y or tile, tile // 4 if overlap is None else overlap)

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self._backbone.vae.state_dict()

    @contextmanager
    def _there(self, room: float) -> Iterator[None]:
        """The weights on ``self.device``, with ``room`` bytes for them and the work.

        ComfyUI's methods ask for room again inside. More is asked for here, so that they find it and unload nobody: the
        backbone unloading would take these weights along.
        """
        comfy.model_management.load_models_gpu([self.patcher], memory_required=room + SPARE)
        with self._backbone.present("vae") as device:
            self.device = device if device.type != "cpu" else self._work_device()
            with visiting((self._backbone.vae,), self.device):
                yield

    def _work_device(self) -> torch.device:
        """ComfyUI's VAE device, unless the backbone keeps its VAE on another card; the CPU under --cpu-vae."""
        lies, wished = self._backbone.vae.device, comfy.model_management.vae_device()
        return lies if lies.type not in ("cpu", "meta") else wished

    def _weights_to_come(self) -> int:
        """Bytes of weights that a call has to bring to a card."""
        return self._weight_bytes if self._work_device() != self._backbone.vae.device else 0
