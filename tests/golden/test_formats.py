"""What a format costs on the reference's own cases: conditions and finished latents stay within the stated error.

The cases' weights are random, so routers stand on edges that trained ones do not, and a step's error grows: these are upper
ends. That packed weights compute exactly what their unpacked values compute is tested in ``tests/placement``.
"""

from dataclasses import replace

import pytest
import torch
from comfyui_hywu.hywu_core.placement.build import whole
from comfyui_hywu.tests.golden.case import Case
from comfyui_hywu.tests.golden.nano import nano_case
from comfyui_hywu.tests.golden.parity import run_stage

from .test_parity import FOUND, LARGE

# ‖error‖ / ‖reference‖ of (conditions, finished latents), as docs/placement.md states them.
STATED = {
    "nano": {"fp8": (0.07, 0.04), "int8": (0.02, 0.02), "int4": (0.15, 0.09)},
    "tiny-a": {"fp8": (0.12, 0.13), "int8": (0.06, 0.09), "int4": (0.25, 0.21)},
}


@pytest.mark.parametrize("form", STATED["nano"])
@pytest.mark.parametrize("name", STATED)
def test_a_format_stays_within_its_stated_error(name, form):
    folder = nano_case() if name == "nano" else FOUND.get(name)
    if folder is None:
        pytest.skip(f"no large golden case at {LARGE}: formats are tried on the committed one only")
    case = Case(folder, lambda config: replace(whole(config, torch.float32, "cpu"), format=form))
    errors = {"condition": [], "final_latents": []}
    for stage in case.stages:
        if stage.startswith(("i_condition_", "k_")):
            for label, error in run_stage(case, stage).errors.items():
                errors.get(label, []).append(error)
    conditions, latents = STATED[name][form]
    assert len(errors["condition"]) >= 4 and len(errors["final_latents"]) >= 2
    # Not so small either: then nothing would have been packed.
    assert conditions / 4 < max(errors["condition"]) <= conditions, errors
    assert latents / 4 < max(errors["final_latents"]) <= latents, errors
