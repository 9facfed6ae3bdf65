"""The paper's experiments on the small checkpoint: ``make ablation`` makes ``results/ablation.json`` and ``docs/ablation.md``.

Held-out photos (scikit-image's) x held-out phrasings, thinking by the frozen base itself: PSNR and SSIM of (a) the source
unchanged, (b) the frozen base, (c) one shared static LoRA, (d) full fine-tuning, (e) HY-WU, (f) HY-WU with the LoRA of another
request, (g) the mean of HY-WU's LoRAs, (h) the LoRA of another photo for the same edit, and (z) the VAE's reconstruction of the
true edit, which is the ceiling. (c), (d) and (e) are trained on the bundled base for the same steps and batches, several seeds.
What is measured is kept in the run's folder: a killed run goes on from there.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..hywu_core.cli import BUNDLED
from ..hywu_core.config import GeneratorConfig
from ..hywu_core.generator.handle import GeneratorHandle, load_generator
from ..hywu_core.handle import ModelHandle, load_model
from ..hywu_core.lora.algebra import mean as mean_of
from ..hywu_core.progress import Tick
from ..hywu_core.terminal import Terminal
from ..hywu_core.training import baselines, evaluate
from ..hywu_core.training.edits import EDITS
from ..hywu_core.training.generator_stage import new_generator, train_generator
from ..hywu_core.training.recipe import Recipe, generator_config
from ..hywu_core.training.run import Run, prepare
from ..hywu_core.vision.buckets import Buckets
from .ablation_report import report
from .record import RESULTS, machine

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")
STEPS = 2  # denoise steps; more change nothing
STATIC, FULL = "c one static LoRA", "d full fine-tuning"


def held_out_photos() -> list[Path]:
    """Public-domain and CC0 photos inside the scikit-image package, none of which was trained on."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [folder / name for name in PHOTOS]


def config_of(recipe: Recipe) -> GeneratorConfig:
    """Of a recipe's generator, and so of a static LoRA in its place."""
    return GeneratorConfig.from_dict(generator_config(recipe.sizes, recipe.generator))


def train_seed(run: Run, model: ModelHandle, recipe: Recipe, folder: Path):
    """(e) a generator, (c) a static LoRA and (d) a fine-tuned copy of the base, for the same steps."""
    folder.mkdir(parents=True, exist_ok=True)
    full_precision = torch.autocast("cpu", enabled=False)
    generator, config = new_generator(recipe, model.backbone, run.train)
    train_generator(model.backbone, generator, config, run.train, run.held_out, recipe, folder, full_precision,
                    Terminal(f"HY-WU {recipe.seed}"))
    handle = GeneratorHandle(generator.eval().requires_grad_(False), config, f"ablation-{recipe.seed}")
    parameters = baselines.train_static(
        model.backbone, config, run.train, recipe.generator_stage, recipe.seed, folder, Terminal(f"static {recipe.seed}"))
    return handle, parameters, fine_tuned(run, model, recipe, folder, Terminal(f"full {recipe.seed}"))


def fine_tuned(run: Run, model: ModelHandle, recipe: Recipe, folder: Path, on_tick: Tick) -> ModelHandle:
    """(d) a copy of the base, trained at half the rate."""
    tuned = copy.deepcopy(model.backbone)
    settings = replace(recipe.generator_stage, rate=recipe.generator_stage.rate / 2)
    baselines.train_full(tuned, run.train, settings, recipe.seed, folder, on_tick)
    return replace(model, backbone=tuned.requires_grad_(False))


def arm_of_static(model: ModelHandle, asked: list, parameters: dict, config: GeneratorConfig) -> tuple:
    """(c) as ``evaluate.paint`` takes it: a model, the cases, a LoRA for each."""
    return model, asked, [baselines.static_lora(parameters, config)] * len(asked)


def arm_of_tuned(tuned: ModelHandle, asked: list) -> tuple:
    """(d) likewise; its conditions are its own."""
    again = [replace(each, condition=evaluate.encode(tuned, each.case.pictures, each.case.instruction, each.thinking))
             for each in asked]
    return tuned, again, [None] * len(asked)


def measure(model: ModelHandle, asked: list, generator: GeneratorHandle) -> tuple[dict, list]:
    """Scores of the variants that HY-WU's own LoRAs make, and these LoRAs."""
    loras = evaluate.written(generator, asked)
    mean = mean_of(loras)
    variants = {
        "e HY-WU": loras,
        "f another request's LoRA": evaluate.shuffled(asked, loras),
        "g mean LoRA": [mean] * len(asked),
        "h another photo's LoRA": evaluate.of_another_photo(asked, loras),
    }
    made = {}
    for name, chosen in variants.items():
        painted = evaluate.paint(model, asked, chosen, steps=STEPS, on_tick=Terminal(name))
        made[name] = evaluate.scores(asked, painted)
    return made, loras


