"""Makes the repository importable as ``comfyui_hywu`` whatever folder it was cloned into, installed or not."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _load_package() -> None:
    spec = importlib.util.spec_from_file_location(
        "comfyui_hywu", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_hywu"] = module
    spec.loader.exec_module(module)


if "comfyui_hywu" not in sys.modules:
    _load_package()
