"""Calibrate a model on text that Python brings: `effc quantize MODEL --method gptq --budget 4.5bpw --report`.

The graph is traced and fused as for compiling, its matrices are rounded for what they see of the text, and the model is
measured on text that was held out. What comes out are parameters, for `quantize_model` to write, and the report.
"""

from __future__ import annotations

from dataclasses import dataclass

from .compiler.errors import InputError
from .compiler.formats import Format, find
from .compiler.graph import Graph
from .compiler.load import LoadedModel
from .compiler.schemes import Scheme
from .compiler.trace import trace
from .passes import run as run_passes
from .passes.calibrate import Choice, Progress, Reference, calibrate, inputs_of, text_parts, token_rows
from .passes.calibrate.assignment import no_progress
from .passes.calibrate.layers import Inputs
from .passes.calibrate.methods import find_method
from .passes.calibrate.parameters import Parameters, parameters
from .passes.calibrate.report import QuantizationReport, report
from .passes.calibrate.sensitivity import choose_formats, fits, sensitivities
from .passes.calibrate.sites import Site
from .passes.quantize import is_head
from .runtime.text import TextCodec

BUDGET_FORMATS = ("int3_g64", "int4_g64", "int8_g64")
"""What a budget is shared out among, the coarsest first."""

SENSITIVITY_TEXTS = 2
"""Each is computed once for every matrix."""


@dataclass(frozen=True)
class TextSizes:
    """How many texts of how many tokens are calibrated and measured on."""

    calibration: int = 16
    held_out: int = 8
    length: int = 512


@dataclass(frozen=True)
class CalibratedModel:
    parameters: Parameters
    report: QuantizationReport


def calibrate_model(
    model: LoadedModel,
    scheme: Scheme,
    method: str = "gptq",
    bits: float | None = None,
    sizes: TextSizes = TextSizes(),
    progress: Progress | None = None,
) -> CalibratedModel:
    """Round the matrices of `model` by one of the methods, and measure what that costs.

    scheme: the formats of matrices and of heads. bits: a budget per weight, over all matrices; formats are then chosen
    one by one among `BUDGET_FORMATS`. Raises InputError for a model without a tokenizer, an unknown method or a budget
    that is too small, and ModelError where the result has other parameters than the model.
    """
    if model.tokenizer_folder is None:
        raise InputError(f"{model.name} brings no tokenizer: calibration reads text")
    progress = progress or no_progress
    find_method(method)
    graph, _ = run_passes(trace(model))
    calibration_texts, held_out = read_texts(model, graph, sizes)
    alone, choice = None, of_scheme(scheme)
    if bits is not None:
        formats = [find(name) for name in BUDGET_FORMATS]
        found = sensitivities(graph, model.source, calibration_texts[:SENSITIVITY_TEXTS], formats, progress)
        choice = choose_formats(found, formats, bits)
        alone = {entry.site.name: entry.estimate(choice(entry.site).name) for entry in found}
    calibration = calibrate(graph, model.source, calibration_texts, choice, method, progress)
    reference = Reference(graph, model.source, held_out)
    after = reference.measure(calibration.graph, model.source, calibration.assignments)
    return CalibratedModel(
        parameters(graph, calibration, model.source), report(calibration, method, reference.quality(), after, alone)
    )


def read_texts(model: LoadedModel, graph: Graph, sizes: TextSizes) -> tuple[list[Inputs], list[Inputs]]:
    """Inputs of the graph to calibrate and to measure on."""
    parts, encode = text_parts(), TextCodec(model.tokenizer_folder).encode
    return (
        inputs_of(graph, token_rows(parts.calibration, encode, sizes.calibration, sizes.length)),
        inputs_of(graph, token_rows(parts.held_out, encode, sizes.held_out, sizes.length)),
    )


def of_scheme(scheme: Scheme) -> Choice:
    """The formats of a scheme; matrices that they cannot hold stay as they are."""

    def choice(site: Site) -> Format | None:
        name = scheme.head if is_head(site.node.args[1]) else scheme.weights
        return None if name is None or not fits(site, [find(name)]) else find(name)

    return choice
