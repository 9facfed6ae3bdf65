"""The Triton kernels compile for GPUs that are not here, at the published sizes, and fit into them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_hywu.benchmarks.compiled import FP8

pytest.importorskip("triton", reason="Triton is not installed: its kernels are not compiled")
TARGETS = (80, 90, 120)


def test_every_kernel_fits_into_every_gpu(tmp_path):
    """In a process of its own: in this one Triton only interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    figures = tmp_path / "figures.json"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import conftest; from comfyui_hywu.benchmarks.compiled import main; main()",
         "--targets", *map(str, TARGETS), "--json", str(figures)], cwd=Path(__file__).parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:] + run.stdout
    rows = json.loads(figures.read_text())
    assert {row["target"] for row in rows} == set(TARGETS) and {row["dtype"] for row in rows} == {"bf16", "fp32"}
    assert {row["kernel"] for row in rows} == {"_grouped_gemm", "_swiglu_lora", "_up_and_gate", "_down", "_part", "_whole"}
    assert {row["target"] for row in rows if row["what"] == FP8} == {90, 120}
    for row in rows:
        assert row["spilled"] <= 128, row
        if row["dtype"] == "bf16":
            assert row["tensor_cores"] == (row["kernel"] in ("_grouped_gemm", "_swiglu_lora", "_part")), row
