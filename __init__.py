"""ComfyUI-HYWU: nodes that edit pictures with HY-WU, which writes new weights for every request.

ComfyUI imports this file at start-up: nothing heavy here. The nodes are imported inside the entry point.
"""

import logging

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """Called once by ComfyUI: the extension with all nodes of the pack."""
    try:
        from .nodes import HYWUExtension
    except ImportError:
        # ComfyUI reduces what is raised here to one line; the traceback says which package is missing.
        logging.exception("HY-WU: the nodes could not be imported")
        raise
    return HYWUExtension()
