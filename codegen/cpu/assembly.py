"""The assembly of a kernel's hot loop: what became of the C++ where most of the work is.

Of the innermost loops, the hot one is that with the most vector instructions.
"""

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...compiler.errors import ToolchainError
from .build import first_error, with_prelude
from .launch import CppKernel, launcher
from .target import CpuTarget

LABEL = re.compile(r"^([.\w$]+):")
JUMP = re.compile(r"^\s+(?:j\w+|b|b\.\w+|cbn?z|tbn?z)\s.*?(\.?L\w+)\s*$")
PLACE = re.compile(r"^\s+\.loc\s+\d+\s+(\d+)")
VECTOR = re.compile(r"^\s+\w+\s.*(?:%[xyz]mm\d|\bv\d+\.\d)")
DIRECTIVE = re.compile(r"^\s+\.|^\s*#|^\s*$")
LEAVES = re.compile(r"^\s+(?:jmp|ret|b|br|ud2|brk)\b(?!\.)")
FUSED = re.compile(r"^\s+(?:vf?n?m(?:add|sub|la)|vpdp|vdpbf|fml[as]|[su]dot)")


@dataclass(frozen=True)
class Instruction:
    """One line of assembly (a label or an instruction), and the C++ line that it stands for."""

    text: str
    cpp_line: int


def assemble(body: str, target: CpuTarget) -> str:
    """C++ text, prelude included, to assembly that says which line each instruction comes from."""
    with tempfile.TemporaryDirectory(prefix="effc-") as scratch:
        source, output = Path(scratch) / "kernel.cpp", Path(scratch) / "kernel.s"
        source.write_text(body)
        flags = [flag for flag in target.flags if flag != "-shared"]
        command = [target.cxx, *flags, "-g1", "-fno-dwarf2-cfi-asm", "-S", str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ToolchainError(f"{target.cxx} makes no assembly: {first_error(done)}")
        return output.read_text()


def instructions(assembly: str) -> list[Instruction]:
    """Instructions, and the labels that are functions or jumped to, in order."""
    lines = assembly.splitlines()
    targets = {jump[1] for text in lines if (jump := JUMP.match(text))}
    found: list[Instruction] = []
    place = 0
    for text in lines:
        if loc := PLACE.match(text):
            place = int(loc[1])
        elif label := LABEL.match(text):
            if label[1] in targets or not label[1].startswith("."):
                found.append(Instruction(text, place))
        elif not DIRECTIVE.match(text):
            found.append(Instruction(text, place))
    return found


def basic_blocks(code: Iterable[Instruction]) -> list[list[Instruction]]:
    """Code cut before labels and after jumps."""
    blocks: list[list[Instruction]] = [[]]
    for instruction in code:
        if LABEL.match(instruction.text) and blocks[-1]:
            blocks.append([])
        blocks[-1].append(instruction)
        if JUMP.match(instruction.text) or LEAVES.match(instruction.text):
            blocks.append([])
    return [block for block in blocks if block]


def innermost_loops(blocks: Sequence[list[Instruction]]) -> list[list[Instruction]]:
    """The natural loops that hold no other, their blocks in the order of the text."""
    import networkx

    starts = {label[1]: k for k, block in enumerate(blocks) if (label := LABEL.match(block[0].text))}
    graph = networkx.DiGraph()
    for k, block in enumerate(blocks):
        last = block[-1].text
        if (jump := JUMP.match(last)) and jump[1] in starts:
            graph.add_edge(k, starts[jump[1]])
        if not LEAVES.match(last) and k + 1 < len(blocks):
            graph.add_edge(k, k + 1)
    graph.add_edges_from(("entry", k) for name, k in starts.items() if not name.startswith("."))
    graph = graph.subgraph({"entry"} | networkx.descendants(graph, "entry"))
    parents = networkx.immediate_dominators(graph, "entry")

    def dominates(header: object, block: object) -> bool:
        while block != header and block != "entry":
            block = parents[block]
        return block == header

    loops: dict[object, set] = {}
    for block, header in graph.edges:
        if dominates(header, block):
            within = graph.subgraph(set(graph) - {header})
            body = {block} | networkx.ancestors(within, block) if block != header else set()
            loops[header] = loops.get(header, {header}) | body
    inner = [body for header, body in loops.items() if not any(body & {other} for other in loops if other != header)]
    return [[instruction for k in sorted(body) for instruction in blocks[k]] for body in inner]


def weight(loop: Sequence[Instruction]) -> tuple[int, int]:
    """Fused multiply-adds and dot products count first: where there are any, the loop around them is the hot one."""
    fused = sum(bool(FUSED.match(instruction.text)) for instruction in loop)
    return fused if fused >= 8 else 0, sum(bool(VECTOR.match(instruction.text)) for instruction in loop)


@functools.lru_cache(maxsize=512)
def hot_loop(kernel: CppKernel, target: CpuTarget) -> str:
    """The assembly of the hot loop, under the C++ lines it comes from; "" for a kernel without loops."""
    body = with_prelude(kernel.cpp + launcher(kernel))
    loops = innermost_loops(basic_blocks(instructions(assemble(body, target))))
    hot = max(loops, key=weight, default=())
    source = body.splitlines()
    lines: list[str] = []
    shown = None
    for instruction in hot:
        if instruction.cpp_line != shown and 0 < instruction.cpp_line <= len(source):
            shown = instruction.cpp_line
            lines.append(f"    // {source[shown - 1].strip()}")
        label = LABEL.match(instruction.text)
        lines.append(instruction.text if label else "        " + " ".join(instruction.text.split()))
    return "\n".join(lines)
