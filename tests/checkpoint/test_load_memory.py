"""Loading holds one copy of the weights: in a fresh process, peak memory grows by at most 1.1 x the bytes that stay; and by no
more than a few matrices beyond them where layers are packed while they are loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_hywu.hywu_core.checkpoint.convert import convert
from safetensors.torch import save_file

from ..tiny import write_backbone

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, SHAPE = 24, (1024, 3072)  # 151 MB in bf16

# ru_maxrss can be inherited from the parent across fork, VmHWM is reset by writing 5 to clear_refs.
MEASURE = """
import sys
sys.path.insert(0, {tests!r})
import conftest
import torch
from torch import nn
from comfyui_hywu.hywu_core.checkpoint import load_weights, open_shards

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty({experts}, *{shape}, dtype={kept}))

    def checkpoint_slots(self):
        return {{f"{{expert}}.weight": self.weight[expert] for expert in range({experts})}}

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

with torch.device("meta"):
    module = Experts()
torch.zeros(1 << 20).to(torch.bfloat16).float()  # threads and allocator are up
open("/proc/self/clear_refs", "w").write("5")
before = peak()
load_weights(module, open_shards({folder!r}))
print((peak() - before) / module.weight.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' peak memory counter")
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_peak_memory(tmp_path, kept):
    shared = torch.zeros(SHAPE, dtype=torch.bfloat16).fill_(0.5)
    for shard in range(2):
        save_file({f"{expert}.weight": shared.clone() for expert in range(EXPERTS) if expert % 2 == shard},
                  tmp_path / f"{shard}.safetensors")
    weight_map = ", ".join(f'"{expert}.weight": "{expert % 2}.safetensors"' for expert in range(EXPERTS))
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weight_map}}}}}')
    program = MEASURE.format(tests=str(ROOT / "tests"), experts=EXPERTS, shape=SHAPE, kept=kept, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.95 <= float(done.stdout) <= 1.1


LOAD = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from dataclasses import replace
from pathlib import Path
import torch
from comfyui_hywu.hywu_core.backbone.model import build_backbone
from comfyui_hywu.hywu_core.checkpoint import open_shards
from comfyui_hywu.hywu_core.checkpoint.formats import codec
from comfyui_hywu.hywu_core.config import BackboneConfig
from comfyui_hywu.hywu_core.placement.build import Placed, whole

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

folder = Path({folder!r})
config = BackboneConfig.from_folder(folder)
placed = Placed(build_backbone(config, torch.float32), open_shards(folder),
                replace(whole(config, torch.float32, "cpu"), format={format!r}))
codec({format!r}, (256, 256)).pack(torch.zeros(256, 256))  # comfy-kitchen is imported
open("/proc/self/clear_refs", "w").write("5")
before = peak()
placed.load()
print(peak() - before, placed.nbytes(torch.device("cpu")))
"""


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory):
    """Four layers of 25 MB in fp32, hardly anything else."""
    return write_backbone(tmp_path_factory.mktemp("packing") / "backbone", hidden_size=256, num_hidden_layers=4, num_experts=16,
                          moe_intermediate_size=512)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' peak memory counter")
@pytest.mark.parametrize(("format", "source"), [
    ("fp8", "published"), ("int8", "published"), ("int4", "published"), ("int8", "converted")])
def test_packing_while_loading_keeps_no_copy(tmp_path, many_experts, format, source):
    folder = many_experts
    if source == "converted":
        convert(many_experts, tmp_path / "converted", format)
        folder = tmp_path / "converted"
    program = LOAD.format(tests=str(ROOT / "tests"), folder=str(folder), format=format)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, kept = map(int, done.stdout.split())
    published = (many_experts / "model.safetensors").stat().st_size
    print(f"{format}, {source}: {grown / 1e6:.0f} MB more, {kept / 1e6:.0f} MB stay, the file has {published / 1e6:.0f}")
    assert kept < 0.4 * published
    # The layers have 101 MB as published; packing a matrix of 1 MB takes 3 MB in fp8 and 46 in int4.
    assert grown < kept + 60e6 < published < kept + 101e6
