"""After decoding: gives an edit of size 'auto' the source picture's exact ratio back."""

import torch
from comfy_api.latest import io
from PIL import Image

from ..hywu_core.condition import Condition
from ..hywu_core.handle import ModelHandle
from ..hywu_core.vision.buckets import Buckets
from ..hywu_core.vision.pictures import restore_size
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
            outputs=[io.Image.Output("matched", display_name="image", tooltip="The picture in the source picture's ratio.")],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, model: ModelHandle, condition: Condition) -> io.NodeOutput:
        buckets = Buckets.of(model.config)
        size = tuple(image.shape[1:3])
        bucket = next((bucket for bucket in buckets.entries if (bucket.height, bucket.width) == size), None)
        # A picture that something else has resized already, or that needs nothing, is not even rounded to 8 bits.
        if bucket is None:
            return io.NodeOutput(image)
        height, width = restore_size(bucket, [source.original_hw for source in condition.pictures], buckets)
        if (height, width) == size:
            return io.NodeOutput(image)
        resized = [frame.resize((width, height), Image.Resampling.LANCZOS) for frame in host.frames(image)]
        return io.NodeOutput(torch.cat([host.image_tensor(picture) for picture in resized]))
