"""``results/ablation.json`` as a page: ``docs/ablation.md`` with tables and what holds, and three plots beside it.

Owns presentation only; ``ablation.py`` measures. ``python -m comfyui_hywu.benchmarks.ablation_report`` writes it again.
"""

import json
from pathlib import Path

import numpy as np

from .record import RESULTS

DOCS = Path(__file__).resolve().parent.parent / "docs"
OPPOSITE = (("brighten", "darken"), ("warm", "cool"), ("gray", "saturate"), ("blur", "sharpen"), ("contrast", "fade"),
            ("green", "pink"))


def means(scores: dict, what: str = "psnr") -> dict[str, float]:
    """edit -> mean over the cases."""
    return {edit: float(np.mean(row[what])) for edit, row in scores.items()}


def overall(scores: dict, what: str = "psnr") -> float:
    """Mean over the edits of their means."""
    return float(np.mean(list(means(scores, what).values())))


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def claims(data: dict, long: dict | None) -> list[tuple[str, bool, str]]:
    """What was to be shown, whether it holds for the bundled checkpoint (or, where trained twins are needed, the seeds).

    long: what ``ablation_long.py`` found, if it was run.
    """
    bundled, seeds = data["bundled"], data["seeds"]
    hywu, ceiling = means(bundled["e HY-WU"]), means(bundled["z VAE of the true edit"])
    base = overall(bundled["b frozen base"])
    near = [edit for edit in hywu if hywu[edit] >= ceiling[edit] - 4]
    shuffled, mean = overall(bundled["f another request's LoRA"]), overall(bundled["g mean LoRA"])
    other = means(bundled["h another photo's LoRA"])
    losses = {edit: hywu[edit] - other[edit] for edit in data["by_photo"]}
    thought, phrased = (float(np.mean(list(data[key].values()))) for key in ("thinking", "phrasings"))
    found = [
        ("HY-WU within 4 dB of the VAE's ceiling for at least 9 edits", len(near) >= 9,
         f"{len(near)} of {len(hywu)}: " + ", ".join(near)),
        ("another request's LoRA at or below the frozen base + 1 dB", shuffled <= base + 1,
         f"{shuffled:.2f} against {base:.2f}"),
        ("the mean LoRA at or below the frozen base + 1 dB", mean <= base + 1, f"{mean:.2f} against {base:.2f}"),
        ("another photo's LoRA loses at least 1 dB on every edit that depends on the photo",
         all(loss >= 1 for loss in losses.values()), ", ".join(f"{edit} {loss:.1f}" for edit, loss in losses.items())),
        ("thinking names the edit in at least 95 % of all held-out phrasings (8 English, 5 Chinese an edit)", phrased >= 0.95,
         f"{100 * phrased:.1f} %; in the cases below {100 * thought:.1f} %"),
    ]
    if seeds:
        gains = [overall(each["e HY-WU"]) - overall(each["c one static LoRA"]) for each in seeds]
        steps = data["recipe"]["generator_stage"]["steps"]
        found.insert(1, (f"HY-WU at least 1.5 dB above one static LoRA, both after {steps:,} steps (mean over seeds)",
                         float(np.mean(gains)) >= 1.5, f"{spread(gains)} dB"))
    for name, arm in (long or {"arms": {}})["arms"].items():
        gain = overall(bundled["e HY-WU"]) - overall(arm["scores"])
        found.insert(1, (f"the bundled HY-WU ({long['steps']:,} steps) at least 1.5 dB above {name[2:]} after "
                         f"{arm['steps']:,} of them (one seed)", gain >= 1.5,
                         f"{overall(bundled['e HY-WU']):.2f} against {overall(arm['scores']):.2f}: {gain:+.2f} dB"))
    return found