def gradients(run: Run, model: ModelHandle, recipe: Recipe, trained: dict) -> dict[str, list]:
    """Cosines between the tasks' gradients on the shared LoRA, at its start and when it is trained."""
    config = config_of(recipe)
    found = {}
    for name, parameters in (("start", baselines.static_parameters(config, recipe.seed)), ("trained", trained)):
        by_edit = baselines.task_gradients(model.backbone, config, parameters, run.train, 8, recipe.seed)
        stack = torch.nn.functional.normalize(torch.stack(list(by_edit.values())), dim=1)
        found[name] = (stack @ stack.T).tolist()
    return found


def lora_map(loras: list) -> list[list[float]]:
    """Two principal components of all LoRAs: (x, y) of each."""
    rows = torch.stack([torch.cat([value.flatten().float() for value in lora.tensors.values()]) for lora in loras])
    rows = rows - rows.mean(0)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return (vectors[:, -2:] * values[-2:].clamp_min(0).sqrt()).flip(1).tolist()


def measure_bundled(model: ModelHandle, asked: list, edits: tuple[str, ...], generator: GeneratorHandle) -> dict:
    """Everything that needs no training: thinking, (a), (b), (e) to (h), (z), and the map of the LoRAs."""
    made, loras = measure(model, asked, generator)
    made |= {
        "a source unchanged": evaluate.scores(asked, [each.case.source for each in asked]),
        "b frozen base": evaluate.scores(
            asked, evaluate.paint(model, asked, [None] * len(asked), steps=STEPS, on_tick=Terminal("b frozen base"))),
        "z VAE of the true edit": evaluate.scores(asked, evaluate.through_vae(model, [each.case.wanted for each in asked])),
    }
    return {
        "thinking": evaluate.thinking_accuracy(asked),
        "phrasings": evaluate.phrasing_accuracy(model, asked[1].case.pictures[0], asked[2].case.pictures[0], edits),
        "cases": [[each.case.photo, each.case.edit, each.case.instruction, each.thinking] for each in asked],
        "bundled": made, "map": lora_map(loras)}


def measure_seed(run: Run, model: ModelHandle, asked: list, recipe: Recipe, folder: Path) -> dict:
    """Scores of (c), (d) and (e), trained alike; with the first seed the gradients of the tasks, too."""
    generator, parameters, tuned = train_seed(run, model, recipe, folder)
    arms = {
        STATIC: arm_of_static(model, asked, parameters, generator.config),
        FULL: arm_of_tuned(tuned, asked),
        "e HY-WU": (model, asked, evaluate.written(generator, asked))}
    made = {name: evaluate.scores(asked, evaluate.paint(*arm, steps=STEPS, on_tick=Terminal(name)))
            for name, arm in arms.items()}
    return {"scores": made} | ({} if recipe.seed else {"gradients": gradients(run, model, recipe, parameters)})


def kept(path: Path, of: list, make: Callable[[], dict]) -> dict:
    """What ``path`` holds if it was made ``of`` the same, else what ``make`` makes, written there."""
    if path.is_file() and (found := json.loads(path.read_text()))["of"] == of:
        return found["made"]
    made = rounded(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"of": of, "made": made}) + "\n")
    return made


def main() -> None:
    """Run everything that is not in the run folder yet, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of training photos")
    parser.add_argument("--run", type=Path, required=True, help="folder for states; a killed run goes on from there")
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--seeds", type=int, default=3, help="0: only the bundled checkpoint, nothing is trained")
    parser.add_argument("--every", type=int, default=1, help="2: one view of each photo instead of two, twice as fast")
    parser.add_argument("--recipe", default="ablation")
    options = parser.parse_args()
    began, recipe = time.time(), Recipe.load(options.recipe)
    model = load_model(options.checkpoint / "backbone", dtype=torch.float32)
    generator = load_generator(options.checkpoint / "generator", dtype=torch.float32)
    edits = recipe.edit_names()
    asked = evaluate.ask(
        model, evaluate.cases(held_out_photos(), Buckets.of(model.config), edits, every=options.every), Terminal("think"))
    of = [model.fingerprint, generator.fingerprint, options.every, STEPS]
    results = {
        "machine": machine(), "asked": {"seeds": options.seeds, "every": options.every},
        "recipe": json.loads(recipe.to_json()), "steps": STEPS, "edits": list(edits),
        "by_photo": [edit for edit in edits if EDITS[edit].by_photo], "seeds": []}
    results |= kept(options.run / "bundled.json", of, lambda: measure_bundled(model, asked, edits, generator))
    if options.seeds:
        run = prepare(recipe, options.photos, options.run, Terminal("photos"), print, model)
    for seed in range(options.seeds):
        seeded, folder = replace(recipe, seed=seed), options.run / f"seed-{seed}"
        found = kept(folder / "scores.json", [*of, seeded.to_json()],
                     lambda seeded=seeded, folder=folder: measure_seed(run, model, asked, seeded, folder))
        results["seeds"].append(found["scores"])
        if seed == 0:
            results["gradients"] = found["gradients"]
    results["minutes"] = round((time.time() - began) / 60, 1)
    (RESULTS / "ablation.json").write_text(json.dumps(rounded(results)) + "\n")
    print(report(RESULTS / "ablation.json"))


def rounded(value):
    if isinstance(value, float | np.floating):
        return round(float(value), 4)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    main()
