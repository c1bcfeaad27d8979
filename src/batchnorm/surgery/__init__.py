"""Operations on whole models: a model in, a new model and a report out."""

from batchnorm.surgery.accelerate import AccelerateReport, accelerate
from batchnorm.surgery.convert import convert
from batchnorm.surgery.fold import FoldProof, FoldReport, fold
from batchnorm.surgery.freeze import freeze, thaw
from batchnorm.surgery.insert import insert
from batchnorm.surgery.outcome import Change, Note, Refusal, SurgeryReport
from batchnorm.surgery.parameter_groups import parameter_groups
from batchnorm.surgery.twin import TwinReport

__all__ = [
    "AccelerateReport",
    "Change",
    "FoldProof",
    "FoldReport",
    "Note",
    "Refusal",
    "SurgeryReport",
    "TwinReport",
    "accelerate",
    "convert",
    "fold",
    "freeze",
    "insert",
    "parameter_groups",
    "thaw",
]
