"""After decoding: gives an edit of size 'auto' the source picture's exact ratio back."""

import torch
from comfy_api.latest import io

from ..hywu_core.condition import Condition
from ..hywu_core.edit import restore
from ..hywu_core.handle import ModelHandle
from . import host, sockets


class HYWUMatchAspect(io.ComfyNode):
    """IMAGE + HYWU_MODEL + HYWU_CONDITION -> IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUMatchAspect",
            display_name="HY-WU Match Aspect",
            category=sockets.CATEGORY,
            description="The model paints in a fixed table of sizes. If that distorted the source's ratio, this resizes "
                        "the result to it; otherwise the picture passes unchanged. For size 'auto'.",
            inputs=[
                io.Image.Input("image", tooltip="The decoded picture."),
                sockets.Model.Input("model", tooltip="The backbone it was painted with; it knows the table of sizes."),
                sockets.Condition.Input("condition", tooltip="The condition it was painted from; it knows the sources."),
            ],
            outputs=[io.Image.Output("matched", tooltip="The picture in the source picture's ratio.")],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, model: ModelHandle, condition: Condition) -> io.NodeOutput:
        frames = host.frames(image)
        restored = [restore(model, condition, frame) for frame in frames]
        if all(after is before for before, after in zip(frames, restored, strict=True)):
            return io.NodeOutput(image)  # untouched, not even rounded to 8 bits
        return io.NodeOutput(torch.cat([host.image_tensor(picture) for picture in restored]))
