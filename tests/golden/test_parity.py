"""Equality with the reference: every stage of the committed case, and of the large cases where they lie beside the project.

Also proves that the harness can fail: a case whose numbers were changed, and a stage that no code runs.
"""

import json
import shutil
from pathlib import Path

import pytest
from comfyui_hywu.tests.golden.case import Case
from comfyui_hywu.tests.golden.nano import nano_case
from comfyui_hywu.tests.golden.parity import main, run_stage
from safetensors.torch import load_file, save_file

LARGE = Path(__file__).resolve().parents[3] / "shared" / "golden"
FOUND = {path.name: path for path in sorted(LARGE.glob("*")) if (path / "golden").is_dir()}
# Where there are no large cases, one entry stands for them and prints the skip.
CASES = {**(FOUND or {"large": None}), "nano": None}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request) -> Case:
    if request.param == "large":
        pytest.skip(f"no large golden cases at {LARGE}: only the committed one is run")
    return Case(CASES[request.param] or nano_case())


def test_every_stage_equals_the_reference(case):
    """One test a case, so that its checkpoint is loaded once; the failures name their stage."""
    results = [run_stage(case, stage) for stage in case.stages]
    for checks in results:
        print(checks.line())
    failures = [f"{checks.stage}: {failure}" for checks in results for failure in checks.failures]
    assert not failures, "\n".join(failures)
    assert all(checks.count for checks in results)


@pytest.fixture
def copy_of_nano(tmp_path) -> Path:
    folder = tmp_path / "case"
    shutil.copytree(nano_case(), folder)
    manifest = folder / "golden" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["stages"] = {"j_scheduler": content["stages"]["j_scheduler"]}
    manifest.write_text(json.dumps(content))
    return folder


def test_a_case_that_agrees_exits_with_0(copy_of_nano, capsys):
    assert main([str(copy_of_nano)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"


def test_a_changed_number_fails(copy_of_nano, capsys):
    path = copy_of_nano / "golden" / "j_scheduler.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".x_after3"))
    tensors[name] = tensors[name] * (1 + 1e-4)
    save_file(tensors, path)
    assert main([str(copy_of_nano)]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and name in out
    assert out.splitlines()[-1] == "0 passed, 1 failed"


def test_a_stage_without_code_fails(copy_of_nano, capsys):
    manifest = copy_of_nano / "golden" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["stages"]["z_unheard_of"] = {}
    manifest.write_text(json.dumps(content))
    assert main([str(copy_of_nano)]) == 1
    assert "no code runs this stage" in capsys.readouterr().out
