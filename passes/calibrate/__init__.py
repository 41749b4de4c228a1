"""Calibration: what the linears of a graph see of a text, and weights rounded so that they lose little by it."""

from .assignment import Assignment, Choice, Progress, everywhere
from .layers import inputs_of
from .methods import METHODS, Calibration, calibrate
from .quality import Quality, Reference
from .sites import Site, find_sites
from .text import text_parts, token_rows

__all__ = [
    "METHODS",
    "Assignment",
    "Calibration",
    "Choice",
    "Progress",
    "Quality",
    "Reference",
    "Site",
    "calibrate",
    "everywhere",
    "find_sites",
    "inputs_of",
    "text_parts",
    "token_rows",
]
