"""Looking into LoRAs: one by itself, two against each other, many as a map, and what one does to a picture.

Owns the nodes; what is measured and drawn is the core's (``lora/spectrum.py``, ``pictures.py``, ``map.py``), the panel on the
Inspect node ``web/inspect.js``'s.
"""

import json
from typing import Any

import torch
from comfy_api.latest import io

from ..hywu_core.condition import Condition
from ..hywu_core.handle import ModelHandle
from ..hywu_core.lora.algebra import check_alike
from ..hywu_core.lora.attach import check_targets, inject
from ..hywu_core.lora.files import matches
from ..hywu_core.lora.map import lora_map, map_report, point_of, points_of_files
from ..hywu_core.lora.map_picture import map_picture
from ..hywu_core.lora.pictures import comparison_picture, experts_picture, norm_map, spectrum_plot
from ..hywu_core.lora.report import comparison_report, panel_data, report
from ..hywu_core.lora.spectrum import compare, spectra
from ..hywu_core.lora.value import LoRA
from ..hywu_core.lora.weight_norms import weight_norms
from . import host, lora_lists, memory, sockets
from .difference import difference
from .sample import ROUTING, paint, sampler_inputs

WIRED = 4  # LoRAs that the map takes beside files
PANEL = "hywu_inspect"  # key of the node's ui output that web/inspect.js listens for


class HYWUInspectLoRA(io.ComfyNode):
    """HYWU_LORA (+ HYWU_MODEL, LATENT) -> three pictures, a report, and the panel on the node."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUInspectLoRA",
            display_name="HY-WU Inspect LoRA",
            category=sockets.LORA_CATEGORY,
            description="Shows where a LoRA acts: the size of its update in every layer and projection, its singular values, "
                        "its experts. The panel can be walked through with the mouse or the arrow keys.",
            inputs=[
                sockets.LoRA.Input("lora", tooltip="The LoRA to look into."),
                sockets.Model.Input("model", optional=True,
                                    tooltip="Its backbone: norms are then shown against the weights' own. These are read once "
                                            "for each loaded backbone, which takes a while where layers lie on disk."),
                io.Latent.Input("sample", optional=True,
                                tooltip="From the HY-Image Sampler: shows how many tokens were routed to each expert."),
            ],
            outputs=[
                io.Image.Output("norm_map", display_name="norm_map", tooltip="Heat map of layers and projections."),
                io.Image.Output("spectrum", display_name="spectrum", tooltip="Singular values and effective ranks."),
                io.Image.Output("experts", display_name="experts", tooltip="Heat map of layers and routed experts."),
                io.String.Output("report", display_name="report", tooltip="The same in words and numbers."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, lora: LoRA, model: ModelHandle | None = None, sample: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        weights = None
        if model is not None:
            check_targets(model.backbone, lora)
        if model is not None and model.elsewhere is None:
            weights = memory.at_work(model, 0, lambda: weight_norms(model.backbone, host.ticker()))
        routing = None if sample is None else sample.get(ROUTING)
        found = spectra(lora, host.ticker())
        text = report(lora, found, weights, routing)
        if model is not None and weights is None:
            text += "\n(the backbone is on a cluster: norms are the update's own, not against its weights)"
        if sample is not None and routing is None:
            text += "\n(the latent holds no routing: it does not come straight from an HY-Image Sampler)"
        data = json.dumps(panel_data(lora, found, weights, routing), separators=(",", ":"), allow_nan=False)
        pictures = (norm_map(found, weights), spectrum_plot(found), experts_picture(found, routing))
        return io.NodeOutput(*map(host.image_tensor, pictures), host.lines(text), ui={PANEL: [data]})


class HYWUCompareLoRAs(io.ComfyNode):
    """Two HYWU_LORA -> a picture, a number and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWUCompareLoRAs",
            display_name="HY-WU Compare LoRAs",
            category=sockets.LORA_CATEGORY,
            description="How alike two LoRAs are: the cosine of their updates and the angles between the directions that they "
                        "read and write, layer by layer. Exact, whatever their ranks.",
            inputs=[
                sockets.LoRA.Input("lora_a", tooltip="The first LoRA."),
                sockets.LoRA.Input("lora_b", tooltip="The second LoRA, of the same backbone."),
            ],
            outputs=[
                io.Image.Output("picture", display_name="picture", tooltip="Heat maps of cosine and angles."),
                io.Float.Output("cosine", display_name="cosine",
                                tooltip="Of the whole updates: 1 the same direction, 0 unrelated, -1 opposite."),
                io.String.Output("report", display_name="report", tooltip="The same in numbers, by projection."),
            ],
        )

    @classmethod
    def execute(cls, lora_a: LoRA, lora_b: LoRA) -> io.NodeOutput:
        found = compare(lora_a, lora_b, host.ticker())
        picture = comparison_picture([target.name for target in lora_a.targets], found)
        return io.NodeOutput(host.image_tensor(picture), found.cosine, host.lines(comparison_report(lora_a, lora_b, found)))


