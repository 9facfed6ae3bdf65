"""What the pack adds to a ComfyUI start: at most 0.3 s, because everything heavy is imported when first needed."""

import os
import subprocess
import sys
from pathlib import Path

from comfyui_hywu.tests.comfy.fetch import ROOT, fetch_comfyui, find_comfyui

LIMIT_SECONDS = 0.3

# Loads the pack as ComfyUI's loader does, after what ComfyUI itself has imported by then.
LOAD = """
import asyncio, importlib.util, sys, time
import start
sys.path[0] = comfyui
sys.argv = ["main.py", "--cpu"]
start.mend_torchvision()
import comfy.options
comfy.options.enable_args_parsing()
import comfy.sd, nodes, comfy_api.latest
before = set(sys.modules)
clock = time.process_time()
spec = importlib.util.spec_from_file_location("custom_nodes_x_pack", root + "/__init__.py", submodule_search_locations=[root])
module = importlib.util.module_from_spec(spec)
sys.modules["custom_nodes_x_pack"] = module
spec.loader.exec_module(module)

async def load():
    extension = await module.comfy_entrypoint()
    return [node.GET_SCHEMA() for node in await extension.get_node_list()]

schemas = asyncio.run(load())
seconds = time.process_time() - clock
assert len(schemas) == 10, schemas
heavy = {name.split(".")[0] for name in set(sys.modules) - before} & {"diffusers", "accelerate", "triton", "ray"}
print(seconds, ",".join(sorted(heavy)) or "none")
"""


def test_loading_the_pack_is_cheap():
    comfyui = find_comfyui() or fetch_comfyui()
    code = f"comfyui, root = {str(comfyui)!r}, {str(ROOT)!r}\n" + LOAD
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=comfyui, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    assert result.returncode == 0, result.stderr[-3000:]
    seconds, heavy = result.stdout.split()[-2:]
    print(f"the pack costs {float(seconds):.3f} s of processor time")
    assert heavy == "none"
    assert float(seconds) <= LIMIT_SECONDS
