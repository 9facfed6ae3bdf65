"""What the pack pulls in at a ComfyUI start: nothing heavy. Its seconds are measured by ``benchmarks/import_cost.py``."""

import json
import subprocess
import sys
from pathlib import Path

from comfyui_hywu.tests.comfy.fetch import ROOT, fetch_comfyui, find_comfyui
from comfyui_hywu.tests.comfy.test_nodes import NODES

LOAD = Path(__file__).with_name("load_pack.py")


def test_loading_the_pack_imports_nothing_heavy():
    comfyui = find_comfyui() or fetch_comfyui()
    result = subprocess.run(
        [sys.executable, str(LOAD), str(comfyui), str(ROOT)], capture_output=True, text=True, cwd=comfyui, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    loaded = json.loads(result.stdout.splitlines()[-1])
    print(f"the pack costs {loaded['pack']:.3f} s of processor time, ComfyUI's own imports {loaded['comfyui']:.1f} s")
    assert loaded["nodes"] == len(NODES) and loaded["heavy"] == []
