"""The pack's own parts of the front end: the panel of Inspect LoRA by mouse and keys, in both themes and languages; colours of
its sockets; running a graph as far as a LoRA; the templates for LoRAs, help pages with pictures, and Chinese names. Screenshots
go to ``.cache/browser/``. Without a Chromium these are skipped.
"""

import json

import pytest
from comfyui_hywu.tests.comfy.graphs import ROOT, node_ids, only, small_graph
from comfyui_hywu.tests.comfy.test_browser import (
    LORA_NAMES,
    NAMES,
    OVERLAPS,
    PICTURES,
    SECONDS,
    SHOTS,
    SMALL,
    WATCH,
    alerts,
    fit_view,
    load,
    open_page,
    running_browser,
    workflow,
)

HOSTILE = '<img src=x onerror="window.hacked=1"><b>bold</b>'
# Adds Inspect LoRA: after the generator, with the loader's model and the sampler's latent.
INSPECT = """() => {
    const graph = window.app.graph;
    const found = type => graph.nodes.find(n => n.type === type);
    const node = window.LiteGraph.createNode('HYWUInspectLoRA');
    graph.add(node);
    node.pos = [100, 1200];
    found('HYWUWeightGenerator').connect(0, node, 'lora');
    found('HYWUModelLoader').connect(0, node, 'model');
    found('HYImageSampler').connect(0, node, 'sample');
    window.app.extensionManager.workflow.activeWorkflow?.changeTracker.checkState();  // as a click would
    return node.id;
}"""
LOOK = """id => {
    const node = window.app.graph.getNodeById(id), canvas = window.app.canvas;
    canvas.deselectAll();
    canvas.ds.scale = 1.2;
    canvas.ds.offset[0] = -node.pos[0] + 120;
    canvas.ds.offset[1] = -node.pos[1] + 120;
    canvas.setDirty(true, true);
}"""
RUN = "() => window.app.queuePrompt(0)"


@pytest.fixture(scope="module")
def shared(server) -> str:
    """Two LoRAs in the folder "templates" and an exported one, whose name this is."""
    for words in ("make it brighter", "make it gray and cool"):
        graph = small_graph("edit_one_photo")
        graph[only(graph, "PrimitiveStringMultiline")]["inputs"]["value"] = words
        graph[only(graph, "HYWUSaveLoRA")]["inputs"]["filename_prefix"] = "hywu_loras/templates/edit"
        assert server.run(graph).status == "success"
    graph = small_graph("share_lora")
    exporter = only(graph, "HYWUExportLoRA")
    graph[exporter]["inputs"]["filename_prefix"] = "hywu_loras/templates/peft"
    for node in node_ids(graph, "SaveImage"):
        del graph[node]
    run = server.run(graph)
    assert run.status == "success", run.error
    return run.history["outputs"][exporter]["text"][0].split("/hywu_loras/")[1]


@pytest.fixture(scope="module")
def browser(shared):  # whose graphs run before Playwright's loop takes this thread
    with running_browser("the panel is not tried in a browser") as running:
        yield running


@pytest.fixture
def page(browser, server):
    server.post("/settings", {"Comfy.ColorPalette": "dark", "Comfy.Locale": "en"})
    opened = open_page(browser, server)
    opened.evaluate("() => { window.LiteGraph ??= window.comfyAPI?.litegraph?.LiteGraph; }")
    yield opened
    opened.close()


def ended(page) -> dict:
    page.wait_for_function("() => window.seen.ended", timeout=120 * SECONDS)
    return page.evaluate("() => window.seen")


def inspected(page, instruction: str | None = None) -> int:
    """The edit graph with Inspect LoRA, run; the node's id."""
    load(page, workflow("edit_one_photo"))
    page.evaluate(SMALL, 3)
    if instruction is not None:
        page.evaluate("""text => {
            window.app.graph.nodes.find(n => n.type === 'PrimitiveStringMultiline').widgets[0].value = text;
        }""", instruction)
    node = page.evaluate(INSPECT)
    page.evaluate(WATCH)
    page.evaluate(RUN)
    assert ended(page)["ended"] == "success"
    page.evaluate(LOOK, node)
    page.locator(".hywu-inspect [role=grid]").wait_for(timeout=10 * SECONDS)
    page.wait_for_timeout(600)
    return node


