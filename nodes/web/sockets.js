// The colours of the pack's four sockets and their links, in the graph and in Vue nodes.
//
// The front end keeps colours by type and empties those that the active palette does not name whenever a palette is loaded, so
// ours are put back then. A palette that names them wins.

import { app } from "../../scripts/app.js";

// Told apart by any colour vision, on dark and light nodes; none of ComfyUI's own.
const COLOURS = {
  HYWU_MODEL: "#8f7cf0",
  HYWU_GENERATOR: "#1fb8a6",
  HYWU_CONDITION: "#e69138",
  HYWU_LORA: "#d64f8f",
};

function paint() {
  const links = app.canvas?.constructor?.link_type_colors;
  const slots = app.canvas?.default_connection_color_byType;
  if (!links || !slots) return;
  for (const [type, colour] of Object.entries(COLOURS)) {
    links[type] ||= colour;
    slots[type] ||= colour;
    const name = `--color-datatype-${type}`;
    if (!document.body.style.getPropertyValue(name)) document.body.style.setProperty(name, colour);
  }
  app.canvas.setDirty(true, true);
}

app.registerExtension({
  name: "HYWU.Sockets",
  setup() {
    paint();
    // Loading a palette sets the style of the page's root at its end, whoever asked for it.
    new MutationObserver(paint).observe(document.documentElement, { attributes: true, attributeFilter: ["style"] });
  },
});
