// The panel on HY-WU Inspect LoRA: a heat map of layers and projections to walk through, and what a chosen cell consists of.
//
// Owns the panel's elements and its keys; the numbers come with the node's "executed" message (lora/report.py: panel_data). Texts
// from a LoRA, such as its instruction, are only ever set as text.

import { app } from "../../scripts/app.js";
import { viridis } from "./colours.js";
import { words } from "./words.js";

const NODE = "HYWUInspectLoRA";
const KEY = "hywu_inspect";
const SIZE = [600, 620];

const text = words({
  empty: ["Run the graph to look into the LoRA.", "运行工作流以查看此 LoRA。"],
  grid: ["Norm of the update by projection and layer", "各投影、各层更新量的范数"],
  relative: ["update ÷ weight", "更新量 ÷ 权重"],
  absolute: ["norm of the update", "更新量的范数"],
  cell: ["layer {0} · {1}: norm {2}", "第 {0} 层 · {1}：范数 {2}"],
  against: [", {0} of its weight", "，为权重的 {0}"],
  rank: [", effective rank {0} of {1}", "，有效秩 {0} / {1}"],
  values: ["Singular values (logarithmic)", "奇异值（对数）"],
  value: ["singular value {0}: {1}", "第 {0} 个奇异值：{1}"],
  experts: ["Norm of each expert's update", "各专家更新量的范数"],
  routed: ["Norm of each expert's update, and its share of the tokens (dots)", "各专家更新量的范数及其 token 占比（圆点）"],
  expert: ["expert {0}: norm {1}", "专家 {0}：范数 {1}"],
  share: [", {0} of the tokens", "，token 占比 {0}"],
  help: [
    "Arrow keys move, Enter shows a cell's singular values and experts.",
    "方向键移动，回车显示该单元格的奇异值和专家。",
  ],
  layer: ["layer", "层"],
});

const STYLE = `
.hywu-inspect { display: flex; flex-direction: column; gap: 6px; box-sizing: border-box; height: 100%; padding: 8px; overflow: auto;
  font: 12px/1.35 sans-serif; color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222);
  border: 1px solid var(--border-color, #4e4e4e); border-radius: 6px; }
.hywu-inspect p { margin: 0; }
.hywu-inspect .quiet { color: var(--descrip-text, #999); }
.hywu-inspect .said { min-height: 1.4em; }
.hywu-inspect .cut { white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.hywu-inspect [role=row] { display: flex; align-items: center; gap: 1px; margin-bottom: 1px; }
.hywu-inspect [role=rowheader] { flex: 0 0 15em; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; direction: rtl;
  text-align: right; padding-right: 6px; }
.hywu-inspect [role=columnheader] { flex: 1 1 0; min-width: 4px; text-align: center; font-size: 9px; color: var(--descrip-text, #999);
  overflow: visible; white-space: nowrap; }
.hywu-inspect [role=gridcell] { flex: 1 1 0; min-width: 4px; height: 18px; cursor: pointer; border-radius: 1px; }
.hywu-inspect [role=gridcell]:focus { outline: 2px solid var(--input-text, #fff); outline-offset: 0; position: relative; }
.hywu-inspect [role=gridcell][aria-selected=true] { box-shadow: inset 0 0 0 2px #d55e00; }
.hywu-inspect .legend { display: flex; align-items: center; gap: 6px; }
.hywu-inspect .legend i { flex: 0 0 160px; height: 9px; border-radius: 2px; }
.hywu-inspect .bars { position: relative; display: flex; align-items: flex-end; gap: 1px; height: 72px;
  border-bottom: 1px solid var(--border-color, #4e4e4e); }
.hywu-inspect .bars > span { position: relative; flex: 1 1 0; min-width: 2px; height: 100%; }
.hywu-inspect .bars b { position: absolute; left: 0; right: 0; bottom: 0; background: #3d8fc4; border-radius: 1px 1px 0 0; }
.hywu-inspect .bars em { position: absolute; left: calc(50% - 3px); width: 6px; height: 6px; border-radius: 50%;
  background: #ffc94d; box-shadow: 0 0 0 1px #333; }
.hywu-inspect .bars > span:hover b { background: #d55e00; }
`;

