"""Step 2: the condition -> the LoRA, new weights for this one request."""

from comfy_api.latest import io

from ..hywu_core.condition import Condition
from ..hywu_core.generator.handle import GeneratorHandle
from . import memory, sockets


class HYWUWeightGenerator(io.ComfyNode):
    """HYWU_GENERATOR + HYWU_CONDITION -> HYWU_LORA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUWeightGenerator",
            display_name="HY-WU Weight Generator",
            category=sockets.CATEGORY,
            description="Writes a LoRA for exactly this request: these pictures, this instruction.",
            inputs=[
                sockets.Generator.Input("weight_generator", tooltip="From the HY-WU Generator Loader."),
                sockets.Condition.Input("condition", tooltip="From the Condition Encoder, made with its own backbone."),
            ],
            outputs=[sockets.LoRA.Output("lora", display_name="lora",
                                         tooltip="For the LoRA Injector, or to save. It is kept on the CPU.")],
        )

    @classmethod
    def execute(cls, weight_generator: GeneratorHandle, condition: Condition) -> io.NodeOutput:
        return io.NodeOutput(memory.write(weight_generator, condition))
