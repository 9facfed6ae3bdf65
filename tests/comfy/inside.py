"""Runs pytest inside a process that has ComfyUI's modules, as a node finds them: ``python inside.py COMFYUI FILE [arguments]``.

For what cannot be seen through the API: ComfyUI's list of loaded models, pretended cards and pretended errors. There is no
server; the tests' own process stays free of ComfyUI's modules.
"""

import os
import sys

import start


def main(comfyui: str, *arguments: str) -> int:
    # As `python main.py --cpu` inside the folder would have it; our own folder must not shadow ComfyUI's modules.
    sys.path[0] = comfyui
    sys.argv = [os.path.join(comfyui, "main.py"), "--cpu"]
    start.mend_torchvision()
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd  # noqa: F401
    import pytest

    import nodes  # noqa: F401

    return pytest.main(list(arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