function element(tag, attributes = {}, content = "") {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (content !== "") made.textContent = content;
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${Number((100 * value).toPrecision(3))} %`;
}

/** One panel: an element, and ``show(data)`` for what a run sends. */
class Panel {
  constructor() {
    this.element = element("div", { class: "hywu-inspect" });
    this.clear();
    // The canvas listens on the page: without this, Delete would delete the node.
    for (const kind of ["keydown", "keyup"]) this.element.addEventListener(kind, (event) => this.keep(event));
    this.element.addEventListener("wheel", (event) => {
      const scrolls = this.element.scrollHeight > this.element.clientHeight;
      if (scrolls && !event.ctrlKey) event.stopPropagation();
    });
  }

  keep(event) {
    if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
  }

  clear() {
    this.data = null;
    this.element.replaceChildren(element("p", { class: "quiet" }, text("empty")));
  }

  show(data) {
    this.data = data;
    this.active = this.selected ?? { row: 0, column: 0 };
    if (this.active.row >= data.targets.length || this.active.column >= data.layers) this.active = { row: 0, column: 0 };
    this.said = element("p", { class: "said", role: "status" });
    this.detail = element("div");
    this.cells = [];
    const parts = [];
    if (data.instruction) parts.push(element("p", { class: "cut", title: data.instruction }, data.instruction));
    parts.push(this.grid(), this.legend(), this.said, this.detail, element("p", { class: "quiet" }, text("help")));
    this.element.replaceChildren(...parts);
    this.say(this.active);
    this.mark(this.active, false);
    if (this.selected) this.select(this.active);
  }

  shown() {
    return this.data.relative ?? this.data.norms;
  }

  grid() {
    const { targets, layers } = this.data;
    const values = this.shown().flat().filter((value) => value !== null);
    this.most = Math.max(...values, 0);
    const grid = element("div", {
      role: "grid", "aria-label": text("grid"), "aria-rowcount": targets.length + 1, "aria-colcount": layers + 1 });
    targets.forEach((target, row) => {
      const line = element("div", { role: "row" });
      line.append(element("span", { role: "rowheader", title: target.name }, `\u200e${target.name}\u200e`));
      this.cells.push([]);
      for (let column = 0; column < layers; column++) {
        const cell = element("span", { role: "gridcell", tabindex: -1, "aria-label": this.describe({ row, column }) });
        const value = this.shown()[column][row];
        cell.style.background = value === null ? "transparent" : viridis(this.most ? value / this.most : 0);
        cell.addEventListener("pointerenter", () => this.say({ row, column }));
        cell.addEventListener("pointerleave", () => this.say(this.active));
        cell.addEventListener("focus", () => this.mark({ row, column }, false));
        cell.addEventListener("click", () => this.select({ row, column }));
        cell.addEventListener("keydown", (event) => this.key(event, { row, column }));
        this.cells[row].push(cell);
        line.append(cell);
      }
      grid.append(line);
    });
    const names = element("div", { role: "row" });
    names.append(element("span", { role: "rowheader", class: "quiet" }, text("layer")));
    const every = Math.ceil(layers / 16);
    for (let column = 0; column < layers; column++)
      names.append(element("span", { role: "columnheader" }, column % every ? "\u00a0" : String(column)));
    grid.append(names);
    return grid;
  }

  legend() {
    const line = element("div", { class: "legend quiet" });
    const bar = element("i");
    const steps = [0, 0.25, 0.5, 0.75, 1].map((share) => viridis(share));
    bar.style.background = `linear-gradient(to right, ${steps.join(", ")})`;
    const relative = this.data.relative !== null;
    const most = relative ? percent(this.most) : number(this.most);
    line.append(element("span", {}, "0"), bar, element("span", {}, `${most}  ${text(relative ? "relative" : "absolute")}`));
    return line;
  }

  describe({ row, column }) {
    const { data } = this;
    let said = text("cell", column, data.targets[row].name, number(data.norms[column][row]));
    if (data.relative) said += text("against", percent(data.relative[column][row]));
    return said + text("rank", number(data.ranks[column][row]), data.rank);
  }

  say(place) {
    this.said.textContent = this.describe(place);
  }

  /** The one cell that Tab comes to. */
  mark(place, focus) {
    this.cells[this.active.row][this.active.column].tabIndex = -1;
    this.active = place;
    const cell = this.cells[place.row][place.column];
    cell.tabIndex = 0;
    this.say(place);
    if (focus) cell.focus({ preventScroll: true });
  }

  key(event, { row, column }) {
    const rows = this.data.targets.length - 1;
    const columns = this.data.layers - 1;
    const to = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, columns], PageUp: [0, column], PageDown: [rows, column],
    }[event.key];
    if (to) {
      event.preventDefault();
      this.mark({ row: Math.min(rows, Math.max(0, to[0])), column: Math.min(columns, Math.max(0, to[1])) }, true);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.select({ row, column });
    }
  }

  select(place) {
    if (this.selected && this.cells[this.selected.row]?.[this.selected.column])
      this.cells[this.selected.row][this.selected.column].removeAttribute("aria-selected");
    this.mark(place, false);
    this.selected = place;
    const { row, column } = place;
    this.cells[row][column].setAttribute("aria-selected", "true");
    const { data } = this;
    const parts = [element("p", {}, this.describe(place))];
    const values = data.spectra[column][row];
    parts.push(this.bars(text("values"), values, logarithmic(values), (index) => text("value", index + 1, number(values[index]))));
    const norms = data.experts[String(row)]?.[column];
    if (norms) {
      const counts = data.routing?.[column];
      const all = counts?.reduce((sum, count) => sum + count, 0);
      const shares = all ? counts.map((count) => count / all) : null;
      const most = Math.max(...norms.map((norm) => norm ?? 0)) || 1;
      parts.push(this.bars(text(shares ? "routed" : "experts"), norms, norms.map((norm) => (norm ?? 0) / most), (index) =>
        text("expert", index, number(norms[index])) + (shares ? text("share", percent(shares[index])) : ""), shares));
    }
    this.detail.replaceChildren(...parts);
  }

  /** A row of bars under a title; hovering one says its number. */
  bars(title, values, heights, say, dots = null) {
    const figure = element("div", { role: "img", "aria-label": `${title}: ${values.map((value) => number(value)).join(", ")}` });
    const row = element("div", { class: "bars" });
    const most = dots ? Math.max(...dots) || 1 : 1;
    values.forEach((value, index) => {
      const place = element("span", { title: say(index) });
      const bar = element("b");
      bar.style.height = `${Math.max(heights[index], 0.01) * 100}%`;
      place.append(bar);
      if (dots) {
        const dot = element("em");
        dot.style.bottom = `calc(${(dots[index] / most) * 100}% - 3px)`;
        place.append(dot);
      }
      place.addEventListener("pointerenter", () => { this.said.textContent = say(index); });
      row.append(place);
    });
    figure.append(element("p", { class: "quiet" }, title), row);
    return figure;
  }
}

/** Heights 0..1 by logarithm, the smallest shown five decades below the largest. */
function logarithmic(values) {
  const there = values.filter((value) => value > 0);
  if (!there.length) return values.map(() => 0);
  const high = Math.log10(Math.max(...there));
  const low = Math.max(Math.log10(Math.min(...there)) - 0.2, high - 5);
  return values.map((value) => (value > 0 ? Math.max(0, (Math.log10(value) - low) / (high - low)) : 0));
}

function received(node, output) {
  const sent = output?.[KEY]?.[0];
  if (sent && node.hywuPanel && node.hywuShown !== sent) {
    node.hywuShown = sent;
    node.hywuPanel.show(JSON.parse(sent));
  }
}

app.registerExtension({
  name: "HYWU.InspectLoRA",
  init() {
    document.head.append(element("style", {}, STYLE));
  },
  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    node.hywuPanel = new Panel();
    const widget = node.addDOMWidget(KEY, "HYWU_INSPECT", node.hywuPanel.element, {
      serialize: false, getMinHeight: () => 440, getValue: () => "", setValue: () => {} });
    widget.serialize = false; // nor into the workflow's file
    const before = node.onExecuted;
    node.onExecuted = function (output) {
      before?.apply(this, arguments);
      received(node, output);
    };
    node.setSize([Math.max(node.size[0], SIZE[0]), Math.max(node.size[1], SIZE[1])]);
  },
  // Another tab and back, undo, a run from the history: the nodes are new, the front end kept what they had sent.
  onNodeOutputsUpdated(outputs) {
    for (const node of app.graph?.nodes ?? []) if (node.comfyClass === NODE) received(node, outputs?.[String(node.id)]);
  },
});
