// The language of the pack's own texts: Chinese where the front end is set to it, else English.

import { app } from "../../scripts/app.js";

/** Whether the front end speaks Chinese, asked anew each time: the setting may change. */
export function speaksChinese() {
  const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
  return String(locale).toLowerCase().startsWith("zh");
}

/** words(table)("key", values...) -> the text, its {0}, {1} ... replaced. table: {key: [English, Chinese]}. */
export function words(table) {
  return (key, ...values) =>
    table[key][speaksChinese() ? 1 : 0].replace(/\{(\d)\}/g, (_, index) => String(values[Number(index)]));
}