class HYWUMapLoRAs(io.ComfyNode):
    """Saved LoRAs (+ wired ones) -> a picture of all, and a report."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        more = [sockets.LoRA.Input(f"lora_{number}", optional=True, tooltip="A LoRA that is not saved, to be on the map, too.")
                for number in range(1, WIRED + 1)]
        return io.Schema(
            node_id="HYWUMapLoRAs",
            display_name="HY-WU Map LoRAs",
            category=sockets.LORA_CATEGORY,
            description="Draws all saved LoRAs as points, near each other where their updates are alike, with their thumbnails "
                        "and instructions. Reading a file of full size takes a few seconds the first time.",
            inputs=[
                *lora_lists.folder_inputs(),
                *more,
            ],
            outputs=[
                io.Image.Output("map", display_name="map", tooltip="The map."),
                io.String.Output("report", display_name="report",
                                 tooltip="The instruction of each number, its nearest neighbour, and files left out."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        return lora_lists.check_folder(folder)

    @classmethod
    def fingerprint_inputs(cls, folder: str, filter: str, **wired: Any) -> str:
        return lora_lists.folder_fingerprint(folder)

    @classmethod
    def execute(cls, folder: str, filter: str, **wired: LoRA) -> io.NodeOutput:
        loras = {name: lora for name, lora in sorted(wired.items())
                 if lora is not None and matches(filter, name, lora.provenance.instruction)}
        if loras:
            check_alike(*loras.values())
        points = [point_of(lora, name, host.ticker()) for name, lora in loras.items()]
        saved, left_out = points_of_files(lora_lists.files_below(folder), filter, host.ticker())
        found = lora_map([*points, *saved])
        return io.NodeOutput(host.image_tensor(map_picture(found)), host.lines(map_report(found, left_out)))


class HYWULoRAAB(io.ComfyNode):
    """HYWU_MODEL + HYWU_LORA + HYWU_CONDITION + VAE -> the picture without, with, and their difference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HYWULoRAAB",
            display_name="HY-WU A/B",
            category=sockets.LORA_CATEGORY,
            description="Paints twice from the same noise, without and with a LoRA, and shows what it changes.",
            inputs=[
                sockets.Model.Input("model",
                                    tooltip="The backbone without this LoRA; LoRAs injected before act in both pictures."),
                sockets.LoRA.Input("lora", tooltip="The LoRA whose effect is to be seen."),
                sockets.Condition.Input("condition", tooltip="From the Condition Encoder, made with the same backbone."),
                io.Vae.Input("vae", tooltip="From the HY-WU Model Loader; decodes both pictures."),
                *sampler_inputs(),
                io.Float.Input("strength", default=1.0, min=-4.0, max=4.0, step=0.05, round=0.001,
                               tooltip="Of the LoRA in the second picture."),
            ],
            outputs=[
                io.Image.Output("without", display_name="without", tooltip="The picture without the LoRA."),
                io.Image.Output("with_lora", display_name="with", tooltip="The picture with it."),
                io.Image.Output("difference", display_name="difference",
                                tooltip="What changed, gray where nothing did; amplified by the factor written into it."),
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelHandle, lora: LoRA, condition: Condition, vae: Any, steps: int, guidance: float, shift: float,
        seed: int, size: str, strength: float,
    ) -> io.NodeOutput:
        adapted = inject(model, lora, strength)  # refuses before anything is painted
        without, with_lora = (
            _decoded(vae, paint(handle, condition, steps, guidance, shift, seed, size)) for handle in (model, adapted))
        changed, factor = difference(without, with_lora)
        return io.NodeOutput(without, with_lora, changed, ui=host.said(f"difference x {factor}"))


def _decoded(vae: Any, latent: dict[str, torch.Tensor]) -> torch.Tensor:
    """As ComfyUI's VAE Decode."""
    images = vae.decode(latent["samples"])
    return images.reshape(-1, *images.shape[-3:]) if images.ndim == 5 else images
