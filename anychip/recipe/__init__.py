"""The recipe: schema, loading, overrides, migration."""

from anychip.recipe.load import dump_recipe, load_recipe, parse_recipe
from anychip.recipe.schema import ModelConfig, Recipe

__all__ = ["ModelConfig", "Recipe", "dump_recipe", "load_recipe", "parse_recipe"]
