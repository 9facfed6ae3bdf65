"""What the pack adds to a ComfyUI start: processor seconds, and the share of ComfyUI's own imports, each in a fresh process.

``python -m comfyui_hywu.benchmarks.import_cost [--rounds 3] [--record]``. Goal: at most 0.3 s.
"""

import argparse
import json
import subprocess
import sys

from ..tests.comfy.fetch import ROOT, fetch_comfyui, find_comfyui
from .record import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write the figures to benchmarks/results/")
    options = parser.parse_args()
    comfyui = str(find_comfyui() or fetch_comfyui())
    command = [sys.executable, str(ROOT / "tests" / "comfy" / "load_pack.py"), comfyui, str(ROOT)]
    runs = []
    for _ in range(options.rounds):
        out = subprocess.run(command, cwd=comfyui, capture_output=True, text=True, check=True).stdout
        runs.append(json.loads(out.splitlines()[-1]))
    pack, own = min(run["pack"] for run in runs), min(run["comfyui"] for run in runs)
    print(f"the pack {pack:.3f} s, ComfyUI's own imports {own:.2f} s of processor time: {pack / own:.1%} more")
    if options.record:
        record("import_cost", {"pack_seconds": pack, "comfyui_seconds": own, "ratio": pack / own, "rounds": options.rounds})


if __name__ == "__main__":
    main()
