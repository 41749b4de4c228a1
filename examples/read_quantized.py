"""Read a file of `effc quantize` with safetensors and torch alone: python examples/read_quantized.py FILE

A matrix NAME is kept as the tensors NAME.codes, NAME.scales, ... The metadata says for each its format, and describes
the format: planes (bits of a code, low bits first, 8 / width codes to a byte), group (weights in a row that share a
scale, None: all), zero (taken from codes), super_block (weights that share a scale of scales), book (values of codes).
"""

import json
import sys

import torch
from safetensors import safe_open


def codes_of(planes: list[torch.Tensor], widths: list[int]) -> torch.Tensor:
    """The codes of a matrix from planes of bits; 8 bits are a plane of int8 or fp8."""
    if widths == [8]:
        return planes[0].float()
    codes, shift = 0, 0
    for plane, width in zip(planes, widths):
        bits = plane.unsqueeze(-1) >> torch.arange(0, 8, width, dtype=torch.uint8) & (1 << width) - 1
        codes, shift = codes + (bits.flatten(-2).int() << shift), shift + width
    return codes


def values_of(part: dict[str, torch.Tensor], form: dict) -> torch.Tensor:
    """w = scale * (code - zero) + min, in fp32."""
    codes = codes_of([part[name] for name in ("codes", "high") if name in part], form["planes"])
    level = torch.tensor(form["book"])[codes] if form["book"] else codes.float() - form["zero"]
    group = form["group"] or level.shape[-1]
    scales, mins = part["scales"].float(), part["mins"].float() if "mins" in part else None
    if form["super_block"]:
        times = form["super_block"] // group
        scales = part["super"].float().repeat_interleave(times, -1) * scales
        mins = None if mins is None else -(part["super_min"].float().repeat_interleave(times, -1) * mins)
    weights = scales.repeat_interleave(group, -1)[:, : level.shape[-1]] * level
    return weights if mins is None else weights + mins.repeat_interleave(group, -1)[:, : level.shape[-1]]


def read(path: str) -> dict[str, torch.Tensor]:
    """The model's parameters by name; of those that are tied, one. files/ are the small files of a model's folder."""
    with safe_open(path, framework="pt") as file:
        about = {key: json.loads(file.metadata()[key]) for key in ("matrices", "formats")}
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("files/")}  # noqa: SIM118
    for name, matrix in about["matrices"].items():
        form = about["formats"][matrix["format"]]
        values = values_of({part: tensors.pop(f"{name}.{part}") for part in form["parts"]}, form)
        tensors[name] = values.t() if matrix["transposed"] else values
    return tensors


if __name__ == "__main__":
    for name, tensor in read(sys.argv[1]).items():
        print(f"{name}: {list(tensor.shape)}, from {tensor.min():.4g} to {tensor.max():.4g}")
