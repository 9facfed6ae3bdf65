"""The picture of the graph in README, the templates' thumbnails and the nodes' pictures on their help pages: all are made by
running the shipped graphs in ComfyUI's front end.

``python -m comfyui_hywu.benchmarks.graph_pictures`` after each training; needs Playwright and a Chromium.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from ..tests.comfy.graphs import DATA, GRAPHS, ROOT, only
from ..tests.comfy.server import ComfyServer
from ..tests.comfy.test_browser import (
    PICTURES,
    SECONDS,
    WATCH,
    WORKFLOWS,
    chromium,
    fit_view,
    launch,
    load,
    open_page,
    workflow,
)

PHOTO, OTHER = DATA / "photo.jpg", DATA / "coffee.jpg"
THUMBNAIL = (640, 320)
# What each thumbnail shows side by side: pictures of tests/data, and what the graph saved or previewed, by the node's title.
# In this order the graphs find the files that they need.
SHOWN = {
    "edit_one_photo": (PHOTO, "Save Image"),
    "combine_two": (PHOTO, OTHER, "Save Image"),
    "with_and_without_lora": ("B: plain backbone", "A: with the LoRA"),
    "reuse_saved_lora": (PHOTO, "Save Image"),
    "inspect_lora": ("Norm map", "Difference"),
    "blend_loras": (PHOTO, "Save Image"),
    "mask_lora": ("A: attention only", "B: everything else"),
    "map_loras": ("Map", "With the mean LoRA"),
    "share_lora": (PHOTO, "Save Image"),
    "use_shared_lora": (PHOTO, "Save Image"),
}
CHARTS = {"Norm map": (0, 0, 860, 492), "Map": None}  # shown whole, or this part of them, and twice as wide as a photo
# LoRAs for the map, each with its picture.
SAVED = ("make it darker", "make it warmer", "more orange, please", "make it cooler", "make it gray", "black and white",
         "make it sepia", "turn it into a negative", "make it pinker", "make it pixelated", "make it blurry", "fade it")
MARGIN = 8
NODES = ROOT / "nodes" / "web" / "docs" / "pictures"
NODE_WIDTH, NODE_BYTES = 420, 60_000
HIDDEN, SPLINE = -1, 2  # how the front end draws links
# Page coordinates of a box around nodes, all or the given ones.
BOX = """ids => {
    const {scale, offset} = window.app.canvas.ds, nodes = window.app.graph.nodes.filter(n => !ids || ids.includes(n.id));
    const at = window.app.canvas.canvas.getBoundingClientRect();
    const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1] - (ids ? 30 : 40)));
    const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])), bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
    return [at.left + (left + offset[0]) * scale, at.top + (top + offset[1]) * scale,
            at.left + (right + offset[0]) * scale, at.top + (bottom + offset[1]) * scale];
}"""
SECOND_PICTURE = """file => {
    window.app.graph.nodes.filter(n => n.type === 'LoadImage')[1].widgets[0].value = file;
}"""
# One node alone, so wide that its picture has ``width`` pixels with the margins; nothing around it.
ALONE = """([id, width]) => {
    const {canvas, graph} = window.app, node = graph.getNodeById(id);
    canvas.deselectAll();
    canvas.ds.scale = Math.min(1.3, width / node.size[0]);
    canvas.ds.offset[0] = -node.pos[0] + 400 / canvas.ds.scale;
    canvas.ds.offset[1] = -node.pos[1] + 160 / canvas.ds.scale;  // below the bars at the top
    canvas.setDirty(true, true);
}"""
ADDRESS = """title => window.app.graph.nodes.find(
    n => n.title === title && ['SaveImage', 'PreviewImage'].includes(n.type)).imgs[0].src"""


def main() -> None:
    """Run all graphs in the browser and write docs/graph.png, workflows/*.jpg and nodes/web/docs/pictures/*.png."""
    from playwright.sync_api import sync_playwright

    executable = chromium()
    if executable is None:
        raise SystemExit("no Chromium is installed: apt-get install chromium")
    NODES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(Path(folder))
        shutil.copy(PHOTO, server.folder("input") / "example.png")
        shutil.copy(OTHER, server.folder("input") / OTHER.name)
        with server:
            save_loras(server)  # before Playwright, whose loop takes this thread
            with sync_playwright() as api:
                pictured = run_all(launch(api, executable), server)
    print(ROOT / "docs" / "graph.png", *(WORKFLOWS / f"{name}.jpg" for name in SHOWN),
          *(NODES / f"{kind}.png" for kind in sorted(pictured)), sep="\n")


def run_all(browser, server: ComfyServer) -> set[str]:
    """Run and picture every graph; returns the kinds of nodes that were pictured."""
    pictured: set[str] = set()
    page = open_page(browser, server)
    for name, parts in SHOWN.items():
        server.forget()  # so that every node runs and says what it says
        shot = run(page, name)
        if name == "edit_one_photo":
            shot.save(ROOT / "docs" / "graph.png", optimize=True)
        side_by_side([(part, picture(page, part)) for part in parts]).save(WORKFLOWS / f"{name}.jpg", quality=88)
        pictured |= picture_nodes(page, pictured)
    browser.close()
    return pictured


def save_loras(server: ComfyServer) -> None:
    """In a folder of their own: "reuse saved LoRA" names the first that "edit one photo" saves."""
    for instruction in SAVED:
        graph = json.loads((GRAPHS / "edit_one_photo.json").read_text(encoding="utf-8"))
        graph[only(graph, "PrimitiveStringMultiline")]["inputs"]["value"] = instruction
        graph[only(graph, "HYWUSaveLoRA")]["inputs"] |= {
            "filename_prefix": "hywu_loras/more/edit", "image": [only(graph, "HYWUMatchAspect"), 0]}
        ended = server.run(graph)
        if ended.status != "success":
            raise SystemExit(f"saving a LoRA for {instruction!r} ended with {ended.status}: {ended.error}")


def run(page, name: str) -> Image.Image:
    """Queue a shipped workflow and wait; returns the picture of its nodes."""
    load(page, workflow(name))
    if name == "combine_two":
        page.evaluate(SECOND_PICTURE, OTHER.name)
    page.evaluate(WATCH)
    fit_view(page)
    page.evaluate("() => window.app.queuePrompt(0)")
    page.wait_for_function("() => window.seen.ended", timeout=300 * SECONDS)
    ended = page.evaluate("() => window.seen.ended")
    if ended != "success":
        raise SystemExit(f"{name} ended with {ended}")
    page.wait_for_function(PICTURES, timeout=60 * SECONDS)
    page.wait_for_timeout(1500)
    return cropped(page)


def cropped(page, ids: list[int] | None = None) -> Image.Image:
    """The page's picture around nodes, all or the given ones."""
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    left, top, right, bottom = page.evaluate(BOX, ids)
    return shot.crop((max(0, int(left) - MARGIN), max(0, int(top) - MARGIN),
                      min(shot.width, int(right) + MARGIN), min(shot.height, int(bottom) + MARGIN)))


def picture(page, part: Path | str) -> Image.Image:
    """A file's picture, or what the node of this title shows."""
    source = part if isinstance(part, Path) else io.BytesIO(page.request.get(page.evaluate(ADDRESS, part)).body())
    return Image.open(source).convert("RGB")


def picture_nodes(page, known: set[str]) -> set[str]:
    """Write the picture of each kind of the pack's nodes in the page's graph that is not ``known``; returns those kinds."""
    settings(page, "None", HIDDEN)
    nodes = page.evaluate("() => window.app.graph.nodes.map(n => [n.id, n.type])")
    found = {kind: node for node, kind in reversed(nodes) if kind.startswith(("HYWU", "HYImage")) and kind not in known}
    for kind, node in found.items():
        page.evaluate(ALONE, [node, NODE_WIDTH - 2 * MARGIN - 2])
        page.wait_for_timeout(800)
        if kind == "HYWUInspectLoRA":
            page.locator(".hywu-inspect [role=gridcell]").last.evaluate("cell => cell.click()")  # a mouse would select the node
            page.wait_for_timeout(300)
        # Of Pillow's ways to 256 colours the one that keeps the few pixels of a socket in theirs.
        shot = cropped(page, [node]).quantize(256, Image.Quantize.FASTOCTREE)
        path = NODES / f"{kind}.png"
        shot.save(path, optimize=True)
        if shot.width > NODE_WIDTH or path.stat().st_size > NODE_BYTES:
            raise SystemExit(f"{path} has {shot.width} pixels and {path.stat().st_size} bytes, at most {NODE_WIDTH} and "
                             f"{NODE_BYTES} are wanted")
    settings(page, "All", SPLINE)
    return set(found)


def settings(page, badges: str, links: int) -> None:
    page.evaluate("""async ([badges, links]) => {
        await window.app.extensionManager.setting.set('Comfy.NodeBadge.NodeSourceBadgeMode', badges);
        await window.app.extensionManager.setting.set('Comfy.LinkRenderMode', links);
    }""", [badges, links])


def side_by_side(parts: list[tuple[Path | str, Image.Image]]) -> Image.Image:
    """The middles of photos in equal columns, and charts as a whole in columns of twice their width."""
    tile = Image.new("RGB", THUMBNAIL, "white")
    shares = [2 if part in CHARTS else 1 for part, _ in parts]
    edges = [THUMBNAIL[0] * sum(shares[:number]) // sum(shares) for number in range(len(parts) + 1)]
    for (part, shown), left, right in zip(parts, edges, edges[1:], strict=False):
        size = right - left, THUMBNAIL[1]
        if part in CHARTS:
            shown = ImageOps.pad(shown.crop(CHARTS[part]), size, Image.Resampling.LANCZOS, color="white")
        else:
            shown = ImageOps.fit(shown, size, Image.Resampling.LANCZOS)
        tile.paste(shown, (left, 0))
    return tile


if __name__ == "__main__":
    main()
