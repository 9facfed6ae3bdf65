// Names and tooltips of the pack's nodes in the front end's language, from locales/.
//
// Front ends that load their own languages late (1.30 and after) lay them over those of the packs, and the packs' are gone; here
// they are put in where the nodes are defined and made. Where the front end kept them, nothing changes.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

let texts = {};

app.registerExtension({
  name: "HYWU.Names",

  async addCustomNodeDefs(defs) {
    const locale = String(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en");
    if (locale.startsWith("en")) return;
    const all = (await (await api.fetchApi("/i18n")).json())[locale]?.nodeDefs ?? {};
    texts = Object.fromEntries(Object.entries(all).filter(([id]) => defs[id]?.category?.startsWith("HY-WU")));
    for (const [id, text] of Object.entries(texts)) {
      const def = defs[id];
      def.display_name = text.display_name ?? def.display_name;
      def.description = text.description ?? def.description;
      for (const [name, spec] of Object.entries({ ...def.input?.required, ...def.input?.optional }))
        if (spec[1] && text.inputs?.[name]?.tooltip) spec[1].tooltip = text.inputs[name].tooltip;
      def.output_tooltips = def.output_tooltips?.map((tooltip, slot) => text.outputs?.[slot]?.tooltip ?? tooltip);
    }
  },

  nodeCreated(node) {
    const text = texts[node.comfyClass];
    if (!text) return;
    for (const input of node.inputs ?? []) input.localized_name = text.inputs?.[input.name]?.name ?? input.localized_name;
    (node.outputs ?? []).forEach((output, slot) => {
      output.localized_name = text.outputs?.[slot]?.name ?? output.localized_name;
    });
    for (const widget of node.widgets ?? []) widget.label = text.inputs?.[widget.name]?.name ?? widget.label;
  },
});
