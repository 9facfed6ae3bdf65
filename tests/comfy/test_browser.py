"""The shipped workflows in ComfyUI's real front end, in a headless Chromium: they open without an alert, queue, show progress
and a preview, and the result arrives. Screenshots go to ``.cache/browser/``. Without a Chromium these tests are skipped.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from comfyui_hywu.tests.comfy.graphs import DATA, GRAPHS, ROOT, small_graph

WORKFLOWS = ROOT / "workflows"
SHOTS = ROOT / ".cache" / "browser"
NAMES = ["edit_one_photo", "combine_two", "with_and_without_lora", "reuse_saved_lora"]
LORA_NAMES = ["inspect_lora", "blend_loras", "mask_lora", "map_loras", "share_lora", "use_shared_lora"]  # test_browser_lora.py
SECONDS = 1000  # in milliseconds, as Playwright counts
ALERTS = ".p-dialog, .p-toast-message-warn, .p-toast-message-error, .comfy-modal:visible"

# The random checkpoint instead of the one that a workflow names, few tokens, and so many steps.
SMALL = """steps => {
    const set = (type, values) => {
        for (const node of window.app.graph.nodes.filter(n => n.type === type))
            for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value;
    };
    set('HYWUModelLoader', {backbone: 'deep/base'});
    set('HYWUGeneratorLoader', {generator: 'deep/pg'});
    set('HYWUThink', {max_new_tokens: 12});
    set('HYImageSampler', {steps, size: '1:1'});
}"""
# Fills window.seen with what arrives while a graph runs.
WATCH = """() => {
    window.seen = {progress: {}, previews: 0, executed: [], ended: null, errors: []};
    const api = window.app.api;
    const count = window.seen.progress;
    api.addEventListener('progress', e => { count[e.detail.node] = (count[e.detail.node] || 0) + 1; });
    for (const kind of ['b_preview', 'b_preview_with_metadata'])
        api.addEventListener(kind, () => { window.seen.previews += 1; });
    api.addEventListener('executed', e => { window.seen.executed.push(e.detail.node); });
    api.addEventListener('execution_success', () => { window.seen.ended = 'success'; });
    api.addEventListener('execution_error', e => { window.seen.ended = e.detail.exception_message; });
    api.addEventListener('execution_interrupted', () => { window.seen.ended = 'interrupted'; });
}"""

# Whether every node that shows pictures has loaded them; pictures are loaded when they are drawn.
PICTURES = """() => {
    window.app.canvas.setDirty(true, true);
    return window.app.graph.nodes.filter(n => ['SaveImage', 'PreviewImage'].includes(n.type))
        .every(n => n.imgs?.length && n.imgs.every(i => i.naturalWidth > 0));
}"""
# Pairs of nodes of which one hides a part of the other, by title.
OVERLAPS = """() => {
    const boxes = window.app.graph.nodes.map(n =>
        [n.pos[0], n.pos[1] - 30, n.pos[0] + n.size[0], n.pos[1] + n.size[1], n.title]);
    const hidden = (p, q) => p[0] < q[2] && q[0] < p[2] && p[1] < q[3] && q[1] < p[3];
    return boxes.flatMap((p, i) => boxes.slice(i + 1).filter(q => hidden(p, q)).map(q => [p[4], q[4]]));
}"""


def chromium() -> str | None:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    return None


def launch(api, executable: str):
    """A headless Chromium of Playwright's ``api``."""
    return api.chromium.launch(
        executable_path=executable, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])


