"""The `batchnorm` command."""

from batchnorm.cli.main import main

__all__ = ["main"]
