"""Plain data in, one offline HTML page and its pictures out."""

from batchnorm.report.charts import COLOURS, Chart, Curve, CurveChart, PercentileChart, PercentilePanel
from batchnorm.report.page import Claim, Figure, Page, Section, Table, embedded, write_page
from batchnorm.report.pictures import draw
from batchnorm.report.plots import figure_of, plot

__all__ = [
    "COLOURS",
    "Chart",
    "Claim",
    "Curve",
    "CurveChart",
    "Figure",
    "Page",
    "PercentileChart",
    "PercentilePanel",
    "Section",
    "Table",
    "draw",
    "embedded",
    "figure_of",
    "plot",
    "write_page",
]
