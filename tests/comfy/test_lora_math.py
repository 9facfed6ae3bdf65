"""Scale, Blend, Mask and Mean in a running ComfyUI: they paint what the same arithmetic with injectors paints."""

import numpy as np
import pytest
from comfyui_hywu.tests.comfy.graphs import only, pixels, small_graph


def math_graph(nodes: dict[str, tuple[str, dict]], last: str, strength: float = 1.0) -> dict:
    """The edit graph, its LoRA sent through ``nodes`` (id -> type, inputs; "LORA" is the generated one) before the injector."""
    graph = small_graph("edit_one_photo")
    generated = [only(graph, "HYWUWeightGenerator"), 0]
    for key, (kind, inputs) in nodes.items():
        graph[key] = {"class_type": kind, "inputs": {
            name: generated if value == "LORA" else value for name, value in inputs.items()}}
    graph[only(graph, "HYWULoRAInjector")]["inputs"] |= {"strength": strength} | ({"lora": [last, 0]} if last else {})
    del graph[only(graph, "HYWUSaveLoRA")]
    return graph


def painted(server, *arguments, **keywords) -> np.ndarray:
    graph = math_graph(*arguments, **keywords)
    return pixels(server, server.run(graph), only(graph, "SaveImage")).astype(int)


def blend(first, second, one: float, two: float, rank: int = 0) -> tuple[str, dict]:
    return "HYWUBlendLoRAs", {"lora_1": first, "lora_2": second, "weight_1": one, "weight_2": two, "weight_3": 1.0,
                              "weight_4": 1.0, "rank": rank}


def mask(invert: bool = False, **changed) -> tuple[str, dict]:
    return "HYWUMaskLoRA", {"lora": "LORA", "layers": "", "attention": True, "shared_mlp": True, "routed_experts": True,
                            "experts": "", "invert": invert} | changed


@pytest.fixture(scope="module")
def whole(server) -> np.ndarray:
    return painted(server, {}, "")


def test_a_scaled_lora_is_a_strength(server):
    scaled = painted(server, {"40": ("HYWUScaleLoRA", {"lora": "LORA", "factor": -0.6})}, "40")
    assert np.abs(scaled - painted(server, {}, "", strength=-0.6)).max() <= 1


def test_a_blend_of_parts_is_the_whole(server, whole):
    """Both by weights of one LoRA and by a mask and its inversion; a part alone is something else."""
    halves = painted(server, {"40": blend("LORA", "LORA", 0.25, 0.75)}, "40")
    assert np.abs(halves - whole).max() <= 1
    chosen = {"layers": "0-9, 12", "shared_mlp": False, "experts": "1-2"}
    parts = {"40": mask(**chosen), "41": mask(invert=True, **chosen), "42": blend(["40", 0], ["41", 0], 1.0, 1.0)}
    assert np.abs(painted(server, parts, "42") - whole).max() <= 1
    assert np.abs(painted(server, parts, "40") - whole).max() > 1


def test_a_small_blend_reports_its_error_and_paints_it(server, whole):
    graph = math_graph({"40": blend("LORA", "LORA", 0.25, 0.75, rank=1)}, "40")
    graph["50"] = {"class_type": "PreviewAny", "inputs": {"source": ["40", 1]}}
    run = server.run(graph)
    assert run.status == "success", run.error
    assert 0.01 < float(run.history["outputs"]["50"]["text"][0]) < 1
    # The sum of a LoRA with itself has no more directions than the LoRA.
    same = painted(server, {"40": blend("LORA", "LORA", 0.25, 0.75, rank=64)}, "40")
    assert np.abs(same - whole).max() <= 1


def test_the_mean_of_equal_loras_is_each_of_them(server, whole):
    for of in ("matrices", "updates"):
        mean = ("HYWUMeanLoRAs", {"lora_1": "LORA", "lora_2": "LORA", "of": of, "rank": 0})
        assert np.abs(painted(server, {"40": mean}, "40") - whole).max() <= 1, of


@pytest.mark.parametrize(("changed", "said"), [
    ({"layers": "0-99"}, "outside 0-23"), ({"layers": "all"}, "neither a number nor a range"),
    ({"attention": False, "shared_mlp": False, "routed_experts": False}, "keeps 0 of"),
    ({"experts": "3-1"}, "smaller number first")])
def test_masks_that_cannot_be_are_refused_with_the_remedy(server, changed, said):
    run = server.run(math_graph({"40": mask(**changed)}, "40"))
    assert run.status == "error" and said in run.error
