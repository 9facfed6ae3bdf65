"""ComfyUI-HYWU: nodes that edit pictures with HY-WU, which writes new weights for every request.

ComfyUI imports this file at start-up: nothing heavy here. The nodes are imported inside the entry point.
"""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Called once by ComfyUI: the extension with all nodes of the pack."""
    from .nodes import HYWUExtension

    return HYWUExtension()
