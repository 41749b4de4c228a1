"""Models without weights, to trace: parameters on the meta device, computed buffers (rope tables, masks) real."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def skeleton_of(config: PretrainedConfig, dtype: torch.dtype, name: str) -> nn.Module:
    """The transformers model of `config` in eval mode, no weight allocated. Raises ModelError where there is none."""
    with parameters_on_meta():
        return _model_class(config, name)._from_config(config, dtype=dtype).requires_grad_(False).eval()


def _model_class(config: PretrainedConfig, name: str) -> type:
    """The class that the config names, else the causal language model of its type."""
    import transformers

    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in causal:
        raise ModelError(f"{name}: unsupported architecture {config.model_type!r}: transformers has no such model")
    return causal[type(config)]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register go to the meta device; buffers keep their values (as in accelerate)."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        if param is not None and param.device.type != "meta":
            module._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def on_meta(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `module` with its parameters on the meta device, floating ones in `dtype`; its buffers as they are."""
    memo: dict[int, nn.Parameter] = {}
    for parameter in module.parameters():
        kind = dtype if parameter.is_floating_point() else parameter.dtype
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, dtype=kind, device="meta"), requires_grad=False)
    twin = copy.deepcopy(module, memo)
    if getattr(twin, "config", None) is not None:
        twin.config.dtype = dtype
    return twin.eval()


def scale_rope(module: nn.Module, factors: Tensor) -> None:
    """Divide every rope frequency of that length by its factor: what llama.cpp keeps as `rope_freqs`.

    Llama 3.1's scaling of long wavelengths is stored so, and not in the file's metadata.
    """
    for part in module.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(part, name, None)
            if isinstance(frequencies, Tensor) and frequencies.shape == factors.shape:
                frequencies.div_(factors.to(frequencies.dtype))
