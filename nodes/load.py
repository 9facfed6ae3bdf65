"""Loading checkpoints, or finding them on a cluster: the backbone with its VAE, and the generator.

Finding them on disk is ``host.py``'s, where they go ``plan.py``'s and ``memory.py``'s, a cluster ``cluster.py``'s.
"""

import torch
from comfy_api.latest import io

from ..hywu_core.cluster.address import LOCAL, Address
from ..hywu_core.errors import ClusterError
from ..hywu_core.placement.plan import AUTO
from ..hywu_core.placement.sizes import FORMATS
from . import cluster, host, memory, sockets
from .vae import HostVAE

DTYPES: dict[str, torch.dtype | None] = {
    "checkpoint": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_TOOLTIP = (
    "What the weights are kept and computed in. 'checkpoint' is what the checkpoint's config.json says; float32 doubles "
    "the memory of bfloat16 and is what a CPU without bfloat16 arithmetic should use.")
FORMAT_TOOLTIP = (
    "How the layers are stored. auto: as the files have them if they fit into GPUs and RAM, else the format with the fastest "
    "edit. bf16: exact, 166 GB. fp8 or int8: half of that, pictures hardly change. int4: a third, small details change. "
    "Packing takes time at every loading; a folder made by `hywu convert` saves it.")
PLACEMENT_TOOLTIP = (
    "local: on this machine. Or the address of a cluster on which `hywu serve` has brought the same checkpoint up: HOST:PORT "
    "if this machine is a node of it, else ray://HOST:PORT (#NAME behind it for another service). Nothing is loaded here then; "
    "dtype and format are the cluster's. Pictures come out the same.")


def _placement_input() -> io.Input:
    return io.String.Input("placement", default=LOCAL, optional=True, tooltip=PLACEMENT_TOOLTIP)


def _is_local(placement: str) -> bool:
    return placement.strip() in ("", LOCAL)


def _check(name: str, model_type: str, dtype: str, placement: str) -> bool | str:
    # ComfyUI checks the choices of v3 combos in the browser only, not what comes through the API.
    if dtype not in DTYPES:
        return f"dtype {dtype!r} is none of {', '.join(DTYPES)}"
    if not _is_local(placement):
        try:
            Address.parse(placement)
        except ClusterError as error:
            return str(error)
        return True  # the checkpoint need not be on this machine
    return host.check_checkpoint(name, model_type)


class HYWUModelLoader(io.ComfyNode):
    """Backbone folder -> HYWU_MODEL and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUModelLoader",
            display_name="HY-WU Model Loader",
            category=sockets.FILES_CATEGORY,
            description="Loads a HunyuanImage-3.0 backbone and its VAE from a folder in models/hywu.",
            inputs=[
                io.Combo.Input(
                    "backbone", options=host.checkpoint_names(host.BACKBONE),
                    tooltip="A folder in models/hywu (or a `hywu:` path of extra_model_paths.yaml) that holds config.json, "
                            "tokenizer.json, system_prompt.py and the *.safetensors of HunyuanImage-3.0-Instruct. "
                            "hywu-mini/backbone comes with the pack."),
                io.Combo.Input("dtype", options=list(DTYPES), default="checkpoint", tooltip=DTYPE_TOOLTIP),
                # Optional, because graphs that were saved before it was there must still run: ComfyUI refuses a graph whose
                # required input is missing, whatever its default.
                io.Combo.Input("format", options=[AUTO, *FORMATS], default=AUTO, optional=True, tooltip=FORMAT_TOOLTIP),
                _placement_input(),
            ],
            outputs=[
                sockets.Model.Output("model", display_name="model", tooltip="The backbone, without any LoRA."),
                io.Vae.Output("vae", display_name="vae", tooltip="The backbone's VAE, for VAE Decode and VAE Encode."),
            ],
        )

    @classmethod
    def validate_inputs(cls, backbone: str, dtype: str, format: str = AUTO, placement: str = LOCAL) -> bool | str:
        if format not in (AUTO, *FORMATS):
            return f"format {format!r} is none of {AUTO}, {', '.join(FORMATS)}"
        return _check(backbone, host.BACKBONE, dtype, placement)

    @classmethod
    def fingerprint_inputs(cls, backbone: str, dtype: str, format: str = AUTO, placement: str = LOCAL) -> str:
        return host.files_fingerprint(host.checkpoint_folder(backbone)) if _is_local(placement) else cluster.serving(placement)

    @classmethod
    def execute(cls, backbone: str, dtype: str, format: str = AUTO, placement: str = LOCAL) -> io.NodeOutput:
        if _is_local(placement):
            model = memory.load(host.checkpoint_folder(backbone), DTYPES[dtype], format)
        else:
            memory.give_up()
            model = cluster.model(placement, backbone)
        return io.NodeOutput(model, HostVAE(model))


class HYWUGeneratorLoader(io.ComfyNode):
    """Generator folder -> HYWU_GENERATOR."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUGeneratorLoader",
            display_name="HY-WU Generator Loader",
            category=sockets.FILES_CATEGORY,
            description="Loads the network that writes a LoRA for every request from a folder in models/hywu.",
            inputs=[
                io.Combo.Input(
                    "generator", options=host.checkpoint_names(host.GENERATOR),
                    tooltip="A folder in models/hywu that holds config.json and the *.safetensors of tencent/HY-WU. "
                            "hywu-mini/generator comes with the pack and belongs to hywu-mini/backbone."),
                io.Combo.Input("dtype", options=list(DTYPES), default="checkpoint", tooltip=DTYPE_TOOLTIP),
                _placement_input(),
            ],
            outputs=[sockets.Generator.Output(
                "weight_generator", display_name="weight_generator", tooltip="For the HY-WU Weight Generator.")],
        )

    @classmethod
    def validate_inputs(cls, generator: str, dtype: str, placement: str = LOCAL) -> bool | str:
        return _check(generator, host.GENERATOR, dtype, placement)

    @classmethod
    def fingerprint_inputs(cls, generator: str, dtype: str, placement: str = LOCAL) -> str:
        return host.files_fingerprint(host.checkpoint_folder(generator)) if _is_local(placement) else cluster.serving(placement)

    @classmethod
    def execute(cls, generator: str, dtype: str, placement: str = LOCAL) -> io.NodeOutput:
        if not _is_local(placement):
            return io.NodeOutput(cluster.generator(placement, generator))
        return io.NodeOutput(memory.load_writer(host.checkpoint_folder(generator), DTYPES[dtype]))
