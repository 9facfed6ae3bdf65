// "Generate LoRA only" in the menu of every node that gives a LoRA: the graph runs as far as this node and no further.
//
// ComfyUI starts from output nodes, and a node that only writes a LoRA is none. So what runs is what looks at this LoRA alone:
// its Save and Inspect nodes if there are any, else an Inspect node that is added to the queued prompt and not to the graph. The
// LoRA stays in ComfyUI's cache: running the whole graph afterwards does not write it again.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { words } from "./words.js";

const LORA = "HYWU_LORA";
const LOOKING = ["HYWUSaveLoRA", "HYWUInspectLoRA"];
const ADDED = "hywu-generate-only"; // the id of the added node, which no node of a graph can have

const text = words({
  entry: ["Generate LoRA only", "仅生成 LoRA"],
  queued: ["Queued: this LoRA only", "已排队：仅此 LoRA"],
  refused: ["This LoRA cannot be generated yet", "还不能生成此 LoRA"],
});

/** Every node of a prompt that ``id`` needs, itself among them. */
function needed(prompt, id, found = new Set()) {
  if (found.has(id) || !prompt[id]) return found;
  found.add(id);
  for (const value of Object.values(prompt[id].inputs)) if (Array.isArray(value)) needed(prompt, String(value[0]), found);
  return found;
}

/** The Save and Inspect nodes that need nothing beyond what the LoRA's node needs. */
function lookers(prompt, id) {
  const upstream = needed(prompt, id);
  return Object.keys(prompt).filter(
    (other) =>
      LOOKING.includes(prompt[other].class_type) &&
      needed(prompt, other).has(id) &&
      [...needed(prompt, other)].every((each) => each === other || upstream.has(each)),
  );
}

async function generateOnly(node, slot) {
  const id = String(node.id);
  const prompt = await app.graphToPrompt();
  if (!prompt.output[id]) return say("warn", text("refused")); // muted or bypassed
  const targets = lookers(prompt.output, id);
  if (targets.length) {
    // As the front end's own button, so seeds move on after it as they always do.
    if (await app.queuePrompt(0, 1, targets)) say("info", text("queued"));
    return;
  }
  prompt.output[ADDED] = { class_type: "HYWUInspectLoRA", inputs: { lora: [id, slot] }, _meta: { title: text("entry") } };
  try {
    await api.queuePrompt(0, prompt, { partialExecutionTargets: [ADDED] });
    say("info", text("queued"));
  } catch (error) {
    say("error", text("refused"), error?.response?.error?.message ?? String(error?.message ?? error));
  }
}

function say(severity, summary, detail = "") {
  app.extensionManager.toast.add({ severity, summary, detail, life: 4000 });
}

app.registerExtension({
  name: "HYWU.GenerateOnly",
  getNodeMenuItems(node) {
    const slot = (node.outputs ?? []).findIndex((output) => output.type === LORA);
    // Inside a subgraph ids are paths that the prompt has otherwise; there the graph's own button has to do.
    if (slot < 0 || node.graph !== app.graph) return [];
    return [null, { content: text("entry"), callback: () => generateOnly(node, slot) }];
  },
});
