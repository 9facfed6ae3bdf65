"""LoRAs as files: saving into the output folder, loading from it and from the model folders; PEFT folders likewise."""

import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..hywu_core.errors import RequestError
from ..hywu_core.handle import ModelHandle
from ..hywu_core.lora.files import asked_for, load_lora, read_summary, save_lora
from ..hywu_core.lora.peft import export_peft
from ..hywu_core.lora.peft_import import import_peft
from ..hywu_core.lora.sketch import sketch, sketch_text
from ..hywu_core.lora.spectrum import spectra
from ..hywu_core.lora.stored import AS_IT_IS, STORED
from ..hywu_core.lora.targets import adapted
from ..hywu_core.lora.thumbnail import SIDE
from ..hywu_core.lora.value import LoRA
from . import host, lora_lists, sockets


class HYWUSaveLoRA(io.ComfyNode):
    """HYWU_LORA -> a .safetensors file, whole or not at all."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUSaveLoRA",
            display_name="HY-WU Save LoRA",
            category=sockets.FILES_CATEGORY,
            description="Saves a LoRA as .safetensors with its origin (backbone, generator, instruction, pictures, seed) and a "
                        "small picture in the metadata.",
            inputs=[
                sockets.LoRA.Input("lora", tooltip="The LoRA to save."),
                io.String.Input("filename_prefix", default="hywu_loras/edit",
                                tooltip="Name below ComfyUI's output folder; a number is added. Files in output/hywu_loras are "
                                        "listed by HY-WU Load LoRA."),
                io.Combo.Input("stored", options=list(STORED), default=AS_IT_IS, optional=True,
                               tooltip="bfloat16 halves a float32 LoRA, fp8 nearly halves that again. The node says by how "
                                       "much the LoRA's update changes."),
                io.Float.Input("keep_experts", default=100.0, min=1.0, max=100.0, step=0.5, round=0.01, optional=True,
                               tooltip="Percent of the routed experts' energy (squared norm of the update) to keep: the "
                                       "experts that matter least are left out of the file. 100 keeps all."),
                io.Image.Input("image", optional=True,
                               tooltip="Kept in the file as a small picture, usually the edit that the LoRA made. Without one "
                                       "it is a map of where the LoRA acts."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, lora: LoRA, filename_prefix: str, stored: str = AS_IT_IS, keep_experts: float = 100.0,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        path = host.next_output_path(filename_prefix, ".safetensors")
        picture = host.frames(image[:1])[0] if image is not None else _norm_map(lora)
        saved = save_lora(lora, path, host.ticker(), stored=stored, keep=keep_experts / 100, picture=picture,
                          sketch=sketch_text(sketch(lora, host.ticker())))
        host.say(lora_lists.inert(f"saved {path.name}") + f"\n{saved.text}")
        return io.NodeOutput(ui=_preview(picture, cls) | {"text": (f"saved {path}", saved.text)})


class HYWULoadLoRA(io.ComfyNode):
    """A .safetensors file -> HYWU_LORA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWULoadLoRA",
            display_name="HY-WU Load LoRA",
            category=sockets.FILES_CATEGORY,
            description="Loads a saved LoRA. No generator is needed to use it. The node shows its instruction.",
            inputs=[
                io.Combo.Input("lora_name", options=lora_lists.lora_choices(),
                               tooltip="A file in output/hywu_loras (where Save LoRA puts it) or models/hywu_loras. Of files "
                                       "that hold the same LoRA the first is listed."),
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
        return _shown(load_lora(host.lora_path(lora_name), host.ticker()))


class HYWULoadLoRAs(io.ComfyNode):
    """All .safetensors files of a folder -> a list of HYWU_LORA and their names."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWULoadLoRAs",
            display_name="HY-WU Load LoRAs",
            category=sockets.FILES_CATEGORY,
            description="Loads all LoRAs of a folder as a list: what follows runs once for each of them, Mean LoRA takes them "
                        "together.",
            inputs=lora_lists.folder_inputs(),
            outputs=[
                sockets.LoRA.Output("loras", display_name="loras", is_output_list=True,
                                    tooltip="One after the other, by name; all of them stay in RAM."),
                io.String.Output("names", display_name="names", is_output_list=True, tooltip="Their file names."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        return lora_lists.check_folder(folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str, filter: str) -> str:
        return lora_lists.folder_fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, filter: str) -> io.NodeOutput:
        files = lora_lists.files_below(folder)
        wanted = [name for name, _ in asked_for(((name, read_summary(path)) for name, path in files.items()), filter)]
        if not wanted:
            raise RequestError(f"0 LoRAs of the folder {folder!r} have {filter!r} in their instruction or name: use other "
                               "words, or save some first")
        tick, loras = host.ticker(), []
        for number, name in enumerate(wanted):
            tick(number, len(wanted), None)
            loras.append(load_lora(files[name]))
        tick(len(wanted), len(wanted), None)
        host.say(f"{len(loras)} LoRAs")
        return io.NodeOutput(loras, wanted, ui=ui.PreviewText("\n".join(wanted)))


class HYWUExportLoRA(io.ComfyNode):
    """HYWU_LORA -> a PEFT folder, whole or not at all."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUExportLoRA",
            display_name="HY-WU Export LoRA (PEFT)",
            category=sockets.FILES_CATEGORY,
            description="Writes a LoRA as a PEFT folder (adapter_config.json and adapter_model.safetensors), for the published "
                        "HunyuanImage-3 in transformers and everything else that reads PEFT adapters.",
            inputs=[
                sockets.LoRA.Input("lora", tooltip="The LoRA to export."),
                io.String.Input("filename_prefix", default="hywu_loras/peft",
                                tooltip="Name of the folder below ComfyUI's output folder; a number is added. Folders in "
                                        "output/hywu_loras are listed by HY-WU Import LoRA."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, lora: LoRA, filename_prefix: str) -> io.NodeOutput:
        folder = export_peft(lora, host.next_output_path(filename_prefix, ""), host.ticker())
        host.say(lora_lists.inert(f"exported {folder.name}"))
        return io.NodeOutput(ui=ui.PreviewText(f"exported {folder}"))


class HYWUImportLoRA(io.ComfyNode):
    """A PEFT folder -> HYWU_LORA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUImportLoRA",
            display_name="HY-WU Import LoRA (PEFT)",
            category=sockets.FILES_CATEGORY,
            description="Reads a PEFT LoRA for HunyuanImage-3: an exported one, or one that was trained with peft. What it "
                        "does not adapt is zero.",
            inputs=[
                io.Combo.Input("folder", options=lora_lists.peft_names(),
                               tooltip="A folder with adapter_config.json and adapter_model.safetensors below "
                                       "output/hywu_loras or models/hywu_loras."),
                sockets.Model.Input("model", optional=True,
                                    tooltip="The backbone that it was trained on; needed only where that is of another size "
                                            "than the published one and the LoRA adapts a part of it."),
            ],
            outputs=[sockets.LoRA.Output("lora", display_name="lora", tooltip="For the LoRA Injector or Save LoRA.")],
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        return lora_lists.check_peft(folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str, model: ModelHandle | None = None) -> str:
        return host.files_fingerprint(lora_lists.peft_folder(folder))

    @classmethod
    def execute(cls, folder: str, model: ModelHandle | None = None) -> io.NodeOutput:
        sizes = None if model is None else adapted(model.config)
        return _shown(import_peft(lora_lists.peft_folder(folder), sizes, host.ticker()))


def _shown(lora: LoRA) -> io.NodeOutput:
    """The LoRA, and on the node where it comes from."""
    text = f"{lora_lists.told(lora.provenance)}\nrank {lora.rank}, {lora.num_layers} layers"
    return io.NodeOutput(lora, ui=host.said(text))


def _norm_map(lora: LoRA) -> Image.Image:
    # Here, not above: drawing is of no use to those who only load.
    from ..hywu_core.lora.pictures import norm_map

    return norm_map(spectra(lora, host.ticker()))


def _preview(picture: Image.Image, cls: type[io.ComfyNode]) -> dict[str, object]:
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return ui.PreviewImage(host.image_tensor(small), cls=cls).as_dict()
