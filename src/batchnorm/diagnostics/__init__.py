"""What a network's activations and normalizations are doing."""

from batchnorm.diagnostics.history import LayerHistory, load_histories
from batchnorm.diagnostics.recorder import Recorder
from batchnorm.diagnostics.watch import watch

__all__ = ["LayerHistory", "Recorder", "load_histories", "watch"]
