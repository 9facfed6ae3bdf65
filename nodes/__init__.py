"""The nodes of the pack for ComfyUI's v3 API; imported by the entry point only, inside a running ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from . import host
from .encode import HYWUConditionEncoder
from .generate import HYWUWeightGenerator
from .inject import HYWULoRAInjector
from .load import HYWUGeneratorLoader, HYWUModelLoader
from .lora_files import HYWUExportLoRA, HYWUImportLoRA, HYWULoadLoRA, HYWULoadLoRAs, HYWUSaveLoRA
from .lora_math import HYWUBlendLoRAs, HYWUMaskLoRA, HYWUMeanLoRAs, HYWUScaleLoRA
from .lora_view import HYWUCompareLoRAs, HYWUInspectLoRA, HYWULoRAAB, HYWUMapLoRAs
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
    HYWULoadLoRAs,
    HYWUExportLoRA,
    HYWUImportLoRA,
    HYWUScaleLoRA,
    HYWUBlendLoRAs,
    HYWUMaskLoRA,
    HYWUMeanLoRAs,
    HYWUInspectLoRA,
    HYWUCompareLoRAs,
    HYWUMapLoRAs,
    HYWULoRAAB,
]


class HYWUExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    def __init__(self) -> None:
        # Not in on_load: ComfyUI 0.3.64 never calls it.
        host.register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
