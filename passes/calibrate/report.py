"""What quantization made of a model, matrix by matrix and in total: the rows of `effc quantize --report`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .methods import Calibration
from .quality import Quality
from .sites import find_sites


@dataclass(frozen=True)
class SiteReport:
    """One matrix. bits: per weight, scales and all. error: mean squared error of its outputs by their mean square, None
    where inputs were not looked at. kl: nats, with it alone rounded, where that was measured. microseconds: of the
    compiled kernel by the number of rows that it multiplies."""

    name: str
    shape: tuple[int, int]
    format: str
    bits: float
    error: float | None = None
    kl: float | None = None
    microseconds: Mapping[int, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> float:
        return self.bits * self.shape[0] * self.shape[1] / 8


@dataclass(frozen=True)
class QuantizationReport:
    """The matrices, and the model's quality on held-out text with all of them rounded, beside that of before."""

    method: str
    sites: tuple[SiteReport, ...]
    before: Quality
    after: Quality

    @property
    def nbytes(self) -> float:
        return sum(site.nbytes for site in self.sites)

    @property
    def bits(self) -> float:
        """Per weight of all sites."""
        return 8 * self.nbytes / max(sum(site.shape[0] * site.shape[1] for site in self.sites), 1)

    @property
    def error(self) -> float | None:
        """Mean over the sites that have one."""
        errors = [site.error for site in self.sites if site.error is not None]
        return sum(errors) / len(errors) if errors else None

    def to_dict(self) -> dict[str, Any]:
        total = {"bits": self.bits, "bytes": self.nbytes, "error": self.error}
        quality = {
            name: {**asdict(found), "perplexity": found.perplexity}
            for name, found in (("before", self.before), ("after", self.after))
        }
        sites = [{**asdict(site), "bytes": site.nbytes} for site in self.sites]
        return {"method": self.method, "total": total, "quality": quality, "sites": sites}

    def markdown(self) -> str:
        """The table, a row for each matrix and one for all, and a line that says what the model lost."""
        rows = sorted({count for site in self.sites for count in site.microseconds})
        head = ["matrix", "shape", "format", "bits", "MB", "error", "KL alone", *(f"us at M={count}" for count in rows)]
        lines = ["| " + " | ".join(head) + " |", "|---|---|---" + "|--:" * (len(head) - 3) + "|"]
        for site in self.sites:
            times = (number(site.microseconds.get(count), ".1f") for count in rows)
            shape = f"{site.shape[0]} x {site.shape[1]}"
            lines.append(row(site.name, shape, site.format, site.bits, site.nbytes, site.error, site.kl, *times))
        sums = (sum(site.microseconds.get(count, 0.0) for site in self.sites) for count in rows)
        times = (number(total, ".1f") for total in sums)
        lines.append(row(f"all {len(self.sites)}", "", "", self.bits, self.nbytes, self.error, None, *times))
        return "\n".join([*lines, "", self.summary])

    @property
    def summary(self) -> str:
        before, after = self.before, self.after
        return (
            f"{self.method}: perplexity {before.perplexity:.3f} --> {after.perplexity:.3f}"
            f" ({after.perplexity - before.perplexity:+.3f}) on {after.tokens} held-out tokens; KL {after.kl:.4f} nats,"
            f" 99% below {after.kl_p99:.3f}; greedy tokens equal {after.agreement:.1%}"
        )


def row(name: str, shape: str, format: str, bits: float, size: float, *measured: float | str | None) -> str:
    cells = [found if isinstance(found, str) else number(found, ".2e") for found in measured]
    return "| " + " | ".join([name, shape, format, f"{bits:.2f}", f"{size / 1e6:.2f}", *cells]) + " |"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def report(
    calibration: Calibration,
    method: str,
    before: Quality,
    after: Quality,
    alone: Mapping[str, float] | None = None,
    microseconds: Mapping[str, Mapping[int, float]] | None = None,
) -> QuantizationReport:
    """The report of a calibration. alone: KL with one site rounded, by its name. microseconds: by site and rows."""
    sites = []
    for site in find_sites(calibration.graph)[0]:
        assignment = calibration.assignments.get(site.name)
        if assignment is None:
            recipe = calibration.graph.weights[site.name]
            format, bits = str(recipe.dtype).removeprefix("torch."), 8.0 * recipe.dtype.itemsize
        else:
            format, bits = assignment.format.name, assignment.format.bits(site.rows, site.columns)
        sites.append(
            SiteReport(
                site.name,
                (site.rows, site.columns),
                format,
                bits,
                calibration.errors.get(site.name),
                (alone or {}).get(site.name),
                (microseconds or {}).get(site.name, {}),
            )
        )
    return QuantizationReport(method, tuple(sites), before, after)
