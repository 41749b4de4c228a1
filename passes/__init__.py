"""The rewrites, one idea a file, and the pipeline that orders, times, counts, verifies and dumps them."""

from .pipeline import PASSES, Report, Step, run

__all__ = ["PASSES", "Report", "Step", "run"]
