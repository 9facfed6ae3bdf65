"""The nodes of the pack for ComfyUI's v3 API; imported by the entry point only, inside a running ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .encode import HYWUConditionEncoder
from .generate import HYWUWeightGenerator
from .inject import HYWULoRAInjector
from .load import HYWUGeneratorLoader, HYWUModelLoader
from .lora_files import HYWULoadLoRA, HYWUSaveLoRA
from .match import HYWUMatchAspect
from .sample import HYImageSampler
from .think import HYWUThink

NODES: list[type[io.ComfyNode]] = [
    HYWUModelLoader,
    HYWUGeneratorLoader,
    HYWUThink,
    HYWUConditionEncoder,
    HYWUWeightGenerator,
    HYWULoRAInjector,
    HYImageSampler,
    HYWUMatchAspect,
    HYWUSaveLoRA,
    HYWULoadLoRA,
]


class HYWUExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    def __init__(self) -> None:
        # Not in on_load: ComfyUI 0.3.64 never calls it.
        host.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
