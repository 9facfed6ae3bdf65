"""The picture of the graph in README and the templates' thumbnails, made by running the shipped graphs in ComfyUI's front end.

``python -m comfyui_hywu.benchmarks.graph_pictures`` after each training; needs Playwright and a Chromium.
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from ..tests.comfy.graphs import DATA, ROOT
from ..tests.comfy.server import ComfyServer
from ..tests.comfy.test_browser import SECONDS, WATCH, WORKFLOWS, chromium, fit_view, launch, load, open_page, workflow

PHOTO, OTHER = DATA / "photo.jpg", DATA / "coffee.jpg"
THUMBNAIL = (640, 320)
# What each thumbnail shows side by side: pictures of tests/data, and what the graphs saved (by their file names).
SHOWN = {
    "edit_one_photo": (PHOTO, "edit"), "combine_two": (PHOTO, OTHER, "combined"),
    "with_and_without_lora": ("without_lora", "with_lora"), "reuse_saved_lora": (PHOTO, "edit"),
}
MARGIN = 8
# Page coordinates of a box around all nodes.
BOX = """() => {
    const {scale, offset} = window.app.canvas.ds, nodes = window.app.graph.nodes;
    const at = window.app.canvas.canvas.getBoundingClientRect();
    const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1] - 40));
    const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])), bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
    return [at.left + (left + offset[0]) * scale, at.top + (top + offset[1]) * scale,
            at.left + (right + offset[0]) * scale, at.top + (bottom + offset[1]) * scale];
}"""
SECOND_PICTURE = """file => {
    window.app.graph.nodes.filter(n => n.type === 'LoadImage')[1].widgets[0].value = file;
}"""


def main() -> None:
    """Run three graphs in the browser and write docs/graph.png and workflows/*.jpg."""
    from playwright.sync_api import sync_playwright

    executable = chromium()
    if executable is None:
        raise SystemExit("no Chromium is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(Path(folder))
        shutil.copy(PHOTO, server.folder("input") / "example.png")
        shutil.copy(OTHER, server.folder("input") / OTHER.name)
        with server, sync_playwright() as api:
            browser = launch(api, executable)
            page = open_page(browser, server)
            for name in ("edit_one_photo", "combine_two", "with_and_without_lora"):
                shot = run(page, name)
                if name == "edit_one_photo":
                    shot.save(ROOT / "docs" / "graph.png", optimize=True)
            browser.close()
        for name, parts in SHOWN.items():
            pictures = [part if isinstance(part, Path) else server.folder("output") / "hywu" / f"{part}_00001_.png"
                        for part in parts]
            side_by_side(pictures).save(WORKFLOWS / f"{name}.jpg", quality=88)
    print(ROOT / "docs" / "graph.png", *(WORKFLOWS / f"{name}.jpg" for name in SHOWN), sep="\n")


def run(page, name: str) -> Image.Image:
    """Queue a shipped workflow and wait; returns the picture of its nodes."""
    load(page, workflow(name))
    if name == "combine_two":
        page.evaluate(SECOND_PICTURE, OTHER.name)
    page.evaluate(WATCH)
    fit_view(page)
    page.evaluate("() => window.app.queuePrompt(0)")
    page.wait_for_function("() => window.seen.ended", timeout=120 * SECONDS)
    ended = page.evaluate("() => window.seen.ended")
    if ended != "success":
        raise SystemExit(f"{name} ended with {ended}")
    page.wait_for_timeout(2500)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    left, top, right, bottom = page.evaluate(BOX)
    return shot.crop((max(0, int(left) - MARGIN), max(0, int(top) - MARGIN),
                      min(shot.width, int(right) + MARGIN), min(shot.height, int(bottom) + MARGIN)))


def side_by_side(paths: list[Path]) -> Image.Image:
    """The middles of pictures in equal columns."""
    tile = Image.new("RGB", THUMBNAIL)
    edges = [THUMBNAIL[0] * number // len(paths) for number in range(len(paths) + 1)]
    for path, left, right in zip(paths, edges, edges[1:], strict=False):
        part = ImageOps.fit(Image.open(path).convert("RGB"), (right - left, THUMBNAIL[1]), Image.Resampling.LANCZOS)
        tile.paste(part, (left, 0))
    return tile


if __name__ == "__main__":
    main()
