// The colour map of the pack's pictures (hywu_core/lora/drawing.py), for the panel.

const VIRIDIS = ["440154", "472d7b", "3b528b", "2c728e", "21918c", "28ae80", "5ec962", "addc30", "fde725"];

/** 0..1 -> "rgb(r, g, b)", dark to light. */
export function viridis(share) {
  const place = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(place));
  const channel = (index, at) => parseInt(VIRIDIS[index].slice(at, at + 2), 16);
  const mixed = [0, 2, 4].map((at) => Math.round(channel(low, at) + (place - low) * (channel(low + 1, at) - channel(low, at))));
  return `rgb(${mixed.join(", ")})`;
}
