"""LoRAs as files: saving into the output folder, loading from it and from the model folders."""

from comfy_api.latest import io, ui

from ..hywu_core.lora.files import load_lora, save_lora
from ..hywu_core.lora.value import LoRA
from . import host, sockets


class HYWUSaveLoRA(io.ComfyNode):
    """HYWU_LORA -> a .safetensors file, whole or not at all."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUSaveLoRA",
            display_name="HY-WU Save LoRA",
            category=sockets.FILES_CATEGORY,
            description="Saves a LoRA as .safetensors with its origin (backbone, generator, instruction, pictures, seed) in "
                        "the metadata.",
            inputs=[
                sockets.LoRA.Input("lora", tooltip="The LoRA to save."),
                io.String.Input("filename_prefix", default="hywu_loras/edit",
                                tooltip="Name below ComfyUI's output folder; a number is added. Files in output/hywu_loras are "
                                        "listed by HY-WU Load LoRA."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora: LoRA, filename_prefix: str) -> io.NodeOutput:
        path = host.next_output_path(filename_prefix, ".safetensors")
        save_lora(lora, path, host.ticker())
        return io.NodeOutput(ui=ui.PreviewText(f"saved {path}"))


class HYWULoadLoRA(io.ComfyNode):
    """A .safetensors file -> HYWU_LORA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWULoadLoRA",
            display_name="HY-WU Load LoRA",
            category=sockets.FILES_CATEGORY,
            description="Loads a saved LoRA. No generator is needed to use it.",
            inputs=[
                io.Combo.Input("lora_name", options=host.lora_names(),
                               tooltip="A file in output/hywu_loras (where Save LoRA puts it) or models/hywu_loras."),
            ],
            outputs=[sockets.LoRA.Output("lora", display_name="lora", tooltip="For the LoRA Injector.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str) -> bool | str:
        return host.check_lora(lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str) -> str:
        status = host.lora_path(lora_name).stat()
        return f"{status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, lora_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_lora(host.lora_path(lora_name), host.ticker()))
