"""Loads the pack as ComfyUI's loader does, in a fresh process after what ComfyUI itself has imported by then.

``python load_pack.py COMFYUI PACK`` prints one JSON object: processor seconds of ComfyUI's imports and of the pack, and the
libraries that the pack pulled in. Run by the import test and by ``benchmarks/import_cost.py``.
"""

import asyncio
import importlib.util
import json
import sys
import time

import start

# What must only be imported when a node first needs it; ComfyUI has imported a part of transformers by itself.
HEAVY = ("accelerate", "diffusers", "ray", "tokenizers", "transformers", "triton")


async def schemas_of(module) -> list:
    extension = await module.comfy_entrypoint()
    return [node.GET_SCHEMA() for node in await extension.get_node_list()]


def main(comfyui: str, root: str) -> None:
    sys.path[0] = comfyui
    sys.argv = ["main.py", "--cpu"]
    started = time.process_time()
    start.mend_torchvision()
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd  # noqa: F401
    import comfy_api.latest  # noqa: F401

    import nodes  # noqa: F401

    ready, before = time.process_time(), set(sys.modules)
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_x_pack", f"{root}/__init__.py", submodule_search_locations=[root])
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_nodes_x_pack"] = module
    spec.loader.exec_module(module)
    schemas = asyncio.run(schemas_of(module))
    done = time.process_time()
    heavy = sorted({name.split(".")[0] for name in set(sys.modules) - before} & set(HEAVY))
    print(json.dumps({"comfyui": ready - started, "pack": done - ready, "nodes": len(schemas), "heavy": heavy}))


if __name__ == "__main__":
    main(*sys.argv[1:])
