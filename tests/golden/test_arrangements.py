"""The reference's numbers in every arrangement of the model, at the same tolerances."""

import pytest
from comfyui_hywu.tests.golden.case import Case
from comfyui_hywu.tests.golden.nano import nano_case
from comfyui_hywu.tests.golden.parity import run_stage

from ..placement.plans import even_stages, plan, through_the_ring
from .test_parity import FOUND, LARGE

# Whole passes through the backbone: thinking, conditions, ratio, edits.
FLOWS = ("h_", "i_", "k_")
# name -> number of stages, streamed how (None: all there), waves, generator
ARRANGEMENTS = {
    "two stages": (2, {}, False, {}),
    "three stages": (3, {}, False, {}),
    "two stages in waves": (2, {}, True, {}),
    "ring of two": (1, {"ring": 2}, False, {"mode": "shared"}),
    "ring of three": (1, {"ring": 3}, False, {"mode": "streamed"}),
    "from disk": (1, {"source": "disk", "ring": 2}, False, {"mode": "streamed", "kept": "disk"}),
    "two stages from disk in waves": (2, {"source": "disk", "ring": 2}, True, {"mode": "shared", "kept": "disk"}),
}


# The committed case has two layers; three stages and a ring of three want the three of a large one.
THREE_LAYERS = ("three stages", "ring of three")


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_the_flow_equals_the_reference(name, monkeypatch):
    count, streamed, waves, generator = ARRANGEMENTS[name]
    through_the_ring(monkeypatch)

    def arrange(config):
        return plan(config, *even_stages(config.num_hidden_layers, count, **streamed), waves=waves)

    folder = FOUND.get("tiny-a") if name in THREE_LAYERS else nano_case()
    if folder is None:
        pytest.skip(f"no large golden case at {LARGE}: the committed one has two layers")
    case = Case(folder, arrange, generator)
    results = [run_stage(case, stage) for stage in case.stages if stage.startswith(FLOWS)]
    failures = [f"{checks.stage}: {failure}" for checks in results for failure in checks.failures]
    assert not failures, "\n".join(failures)
    assert all(checks.count for checks in results) and len(results) >= 5
