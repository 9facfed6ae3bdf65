"""Recipes: the shipped ones, what differs in a file, and what is refused before any work."""

import json
from dataclasses import replace

import pytest
from comfyui_hywu.hywu_core.config import BackboneConfig, GenerationConfig, GeneratorConfig
from comfyui_hywu.hywu_core.errors import HYWUError, RequestError
from comfyui_hywu.hywu_core.training.edits import EDITS
from comfyui_hywu.hywu_core.training.export import write_texts
from comfyui_hywu.hywu_core.training.recipe import RECIPES, Recipe, Sizes, StageSettings, generator_config


def load(tmp_path, **fields) -> Recipe:
    path = tmp_path / "own.json"
    path.write_text(json.dumps(fields))
    return Recipe.load(str(path))


def refused(tmp_path, **fields) -> str:
    with pytest.raises(RequestError) as caught:
        load(tmp_path, **fields)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.json")))
def test_shipped_recipes_load(name):
    recipe = Recipe.load(name)
    assert set(recipe.edit_names()) <= set(EDITS) and recipe.grids()
    assert all(rows * cols > 0 and share > 0 for (rows, cols), share in recipe.grids().items())


def test_the_smoke_recipe_is_small_and_mini_is_the_default():
    assert Recipe.load("mini") == Recipe() and Recipe().edit_names() == tuple(EDITS)
    assert Recipe.load("smoke").generator_stage.steps < 100


def test_a_file_names_only_what_differs(tmp_path):
    recipe = load(tmp_path, edits=["gray"], base_stage={"steps": 3, "rate": 1})
    assert recipe.edits == ("gray",) and recipe.generator_stage == Recipe().generator_stage and recipe.sizes == Sizes()
    # What a stage does not name is a stage's default, not the base stage's.
    assert recipe.base_stage == StageSettings(steps=3, rate=1)


@pytest.mark.parametrize("recipe", (
    Recipe(), replace(Recipe.load("smoke"), seed=5), Recipe(edits=("gray", "match"), sizes=Sizes(layers=6))))
def test_a_recipe_survives_its_file(tmp_path, recipe):
    path = tmp_path / "kept.json"
    path.write_text(recipe.to_json())
    assert Recipe.load(str(path)) == recipe and Recipe.load(str(path)).to_json() == recipe.to_json()


def test_unknown_fields_are_refused_with_the_known_ones(tmp_path):
    text = refused(tmp_path, stepz=3, aha=1)
    assert "2 unknown fields ('aha')" in text and "own.json" in text and "generator_stage" in text
    text = refused(tmp_path, base_stage={"stepz": 3})
    assert "base_stage has 1 unknown fields ('stepz')" in text and "steps, batch, rate" in text


@pytest.mark.parametrize("fields, words", (
    ({"seed": "one"}, "seed is 'one', expected a int"), ({"seed": 1.5}, "seed is 1.5"), ({"edits": "gray"}, "edits is 'gray'"),
    ({"base_stage": {"steps": "many"}}, "base_stage: steps is 'many'"), ({"base_stage": 3}, "base_stage is '3'"),
    ({"data": {"grids": ["6x6"]}}, "grids is ['6x6'], expected a dict"), ({"base_stage": {"rate": None}}, "rate is None")))
def test_values_of_the_wrong_kind_are_refused(tmp_path, fields, words):
    assert words in refused(tmp_path, **fields)


@pytest.mark.parametrize("fields", (
    {"edits": ["grey"]}, {"data": {"grids": {"six": 1.0}}}, {"data": {"grids": {"6x6": "much"}}}, {"data": {"grids": {}}},
    {"data": {"weights": {"grey": 1.0}}}, {"data": {"weights": {"gray": 0}}},
    {"base_stage": {"steps": -1}}, {"generator_stage": {"batch": 0}}))
def test_values_that_cannot_work_are_refused(tmp_path, fields):
    refused(tmp_path, **fields)


def test_a_missing_recipe_is_refused_with_the_known_ones(tmp_path):
    for name in ("maxi", str(tmp_path / "none.json")):
        with pytest.raises(RequestError, match="there is no recipe .*mini, smoke"):
            Recipe.load(name)


@pytest.mark.parametrize("text", ("{", "[1]", "\xff"))
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(HYWUError, match="bad.json"):
        Recipe.load(str(path))


def test_the_config_files_are_taken_by_the_ordinary_readers(tmp_path):
    recipe = Recipe()
    special = write_texts(tmp_path, recipe)
    config = BackboneConfig.from_folder(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.image_base_size) == (224, 4, 192)
    assert config.vocab_size == max(special.values()) + 1 and config.vae.latent_channels == 64
    assert GenerationConfig.from_folder(tmp_path, config).diff_infer_steps == 4
    generator = GeneratorConfig.from_dict(generator_config(recipe.sizes, recipe.generator))
    assert (generator.rank, generator.scale, generator.num_base_model_layers) == (8, 1.0, 4)
