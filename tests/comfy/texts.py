"""Writes ``locales/en/nodeDefs.json`` anew: ``python -m comfyui_hywu.tests.comfy.texts``.

The English texts are taken from a running ComfyUI, so they say what the nodes say. Translators start from this file, and the
tests compare the others with it. The Chinese one is written by hand.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from .fetch import ROOT
from .server import PACK, ComfyServer

LOCALES = ROOT / "locales"
FILE = "nodeDefs.json"


def english(infos: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's /object_info -> the texts of the pack's nodes, in the shape of nodeDefs.json."""
    return {name: _texts(info) for name, info in infos.items() if info["python_module"] == f"custom_nodes.{PACK}"}


def _texts(info: dict[str, Any]) -> dict[str, Any]:
    inputs = info["input"].get("required", {}) | info["input"].get("optional", {})
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs.items()},
        "outputs": {str(index): {"name": name, "tooltip": tooltip} for index, (name, tooltip) in enumerate(
            zip(info["output_name"], info["output_tooltips"], strict=True))}}


def stored(language: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / FILE).read_text(encoding="utf-8"))


def main() -> int:
    with tempfile.TemporaryDirectory() as base, ComfyServer(Path(base)) as server:
        texts = english(server.get("/object_info"))
    path = LOCALES / "en" / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
