"""A kernel's listing: each line of its Triton source with the Triton IR and the C++ that stand for it, then the
assembly of the hot loop.

    10 | x = tl.load(x_ptr + i, mask=i < n)
         ttir  %x = tt.load %x_2, %x_1 : tensor<64x!tt.ptr<f32>>
         c++   const f32x16 x_2 = load<f32x16>(x_ptr + i);
"""

import linecache
import re
from collections import Counter, defaultdict

from .assembly import hot_loop
from .launch import CppKernel
from .parse import Parser
from .target import CpuTarget

NESTED_LOCATION = re.compile(r" loc\((?:[^()]|\([^()]*\))*\)")
COMMENT = re.compile(r"^\s*// \S+:(\d+)(?:  |$)")


def ttir_by_line(ttir: str) -> tuple[str, dict[int, list[str]]]:
    """The file of the kernel, and its IR by the line of it that each op comes from."""
    parser = Parser(ttir)
    places = [parser.split_location(text) for text in parser.lines if not text.startswith(("module", "tt.func"))]
    files = Counter(location[0] for _, location in places if location)
    file = files.most_common(1)[0][0] if files else ""
    found: dict[int, list[str]] = defaultdict(list)
    waiting: list[str] = []  # the head of an op with a region, whose place stands at its end
    for text, location in places:
        waiting.append(NESTED_LOCATION.sub("", text))
        if location and location[0] == file:
            found[location[1]] += waiting
        if location:
            waiting = []
    return file, {line: [text for text in texts if text not in ("}", "tt.return")] for line, texts in found.items()}


def cpp_by_line(cpp: str) -> tuple[list[str], dict[int, list[str]]]:
    """The C++ before the first statement that names its line, and the rest by line."""
    head: list[str] = []
    found: dict[int, list[str]] = defaultdict(list)
    lines = head
    for text in cpp.splitlines():
        if comment := COMMENT.match(text):
            lines = found[int(comment[1])]
        else:
            lines.append(text)
    return head, found


def listing(kernel: CppKernel, target: CpuTarget) -> str:
    """The text of the module's docstring, for a kernel lowered for `target`."""
    file, ttir = ttir_by_line(kernel.ttir)
    head, cpp = cpp_by_line(kernel.cpp)
    lines = [f"{kernel.name} for {target.name}, from {file}", ""]
    lines += [f"     c++   {text}" for text in head if text.strip()]
    for number in sorted({*cpp, *(line for line, texts in ttir.items() if texts)}):
        lines.append(f"\n{number:4} | {linecache.getline(file, number).strip()}")
        lines += [f"       ttir  {text}" for text in ttir.get(number, ())]
        lines += [f"       c++   {text}" for text in cpp.get(number, ())]
    loop = hot_loop(kernel, target)
    lines += ["", "hot loop:" if loop else "no loop", loop]
    return "\n".join(lines).rstrip() + "\n"
