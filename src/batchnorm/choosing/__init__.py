"""Which kind of normalization to take: short trials on a user's model and data."""

from batchnorm.choosing.candidates import CANDIDATES, USUAL
from batchnorm.choosing.choice import Choice, Tried
from batchnorm.choosing.choose import choose
from batchnorm.choosing.verdict import Verdict

__all__ = ["CANDIDATES", "USUAL", "Choice", "Tried", "Verdict", "choose"]
