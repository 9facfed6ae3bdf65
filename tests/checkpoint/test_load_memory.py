"""Loading holds one copy of the weights: in a fresh process, peak memory grows by at most 1.1 x the bytes that stay."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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
