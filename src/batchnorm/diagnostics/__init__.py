"""What a network's activations and normalizations are doing."""

from batchnorm.diagnostics.history import LayerHistory, load_histories
from batchnorm.diagnostics.recorder import Recorder
from batchnorm.diagnostics.sketch import Sketch
from batchnorm.diagnostics.watch import watch

__all__ = ["LayerHistory", "Recorder", "Sketch", "load_histories", "watch"]
