"""Recipes from what users have: Megatron and MindSpeed scripts, MindFormers YAML, torchtitan TOML, config.json."""

from anychip.plan.importers.read import import_recipe

__all__ = ["import_recipe"]
