"""Training: recipes, batches, the loop and its checkpoints."""

from diffit.training.augment import augment
from diffit.training.loop import Running, Trainer
from diffit.training.recipe import RECIPES, Recipe, get_recipe

__all__ = ["RECIPES", "Recipe", "Running", "Trainer", "augment", "get_recipe"]
