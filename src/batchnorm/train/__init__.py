"""Recipes, the training loop that resumes, and the evaluation of what it leaves."""

from batchnorm.train.describe import Stage, describe
from batchnorm.train.evaluate import RunScores, Scores, evaluate_runs
from batchnorm.train.loop import TrainingResult, train
from batchnorm.train.ranks import RankLost
from batchnorm.train.recipe import InceptionRecipe, MLPRecipe, Recipe
from batchnorm.train.recipes import RECIPES, at_scale, bn_mlp, get_recipe, mlp
from batchnorm.train.statistics import with_population_statistics
from batchnorm.train.stop import TrainingStopped

__all__ = [
    "RECIPES",
    "InceptionRecipe",
    "MLPRecipe",
    "RankLost",
    "Recipe",
    "RunScores",
    "Scores",
    "Stage",
    "TrainingResult",
    "TrainingStopped",
    "at_scale",
    "bn_mlp",
    "describe",
    "evaluate_runs",
    "get_recipe",
    "mlp",
    "train",
    "with_population_statistics",
]
