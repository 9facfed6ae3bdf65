"""``make parity CASE=DIR``: runs every stage that a golden case lists and prints one line a stage.

The stage functions lie in ``stages/``, one file per part of the core; this file only finds and runs them. A stage without a
function is a fail. Without a case it runs the committed one. Exit status 1 on any fail.
"""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from .case import Case
from .checks import Checks
from .nano import nano_case
from .stages import backbone, flow, generator, text, vision

StageFunction = Callable[[Case, str, Checks], None]
# The longest prefix that fits wins: "k_" serves k_fixed_lora, k_auto_align, ...
STAGES: dict[str, StageFunction] = {
    **vision.STAGES, **text.STAGES, **generator.STAGES, **backbone.STAGES, **flow.STAGES}


def run_stage(case: Case, stage: str) -> Checks:
    """Run one stage; an error inside becomes a failure of that stage, so that the others still run."""
    checks = Checks(stage)
    fitting = [prefix for prefix in STAGES if stage.startswith(prefix)]
    if not fitting:
        checks.failures.append("no code runs this stage")
        return checks
    try:
        with torch.no_grad():
            STAGES[max(fitting, key=len)](case, stage, checks)
    except Exception:
        checks.failures.append(traceback.format_exc(limit=-3))
    return checks


def run_case(folder: Path) -> list[Checks]:
    case = Case(folder)
    results = []
    for stage in case.stages:
        checks = run_stage(case, stage)
        print(checks.line(), flush=True)
        for failure in checks.failures[:10]:
            print(f"    {failure}")
        results.append(checks)
    return results


def main(arguments: list[str]) -> int:
    if len(arguments) > 1:
        print("usage: make parity [CASE=DIR]", file=sys.stderr)
        return 2
    folder = Path(arguments[0]) if arguments and arguments[0] else nano_case()
    if not (folder / "golden" / "manifest.json").is_file():
        print(f"{folder} is no golden case: it has no golden/manifest.json", file=sys.stderr)
        return 2
    results = run_case(folder)
    failed = sum(1 for checks in results if checks.failures or not checks.count)
    print(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
