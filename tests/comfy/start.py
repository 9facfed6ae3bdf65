"""Runs ComfyUI's ``main.py`` in this process: ``python start.py COMFYUI_FOLDER [arguments of main.py]``.

Exists for one reason: ComfyUI imports torchvision, and the torchvision of PyPI beside a CPU-only torch fails on operators that
it expects from its compiled part. Where that happens, and only there, the two names are declared first. The pack itself never
does this.
"""

import importlib.util
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

# Where `make setup` puts it: out of sight of everything but this server.
TORCHVISION = Path(__file__).resolve().parents[2] / ".cache" / "torchvision"


def mend_torchvision() -> None:
    """Declare the operators whose absence makes ``import torchvision`` fail beside a CPU-only torch."""
    import torch

    if importlib.util.find_spec("torchvision") is None:
        sys.path.append(str(TORCHVISION))
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.hywu_tests_library = library  # the definitions last as long as this object


def end_with_parent() -> None:
    """End this process when the launcher is gone, however it went: its end of our standard input closes with it."""

    def wait() -> None:
        # Not sys.stdin: a thread waiting inside a buffered reader makes an ordinary end of Python abort.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    end_with_parent()
    # Under nohup and some CI systems SIGINT arrives ignored; the server is stopped with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = os.path.abspath(sys.argv[1])
    mend_torchvision()
    # As `python main.py` inside the folder would have it; our own folder must not shadow ComfyUI's modules.
    sys.path[0] = folder
    sys.argv = [os.path.join(folder, "main.py"), *sys.argv[2:]]
    os.chdir(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
