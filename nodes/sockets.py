"""The four socket types of the pack: one Python type each, all frozen, all shared and never changed by a node.

    HYWU_MODEL      hywu_core.handle.ModelHandle            a backbone, with the LoRAs injected so far
    HYWU_GENERATOR  hywu_core.generator.GeneratorHandle     the network that writes LoRAs
    HYWU_CONDITION  hywu_core.condition.Condition           what the backbone made of pictures, instruction and thinking
    HYWU_LORA       hywu_core.lora.value.LoRA               the weights written for one request
"""

from comfy_api.latest import io

Model = io.Custom("HYWU_MODEL")
Generator = io.Custom("HYWU_GENERATOR")
Condition = io.Custom("HYWU_CONDITION")
LoRA = io.Custom("HYWU_LORA")

CATEGORY = "HY-WU"
FILES_CATEGORY = "HY-WU/files"
LORA_CATEGORY = "HY-WU/LoRA"