def panel(page):
    return page.locator(".hywu-inspect")


def shot(page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(400)
    page.screenshot(path=SHOTS / f"{name}.png")


def test_the_panel_waits_and_the_sockets_have_colours(page):
    load(page, workflow("edit_one_photo"))
    node = page.evaluate(INSPECT)
    page.evaluate(LOOK, node)
    page.wait_for_timeout(500)
    assert panel(page).inner_text().startswith("Run the graph")
    assert alerts(page) == []
    colours = """() => ['HYWU_MODEL', 'HYWU_GENERATOR', 'HYWU_CONDITION', 'HYWU_LORA'].map(type =>
        [window.app.canvas.constructor.link_type_colors[type], window.app.canvas.default_connection_color_byType[type]])"""
    dark = page.evaluate(colours)
    assert len({link for link, _ in dark}) == 4 and all(link == slot and link.startswith("#") for link, slot in dark)
    # They are there after the theme has changed, too.
    page.evaluate("() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    page.wait_for_timeout(1500)
    assert page.evaluate(colours) == dark
    assert page.evaluate("() => getComputedStyle(document.body).getPropertyValue('--color-datatype-HYWU_LORA').trim()")


def test_the_panel_by_mouse(page):
    inspected(page)
    cells = panel(page).get_by_role("gridcell")
    assert cells.count() == 24 * 7
    cells.nth(30).hover()
    first = panel(page).get_by_role("status").inner_text()
    assert first.startswith("layer 6 · self_attn.o_proj: norm") and "of its weight" in first and "effective rank" in first
    cells.nth(24 * 6 + 3).click()
    detail = panel(page).get_by_role("img")
    assert detail.count() == 2
    assert "Norm of each expert's update, and its share of the tokens" in detail.nth(1).inner_text()
    bars = detail.nth(1).locator(".bars > span")
    bars.nth(1).hover()
    assert panel(page).get_by_role("status").inner_text().startswith("expert 1: norm")
    assert "of the tokens" in panel(page).get_by_role("status").inner_text()
    shot(page, "inspect-dark")
    # A projection without experts has its spectrum only.
    cells.nth(2).click()
    assert detail.count() == 1
    assert panel(page).locator("[aria-selected=true]").count() == 1


def test_the_panel_by_keys(page):
    node = inspected(page)
    cells = panel(page).get_by_role("gridcell")
    # One cell takes the focus of Tab, the others are walked to.
    assert panel(page).locator("[role=gridcell][tabindex='0']").count() == 1
    cells.nth(0).focus()
    said = panel(page).get_by_role("status")
    for key, start in (("ArrowRight", "layer 1 · self_attn.qkv_proj"), ("ArrowDown", "layer 1 · self_attn.o_proj"),
                       ("End", "layer 23 · self_attn.o_proj"), ("ArrowRight", "layer 23 · self_attn.o_proj"),
                       ("PageDown", "layer 23 · mlp.experts.w3"), ("ArrowLeft", "layer 22 · mlp.experts.w3"),
                       ("ArrowUp", "layer 22 · mlp.experts.w2"), ("Home", "layer 0 · mlp.experts.w2")):
        page.keyboard.press(key)
        assert said.inner_text().startswith(start), key
    assert page.evaluate("() => document.activeElement.getAttribute('aria-label')").startswith("layer 0 · mlp.experts.w2")
    assert panel(page).get_by_role("img").count() == 0
    page.keyboard.press("Enter")
    assert panel(page).get_by_role("img").count() == 2
    assert page.evaluate("() => document.activeElement.getAttribute('aria-selected')") == "true"
    # The keys are the panel's: none reaches the canvas, where this one deletes the node.
    page.keyboard.press("Delete")
    page.wait_for_timeout(300)
    assert page.evaluate("id => !!window.app.graph.getNodeById(id)", node)


def test_the_panel_in_the_light_theme_and_in_chinese(page):
    # Another language opens the workflow anew and puts back what nodes had sent, but not what came before the server answered
    # the request, as the results of a run do that is cached as a whole. This run is not.
    inspected(page, "make it darker and warm")
    ground = "() => getComputedStyle(document.querySelector('.hywu-inspect')).backgroundColor"
    dark = page.evaluate(ground)
    page.evaluate("() => window.app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    page.wait_for_timeout(1500)
    assert page.evaluate(ground) != dark
    contrast = """() => {
        const style = getComputedStyle(document.querySelector('.hywu-inspect'));
        const light = text => {
            const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const [a, b] = [light(style.color), light(style.backgroundColor)].sort();
        return (b + 0.05) / (a + 0.05);
    }"""
    assert page.evaluate(contrast) > 4.5
    panel(page).get_by_role("gridcell").nth(24 * 4 + 20).click()
    shot(page, "inspect-light")
    page.evaluate("() => window.app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    page.wait_for_timeout(1000)
    panel(page).get_by_role("gridcell").nth(24 * 5 + 2).click()
    assert panel(page).get_by_role("status").inner_text().startswith("第 2 层 · mlp.experts.w2")
    shot(page, "inspect-chinese")
    page.evaluate("""async () => {
        await window.app.extensionManager.setting.set('Comfy.Locale', 'en');
        await window.app.extensionManager.setting.set('Comfy.ColorPalette', 'dark');
    }""")


def test_a_hostile_instruction_stays_text(page):
    inspected(page, HOSTILE)
    assert panel(page).locator("p.cut").inner_text() == HOSTILE
    assert panel(page).locator("img, b:not(.bars b)").count() == 0
    assert page.evaluate("() => window.hacked") is None


def test_the_panel_comes_back_after_a_reload(page, server):
    """Empty at first, without an error; there again with the next run, which is cached."""
    inspected(page)
    saved = json.loads(page.evaluate("() => JSON.stringify(window.app.graph.serialize())"))
    assert "norms" not in json.dumps(saved)  # the workflow's file holds no numbers of the panel
    # Else the front end asks whether to leave, and the page's handler says no.
    page.evaluate("() => window.app.extensionManager.setting.set('Comfy.Window.UnloadConfirmation', false)")
    page.reload()
    page.wait_for_function("() => window.app && window.app.graph && window.app.extensionManager", timeout=90 * SECONDS)
    page.wait_for_timeout(1500)
    load(page, saved)
    page.evaluate(LOOK, next(node["id"] for node in saved["nodes"] if node["type"] == "HYWUInspectLoRA"))
    page.wait_for_timeout(500)
    assert panel(page).inner_text().startswith("Run the graph") and alerts(page) == []
    page.evaluate(WATCH)
    page.evaluate(RUN)
    assert ended(page)["ended"] == "success"
    panel(page).get_by_role("gridcell").first.wait_for(timeout=10 * SECONDS)


def test_the_panel_on_a_node_of_the_front_ends_new_kind(page):
    """Nodes 2.0 draws nodes as elements; the panel is the same."""
    page.evaluate("() => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
    page.wait_for_timeout(1000)
    try:
        inspected(page)
        panel(page).get_by_role("gridcell").nth(24 * 4 + 1).click()
        assert panel(page).get_by_role("img").count() == 2
        panel(page).get_by_role("gridcell").nth(24 * 4 + 1).press("ArrowRight")
        assert panel(page).get_by_role("status").inner_text().startswith("layer 2 · mlp.experts.w1")
        shot(page, "inspect-nodes-2")
    finally:
        page.evaluate("() => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', false)")
        page.wait_for_timeout(500)


# ---- the menu entry


def press_entry(page, kind: str) -> None:
    """A right click onto the first node of a kind, and a click onto the entry."""
    point = page.evaluate("""kind => {
        const node = window.app.graph.nodes.find(n => n.type === kind), canvas = window.app.canvas;
        canvas.ds.scale = 1;
        canvas.ds.offset[0] = -node.pos[0] + 600;
        canvas.ds.offset[1] = -node.pos[1] + 300;
        canvas.setDirty(true, true);
        const box = canvas.canvas.getBoundingClientRect();
        return [box.left + 600 + 60, box.top + 300 - 12];
    }""", kind)
    page.wait_for_timeout(500)
    page.mouse.click(*point, button="right")
    page.get_by_text("Generate LoRA only", exact=True).click(timeout=10 * SECONDS)


def ran(page) -> set[str]:
    """Types of the nodes that were executed."""
    return set(page.evaluate("""() => [...window.started].map(id => window.app.graph.getNodeById(id)?.type ?? id)"""))


COUNT = """() => {
    window.started = new Set();
    window.app.api.addEventListener('executing', e => { if (e.detail) window.started.add(e.detail); });
}"""


def edit_graph(page, seed: int) -> None:
    load(page, workflow("edit_one_photo"))
    page.evaluate(SMALL, 3)
    page.evaluate("""seed => {
        window.app.graph.nodes.find(n => n.type === 'HYWUConditionEncoder').widgets.find(w => w.name === 'seed').value = seed;
        for (const node of window.app.graph.nodes)
            for (const widget of node.widgets ?? []) if (widget.name === 'control_after_generate') widget.value = 'fixed';
    }""", seed)
    page.evaluate(WATCH)
    page.evaluate(COUNT)


def test_generate_lora_only_runs_what_looks_at_it(page, server):
    edit_graph(page, 101)
    press_entry(page, "HYWUWeightGenerator")
    assert ended(page)["ended"] == "success"
    assert {"HYWUWeightGenerator", "HYWUSaveLoRA"} <= ran(page)
    assert not {"HYImageSampler", "VAEDecode", "SaveImage", "PreviewAny"} & ran(page)


def test_generate_lora_only_without_anything_that_looks_at_it(page, server):
    """The LoRA is written once: the whole graph afterwards finds it in the cache."""
    edit_graph(page, 102)
    page.evaluate("""() => {
        for (const node of window.app.graph.nodes.filter(n => n.type === 'HYWUSaveLoRA')) window.app.graph.remove(node);
    }""")
    count = page.evaluate("() => window.app.graph.nodes.length")
    press_entry(page, "HYWUWeightGenerator")
    assert ended(page)["ended"] == "success"
    assert "HYWUWeightGenerator" in ran(page) and "HYImageSampler" not in ran(page)
    assert page.evaluate("() => window.app.graph.nodes.length") == count and alerts(page) == []
    page.evaluate("() => { window.seen.ended = null; window.started.clear(); }")
    page.evaluate(RUN)
    assert ended(page)["ended"] == "success"
    assert "HYImageSampler" in ran(page) and "HYWUWeightGenerator" not in ran(page)


def test_nodes_without_a_lora_have_no_such_entry(page):
    load(page, workflow("edit_one_photo"))
    entries = """kind => window.app.collectNodeMenuItems(window.app.graph.nodes.find(n => n.type === kind))
        .filter(entry => entry?.content === 'Generate LoRA only').length"""
    assert page.evaluate(entries, "HYWUWeightGenerator") == 1
    assert page.evaluate(entries, "HYImageSampler") == 0 and page.evaluate(entries, "LoadImage") == 0


# ---- the templates


SMALL_LORA = """shared => {
    const set = (type, values) => {
        for (const node of window.app.graph.nodes.filter(n => n.type === type))
            for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value;
    };
    set('HYWULoRAAB', {steps: 2, size: '1:1'});
    set('HYWUMapLoRAs', {folder: 'templates'});
    set('HYWULoadLoRAs', {folder: 'templates'});
    set('HYWUImportLoRA', {folder: shared});
}"""


@pytest.fixture(scope="module")
def one_page(browser, server):
    """A page for all templates: opening one takes longer than running a graph."""
    server.post("/settings", {"Comfy.ColorPalette": "dark", "Comfy.Locale": "en"})
    opened = open_page(browser, server)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", LORA_NAMES)
def test_a_template_runs_from_the_browser(one_page, server, shared, name):
    server.forget()
    load(one_page, workflow(name))
    one_page.evaluate(SMALL, 3)
    one_page.evaluate(SMALL_LORA, shared)
    one_page.evaluate(WATCH)
    fit_view(one_page)
    one_page.evaluate(RUN)
    assert ended(one_page)["ended"] == "success"
    one_page.wait_for_function(PICTURES, timeout=30 * SECONDS)
    one_page.wait_for_timeout(500)
    assert alerts(one_page) == [] and one_page.evaluate(OVERLAPS) == []
    shot(one_page, name)


def test_the_template_browser_shows_and_opens_them(one_page):
    one_page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    one_page.get_by_text("ComfyUI-HYWU", exact=True).click(timeout=30 * SECONDS)
    card = "[data-testid=template-workflow-{}]"
    for name in (*NAMES, *LORA_NAMES):
        one_page.locator(card.format(name)).scroll_into_view_if_needed(timeout=20 * SECONDS)
        # Our own thumbnail, not the front end's stand-in.
        one_page.wait_for_function(
            "card => [...document.querySelectorAll(`${card} img`)].some(i => i.naturalWidth === 640)",
            arg=card.format(name), timeout=20 * SECONDS)
    shot(one_page, "templates")
    one_page.locator(card.format("mask_lora")).click()
    one_page.wait_for_function("() => window.app.graph.nodes.some(n => n.type === 'HYWUMaskLoRA')", timeout=20 * SECONDS)
    assert one_page.evaluate("() => window.app.graph.nodes.length") == len(workflow("mask_lora")["nodes"])
    one_page.wait_for_timeout(500)
    assert alerts(one_page) == []


# ---- languages and help


def open_help(page, kind: str) -> None:
    """A click onto the first node of a kind, and onto (i) of what opens above it."""
    fit_view(page)
    point = page.evaluate("""kind => {
        const node = window.app.graph.nodes.find(n => n.type === kind), {ds, canvas} = window.app.canvas;
        const box = canvas.getBoundingClientRect(), [x, y] = [node.pos[0] + 60, node.pos[1] - 14];
        return [box.left + (x + ds.offset[0]) * ds.scale, box.top + (y + ds.offset[1]) * ds.scale];
    }""", kind)
    page.mouse.click(*point)
    page.locator("[data-testid=info-button]").click(timeout=20 * SECONDS)
    page.locator(".node-help-content img").wait_for(timeout=20 * SECONDS)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_names_and_help_are_in_the_front_ends_language(browser, server, language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    server.post("/settings", {"Comfy.ColorPalette": "dark", "Comfy.Locale": language})
    page = open_page(browser, server)
    try:
        load(page, workflow("mask_lora"))
        titles = page.evaluate("() => window.app.graph.nodes.filter(n => /^HY/.test(n.type)).map(n => [n.type, n.title])")
        assert titles and all(title == texts[kind]["display_name"] for kind, title in titles)
        labels = page.evaluate("""() => {
            const node = window.app.graph.nodes.find(n => n.type === 'HYWUMaskLoRA');
            const shown = slot => slot.label || slot.localized_name || slot.name;
            return [shown(node.inputs.find(i => i.name === 'lora')), shown(node.outputs[0]),
                    node.widgets.find(w => w.name === 'invert').label];
        }""")
        mask = texts["HYWUMaskLoRA"]
        assert labels == [mask["inputs"]["lora"]["name"], mask["outputs"]["0"]["name"], mask["inputs"]["invert"]["name"]]
        open_help(page, "HYWUMaskLoRA")
        help_page = page.locator(".node-help-content")
        assert ("掩码" in help_page.inner_text()) == (language == "zh")
        page.wait_for_function(
            "() => document.querySelector('.node-help-content img').naturalWidth > 100", timeout=20 * SECONDS)
        shot(page, f"help-{language}")
    finally:
        page.close()
        server.post("/settings", {"Comfy.Locale": "en"})
