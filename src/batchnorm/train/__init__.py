"""Recipes, the training loop that resumes, and the evaluation of what it leaves."""

from batchnorm.train.evaluate import RunScores, Scores, evaluate_runs, with_population_statistics
from batchnorm.train.loop import TrainingResult, TrainingStopped, train
from batchnorm.train.recipe import RECIPES, Recipe, bn_mlp, get_recipe, mlp

__all__ = [
    "RECIPES",
    "Recipe",
    "RunScores",
    "Scores",
    "TrainingResult",
    "TrainingStopped",
    "bn_mlp",
    "evaluate_runs",
    "get_recipe",
    "mlp",
    "train",
    "with_population_statistics",
]
