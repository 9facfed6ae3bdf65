"""Between steps 2 and 3: a model handle that also carries a LoRA. No weight is touched; any number in a row."""

from comfy_api.latest import io

from ..hywu_core.handle import ModelHandle
from ..hywu_core.lora.attach import inject
from ..hywu_core.lora.value import LoRA
from . import sockets


class HYWULoRAInjector(io.ComfyNode):
    """HYWU_MODEL + HYWU_LORA -> HYWU_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWULoRAInjector",
            display_name="HY-WU LoRA Injector",
            category=sockets.CATEGORY,
            description="Gives back the model with the LoRA acting in it while it samples. The model that comes in stays as it "
                        "is, so other branches of the graph do not notice. Several injectors in a row add up.",
            inputs=[
                sockets.Model.Input("model", tooltip="The backbone, with or without LoRAs already injected."),
                sockets.LoRA.Input("lora", tooltip="From the Weight Generator or Load LoRA; it must be of this very backbone."),
                io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05, round=0.001,
                               tooltip="1 is as generated, 0 switches it off, negative values push away from the edit. "
                                       "A change runs only the sampler again."),
            ],
            outputs=[sockets.Model.Output("model_with_lora", display_name="model_with_lora",
                                          tooltip="For the HY-Image Sampler or another injector.")],
        )

    @classmethod
    def execute(cls, model: ModelHandle, lora: LoRA, strength: float) -> io.NodeOutput:
        return io.NodeOutput(inject(model, lora, strength))