def report(path: Path) -> str:
    """Write the page and the plots; returns the page."""
    data = json.loads(path.read_text())
    bundled, seeds, asked = data["bundled"], data["seeds"], data["asked"]
    beside = path.with_name("ablation-long.json")
    long = json.loads(beside.read_text()) if beside.is_file() else None
    lines = [
        "# The paper's experiments on hywu-mini", "",
        f"Made by `python -m comfyui_hywu.benchmarks.ablation --seeds {asked['seeds']} --every {asked['every']}` on "
        f"{data['machine']['cores']} cores; its last process, going on where others stopped, took {data['minutes']} minutes.",
        f"{len(data['cases'])} cases: held-out views of scikit-image's photos x {len(data['edits'])} edits, held-out phrasings",
        "(a third of them Chinese), thinking by the model itself, PSNR in dB against the true edit.", "",
        "## What holds", "", "| claim | holds | measured |", "| --- | --- | --- |"]
    lines += [f"| {what} | {'yes' if holds else '**no**'} | {measured} |" for what, holds, measured in claims(data, long)]
    if long:
        bundled = bundled | {f"{name}, {arm['steps']:,} steps": arm["scores"] for name, arm in long["arms"].items()}
    names = sorted(bundled)
    lines += ["", "## The bundled checkpoint, edit by edit", "",
              "| edit | " + " | ".join(names) + " | phrasings understood |", "| --- |" + " --- |" * (len(names) + 1)]
    tables = {name: means(bundled[name]) for name in names}
    for edit in data["edits"]:
        cells = [f"{tables[name][edit]:.1f}" for name in names]
        lines.append(f"| {edit} | " + " | ".join(cells) + f" | {100 * data['phrasings'][edit]:.0f} % |")
    for what in ("psnr", "ssim"):
        cells = [f"**{overall(bundled[name], what):.{2 if what == 'psnr' else 3}f}**" for name in names]
        lines.append(f"| mean {what.upper()} | " + " | ".join(cells) + " | |")
    if seeds:
        stage = data["recipe"]["generator_stage"]
        lines += ["", f"## Trained alike: {stage['steps']} steps of {stage['batch']}, {len(seeds)} seeds, the bundled base", "",
                  "| variant | PSNR | SSIM |", "| --- | --- | --- |"]
        for name in sorted(seeds[0]):
            digits = [spread([overall(each[name], what) for each in seeds]) for what in ("psnr", "ssim")]
            lines.append(f"| {name} | {digits[0]} | {digits[1]} |")
        lines += ["", "Mean and standard deviation over seeds of the mean over edits. The bundled checkpoint had more steps: "
                  "(c) and (d) trained as long as it are in the table above if they are measured "
                  "(`python -m comfyui_hywu.benchmarks.ablation_long`); `docs/training.md` says what follows."]
    if "gradients" in data:
        lines += ["", "## Do the tasks pull one shared LoRA apart?", "",
                  "Cosine between the gradients of opposite edits on the static LoRA (same photos, same noise):", "",
                  "| pair | at its start | trained |", "| --- | --- | --- |"]
        order = data["edits"]
        for one, two in OPPOSITE:
            if one in order and two in order:
                cosines = [data["gradients"][when][order.index(one)][order.index(two)] for when in ("start", "trained")]
                lines.append(f"| {one} / {two} | {cosines[0]:+.2f} | {cosines[1]:+.2f} |")
        lines += ["", "![cosines of all pairs](ablation-gradients.png)"]
    else:
        lines += ["", "Not in this run (`--seeds 0`): a shared static LoRA and full fine-tuning, trained alike, several seeds."]
    lines += ["", "## Where the written LoRAs lie", "", "![the bundled checkpoint's LoRAs in two dimensions](ablation-map.png)",
              "", "Every dot is the LoRA of one request, in the first two principal components of all of them.", ""]
    _plots(data)
    page = "\n".join(lines)
    (DOCS / "ablation.md").write_text(page, encoding="utf-8")
    return page


def _plots(data: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edits = data["edits"]
    if "gradients" in data:
        figure, axes = pyplot.subplots(1, 2, figsize=(13, 6.2), layout="constrained")
        for axis, when in zip(axes, ("start", "trained"), strict=True):
            shown = axis.imshow(data["gradients"][when], vmin=-1, vmax=1, cmap="RdBu_r")
            axis.set_xticks(range(len(edits)), edits, rotation=90)
            axis.set_yticks(range(len(edits)), edits)
            axis.set_title(f"gradient cosines on the shared LoRA: {when}")
        figure.colorbar(shown, ax=axes, shrink=0.7)
        figure.savefig(DOCS / "ablation-gradients.png", dpi=80)
        pyplot.close(figure)
    figure, axis = pyplot.subplots(figsize=(9, 7), layout="constrained")
    points = np.array(data["map"])
    colours = pyplot.get_cmap("tab20")
    of = [case[1] for case in data["cases"]]
    for number, edit in enumerate(edits):
        rows = [row for row, name in enumerate(of) if name == edit]
        marker = "*" if edit in data["by_photo"] else "o"
        axis.scatter(points[rows, 0], points[rows, 1], color=colours(number % 20), marker=marker, label=edit, s=45)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, title="stars: depends on the photo")
    axis.set_title("LoRAs written for held-out requests")
    figure.savefig(DOCS / "ablation-map.png", dpi=80)
    pyplot.close(figure)


if __name__ == "__main__":
    print(report(RESULTS / "ablation.json"))