def open_page(browser, server):
    """The front end, loaded, nothing open over the canvas; the page's ``warnings`` collects what it complains of."""
    opened = browser.new_page(viewport={"width": 1900, "height": 1000})
    opened.warnings = []
    opened.on("console", lambda message: opened.warnings.append(message.text) if message.type in ("warning", "error") else None)
    opened.on("dialog", lambda dialog: (opened.warnings.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    # What a visitor's first visit leaves behind: no template browser, no tour over the canvas.
    server.post("/settings", {
        "Comfy.TutorialCompleted": True, "Comfy.InstalledVersion": "1.32.9", "Comfy.Minimap.Visible": False})
    opened.goto(server.url)
    opened.wait_for_function("() => window.app && window.app.graph && window.app.extensionManager", timeout=90 * SECONDS)
    opened.wait_for_timeout(1500)
    return opened


@pytest.fixture(scope="module")
def saved_lora(server) -> None:
    """The file that "reuse saved LoRA" names: the first that "edit one photo" saves."""
    assert server.run(small_graph("edit_one_photo")).status == "success"
    assert (server.base / "output" / "hywu_loras" / "edit_00001_.safetensors").exists()


@contextmanager
def running_browser(left_out: str) -> Iterator:
    """A Chromium; where there is none the tests are skipped, and it is said that ``left_out``."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = chromium()
    if executable is None:
        pytest.skip(f"no Chromium is installed (apt-get install chromium): {left_out}")
    with playwright.sync_playwright() as api:
        running = launch(api, executable)
        yield running
        running.close()


@pytest.fixture(scope="module")
def browser(saved_lora):
    with running_browser("the workflows are not tried in a browser") as running:
        yield running


@pytest.fixture
def page(browser, server):
    opened = open_page(browser, server)
    assert alerts(opened) == []
    yield opened
    opened.close()


def workflow(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def load(page, graph: dict) -> None:
    page.warnings.clear()
    page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1000)


def alerts(page) -> list[str]:
    return [item.inner_text()[:300] for item in page.locator(ALERTS).all() if item.is_visible()]


def fit_view(page) -> None:
    """All nodes in the picture, none of them selected."""
    page.evaluate("""() => {
        const canvas = window.app.canvas, nodes = window.app.graph.nodes;
        const left = Math.min(...nodes.map(n => n.pos[0])) - 40, top = Math.min(...nodes.map(n => n.pos[1])) - 80;
        const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0])) + 40;
        const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1])) + 40;
        const w = canvas.canvas.clientWidth, h = canvas.canvas.clientHeight;
        // Margins for what lies over the canvas: menus left and above.
        canvas.ds.scale = Math.min((w - 120) / (right - left), (h - 200) / (bottom - top));
        canvas.ds.offset[0] = -left + 90 / canvas.ds.scale;
        canvas.ds.offset[1] = -top + 150 / canvas.ds.scale;
        canvas.setDirty(true, true);
    }""")
    page.wait_for_timeout(800)


@pytest.mark.parametrize("name", [*NAMES, *LORA_NAMES])
def test_a_workflow_opens_without_a_warning_and_is_its_api_twin(page, name):
    load(page, workflow(name))
    assert alerts(page) == []
    ours = ("schema", "validat", "hywu", "hyimage")
    # The front end asks api.comfy.org about every pack; the server of the tests forbids it.
    complaints = [text for text in page.warnings if "Content Security Policy" not in text and "api.comfy.org" not in text]
    assert [text for text in complaints if any(word in text.lower() for word in ours)] == []
    # Zoomed out further, the front end draws no text at all.
    assert page.evaluate("() => window.app.canvas.ds.scale") >= 0.6
    count = page.evaluate("() => window.app.graph.nodes.length")
    assert count == len(workflow(name)["nodes"])
    missing = page.evaluate("() => window.app.graph.nodes.filter(n => n.has_errors).map(n => n.type)")
    assert missing == []
    assert page.evaluate(OVERLAPS) == []
    prompt = page.evaluate("async () => (await window.app.graphToPrompt()).output")
    for node in prompt.values():
        if node["class_type"] == "PreviewAny":
            node["inputs"].pop("preview")  # the text box that the front end adds to show the text in
    twin = json.loads((GRAPHS / f"{name}.json").read_text(encoding="utf-8"))
    assert prompt == twin


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_from_the_browser(server, page, name):
    graph = workflow(name)
    shutil.copy(DATA / "photo.jpg", server.folder("input") / "example.png")
    server.forget()
    load(page, graph)
    page.evaluate(SMALL, 4)
    page.evaluate(WATCH)
    fit_view(page)
    page.evaluate("() => window.app.queuePrompt(0)")
    page.wait_for_function("() => window.seen.ended", timeout=120 * SECONDS)
    seen = page.evaluate("() => window.seen")
    assert seen["ended"] == "success"
    assert alerts(page) == []
    assert page.evaluate(OVERLAPS) == []  # nodes grow by what they say
    samplers = page.evaluate("() => window.app.graph.nodes.filter(n => n.type === 'HYImageSampler').map(n => String(n.id))")
    for node in samplers:
        assert seen["progress"].get(node, 0) > 1
    assert seen["previews"] >= 1
    page.wait_for_function(PICTURES, timeout=30 * SECONDS)
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)
    shot = SHOTS / f"{name}.png"
    page.screenshot(path=shot)
    assert shot.stat().st_size > 20_000


def test_the_help_page_opens_in_the_front_end(page, server):
    """ComfyUI's own help panel fetches the page by node id."""
    text = page.evaluate("async () => (await fetch('/extensions/ComfyUI-HYWU/docs/HYWULoRAInjector.md')).text()")
    assert text.startswith("# HY-WU LoRA Injector")


def test_the_workflows_are_templates(server):
    """The template browser lists a pack's workflows from its folder of that name."""
    templates = server.get("/workflow_templates")
    listed = next(names for pack, names in templates.items() if pack.endswith("ComfyUI-HYWU"))
    assert sorted(listed) == sorted([*NAMES, *LORA_NAMES])


def test_shots_folder_is_ignored_by_git():
    assert Path(".cache") in SHOTS.relative_to(ROOT).parents
