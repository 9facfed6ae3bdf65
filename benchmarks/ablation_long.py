"""One shared static LoRA (and, if asked, full fine-tuning) trained as long as the bundled generator: does HY-WU stay ahead?

``ablation.py`` trains all variants alike for a few steps and several seeds. This trains (c) and (d) by the recipe that made the
bundled checkpoint (3,900 steps of 16, one seed, an hour each on two cores) on the bundled base, and paints the same held-out
cases as (e), the bundled generator. Writes ``results/ablation-long.json`` and the report again. A killed run goes on; with
--as-it-is nothing is trained and the static LoRA is measured as far as it has come.
"""

import argparse
from pathlib import Path

import torch

from ..hywu_core.cli import BUNDLED
from ..hywu_core.handle import ModelHandle, load_model
from ..hywu_core.terminal import Terminal
from ..hywu_core.training import baselines, evaluate
from ..hywu_core.training.loop import Stage
from ..hywu_core.training.recipe import Recipe
from ..hywu_core.training.run import Run, prepare
from ..hywu_core.vision.buckets import Buckets
from .ablation import FULL, STATIC, STEPS, arm_of_static, arm_of_tuned, config_of, fine_tuned, held_out_photos, rounded
from .ablation_report import report
from .record import RESULTS, record


def train_arm(name: str, run: Run, model: ModelHandle, recipe: Recipe, folder: Path, asked: list) -> tuple:
    """Train (c) or (d); returns what ``evaluate.paint`` takes: a model, the cases and a LoRA for each."""
    if name == FULL:
        return arm_of_tuned(fine_tuned(run, model, recipe, folder, Terminal(name)), asked)
    config = config_of(recipe)
    parameters = baselines.train_static(
        model.backbone, config, run.train, recipe.generator_stage, recipe.seed, folder, Terminal(name), print)
    return arm_of_static(model, asked, parameters, config)


def static_as_it_is(model: ModelHandle, recipe: Recipe, folder: Path, asked: list) -> tuple[tuple, int]:
    """(c) likewise from the state on disk, and after how many steps that was written."""
    config = config_of(recipe)
    stage = Stage("static", folder, recipe.generator_stage, recipe.seed, baselines.static_parameters(config, recipe.seed))
    stage.load()
    return arm_of_static(model, asked, stage.parameters, config), stage.step


def main() -> None:
    """Train what is asked, paint, and write the figures beside those that are already there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True, help="folder of training photos")
    parser.add_argument("--run", type=Path, required=True, help="folder for states; a killed run goes on from there")
    parser.add_argument("--checkpoint", type=Path, default=BUNDLED)
    parser.add_argument("--arms", nargs="+", choices=("static", "full"), default=["static", "full"])
    parser.add_argument("--as-it-is", action="store_true", help="measure the static LoRA as far as it is trained")
    parser.add_argument("--every", type=int, default=2, help="as in the ablation that it is compared with")
    parser.add_argument("--recipe", default="mini", help="the one that trained the bundled generator")
    options = parser.parse_args()
    if options.as_it_is and options.arms != ["static"]:
        parser.error("--as-it-is measures the static LoRA only: add --arms static")
    recipe = Recipe.load(options.recipe)
    model = load_model(options.checkpoint / "backbone", dtype=torch.float32)
    asked = evaluate.ask(model, evaluate.cases(
        held_out_photos(), Buckets.of(model.config), recipe.edit_names(), every=options.every), Terminal("think"))
    stage, arms = recipe.generator_stage, {}
    run = None if options.as_it_is else prepare(recipe, options.photos, options.run, Terminal("photos"), print, model)
    for name in [{"static": STATIC, "full": FULL}[each] for each in options.arms]:
        if options.as_it_is:
            arm, steps = static_as_it_is(model, recipe, options.run, asked)
        else:
            arm, steps = train_arm(name, run, model, recipe, options.run, asked), stage.steps
        scores = rounded(evaluate.scores(asked, evaluate.paint(*arm, steps=STEPS, on_tick=Terminal(name))))
        arms[name] = {"steps": steps, "scores": scores}
        record("ablation-long", {"steps": stage.steps, "batch": stage.batch, "seed": recipe.seed, "every": options.every,
                                 "base": model.fingerprint, "arms": arms})
    print(report(RESULTS / "ablation.json"))


if __name__ == "__main__":
    main()
