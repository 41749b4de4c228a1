"""Read the text of a Triton IR module (`str(module)`, with locations) into `ir.Function`.

libtriton's bindings expose neither tensor types nor predicates, so the text is the interface. Value names in the text
are the Triton source's variable names; they repeat in sibling regions and are made unique here.
"""

import re

from ...compiler.errors import UnsupportedKernel
from .build import PRELUDE
from .ir import EXTENTS, GRID, PROGRAM, Block, Function, Op, Type, Value
from .normalize import normalize
from .structure import LABELS, FlatFunction, inlined

LOCATION_LINE = re.compile(r"^(#loc\w*) = loc\((.*)\)$")
FILE_LOCATION = re.compile(r'"([^"]+)":(\d+):\d+')
STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
RESULTS = re.compile(r"^((?:%[\w#.$-]+(?::\d+)?(?:, )?)+) = ")
OP_NAME = re.compile(r'^"?([\w.]+)"?')
DIVISIBILITY = re.compile(r"tt\.divisibility = (\d+)")
LABEL = re.compile(r"\^\w+")
CALLEE = re.compile(r"@(\"[^\"]*\"|[\w.$-]+)\(")
OPERAND = re.compile(r"%[\w.$-]+(?:#\d+)?")
TYPE = re.compile(
    r"tensor<([\dx]*)(!tt\.ptr<([\w.]+)(?:, \d+)?>|[\w.]+)>|!tt\.ptr<([\w.]+)(?:, \d+)?>"
    r"|\b(index|i\d+|bf16|f8E\w+|f\d+)\b"
)
CPP_KEYWORDS = """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char16_t char32_t char8_t class co_await
    co_return co_yield compl concept const const_cast consteval constexpr constinit continue decltype default delete do
    double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires return short signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename typeof union unsigned using virtual void volatile wchar_t while xor xor_eq main
"""
MACROS_AND_TYPES = re.compile(
    r"__\w*|_[A-Z]\w*|\w+_t|[fiu]\d+x\d+|U?INT\w*|(SIZE|PTRDIFF|WCHAR|WINT|SIG_ATOMIC)_\w+|NULL|EOF"
)
TAKEN_NAMES = (
    frozenset(CPP_KEYWORDS.split())
    | frozenset(re.findall(r"\b(\w+)(?=[(<])", PRELUDE))
    | {"tt", "dot", "report", "launch", "linux", "unix"}
)


def c_name(name: str) -> str:
    """A name of Triton IR, fit for C++: neither a word of the language nor of what kernels stand on."""
    clean = re.sub(r"\W", "_", name)
    if clean[0].isdigit() or clean in TAKEN_NAMES or MACROS_AND_TYPES.fullmatch(clean):
        return "v" + clean
    return clean


def parse_type(match: re.Match) -> Type:
    dims, element, pointee, scalar_pointee, scalar = match.groups()
    if scalar is not None:
        return Type(scalar)
    if scalar_pointee is not None:
        return Type("ptr", (), scalar_pointee)
    shape = tuple(int(size) for size in dims.split("x") if size)
    return Type("ptr", shape, pointee) if pointee else Type(element, shape)


def types_in(text: str) -> list[Type]:
    return [parse_type(match) for match in TYPE.finditer(text)]


def kernel_name(text: str) -> str:
    """The name of a module's kernel, its first function."""
    found = re.search(r"tt\.func .*?" + CALLEE.pattern, text)
    return found[1].strip('"') if found else "?"


def parse_module(text: str) -> Function:
    """The kernel in a module inlined to one function. Raises UnsupportedKernel where the text is not understood."""
    return Parser(text).parse()


class Parser:
    def __init__(self, text: str):
        self.lines: list[str] = []
        self.locations: dict[str, str] = {}
        self.known_places: dict[str, tuple[tuple[str, int], ...]] = {}
        for line in text.splitlines():
            if found := LOCATION_LINE.match(line):
                self.locations[found[1]] = found[2]
            elif line.strip():
                self.lines.append(line.strip())
        self.at = 0
        self.scopes: list[dict[str, Value]] = [{}]
        self.divisors: dict[Value, int] = {}
        self.taken: set[str] = {*PROGRAM, *GRID, EXTENTS}

    # -- names, types and places

    def places(self, text: str) -> tuple[tuple[str, int], ...]:
        """Files and lines that a location stands for: where it is written, then who calls that, and so on."""
        if text not in self.known_places:
            self.known_places[text] = ()  # a location that contains itself ends here
            if found := re.match(r"callsite\((.*) at (#loc\w*)\)$", text):
                places = self.places(found[1]) + self.places(found[2])
            elif text.startswith("#loc"):
                places = self.places(self.locations.get(text, ""))
            elif found := re.match(r'"[^"]*"\((#loc\w*)\)', text):
                places = self.places(found[1])
            else:
                found = FILE_LOCATION.match(text)
                places = ((found[1], int(found[2])),) if found else ()
            self.known_places[text] = places
        return self.known_places[text]

    def location(self, text: str) -> tuple[str, int] | None:
        """The innermost line that is not Triton's own."""
        places = self.places(text)
        written = [place for place in places if "/triton/language/" not in place[0].replace("\\", "/")]
        return next(iter(written or places), None)

    def define(self, name: str, type_: Type, op: Op | None = None) -> Value:
        clean = c_name(name.lstrip("%"))
        unique, count = clean, 1
        while unique in self.taken:
            count += 1
            unique = f"{clean}_r{count}"
        self.taken.add(unique)
        value = Value(unique, type_, op)
        self.scopes[-1][name] = value
        return value

    def lookup(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise UnsupportedKernel(f"Triton IR uses an undefined value {name}: {self.lines[self.at]}")

    def split_location(self, line: str) -> tuple[str, tuple[str, int] | None]:
        at = line.rfind(" loc(")
        if at < 0 or not line.endswith(")"):
            return line, None
        return line[:at].rstrip(), self.location(line[at + 5 : -1])

    # -- structure

    def parse(self) -> Function:
        functions: dict[str, FlatFunction] = {}
        while self.at < len(self.lines):
            if self.lines[self.at].startswith("tt.func"):
                function = self.parse_function()
                functions[function.name] = function
            else:
                self.at += 1
        kernel = next(iter(functions.values()))
        function = Function(c_name(kernel.name), kernel.args, inlined(functions, kernel), self.divisors)
        normalize(function)
        function.number()
        return function

    def parse_function(self) -> FlatFunction:
        header = re.sub(r' loc\("[^"]*"(\(#loc\w*\))?\)| loc\([^()]*\)', "", self.lines[self.at])
        name = CALLEE.search(header)[1]
        inside = header[
            header.index("(") + 1 : header.rindex(") attributes") if ") attributes" in header else header.rindex(")")
        ]
        self.scopes.append({})
        function = FlatFunction(name, [])
        for found in re.finditer(r"(%[\w.$-]+): ([^%]+)", inside):
            arg = self.define(found[1], types_in(found[2])[0])
            function.args.append(arg)
            if (promise := DIVISIBILITY.search(found[2])) and arg.type.element != "ptr":
                self.divisors[arg] = int(promise[1])
        self.at += 1
        function.blocks, _ = self.parse_region()
        self.scopes.pop()
        return function

    def parse_region(self) -> tuple[dict[str, Block], str]:
        """Blocks by label, up to the line that closes the region; that line is returned too."""
        blocks: dict[str, Block] = {}
        label, block = "entry", Block()
        while not (line := self.lines[self.at]).startswith("}"):
            if line.startswith("^bb"):
                if block.ops:
                    blocks[label], block = block, Block()
                label = LABEL.match(line)[0]
                self.parse_block_args(block)
            else:
                block.ops.append(self.parse_op())
        blocks[label] = block
        self.at += 1
        return blocks, line

    def parse_block_args(self, block: Block) -> None:
        line = re.sub(r" loc\(callsite\([^()]*\)\)| loc\([^()]*(\([^()]*\))?\)", "", self.lines[self.at])
        block.args += [self.define(f[1], types_in(f[2])[0]) for f in re.finditer(r"(%[\w.$-]+): ([^%]+)", line)]
        self.at += 1

    def parse_block(self) -> tuple[Block, str]:
        """The only block of a region, in a scope of its own, and the line that closes the region."""
        self.scopes.append({})
        blocks, closing = self.parse_region()
        self.scopes.pop()
        (block,) = blocks.values()
        return block, closing

    def parse_op(self) -> Op:
        line, location = self.split_location(self.lines[self.at])
        names: list[tuple[str, int]] = []
        if found := RESULTS.match(line):
            for name in found[1].split(", "):
                base, _, count = name.partition(":")
                names.append((base, int(count or 1)))
            line = line[found.end() :]
        op = Op(OP_NAME.match(line)[1], location=location)
        if op.name == "scf.for":
            self.parse_for(op, line)
        elif op.name == "scf.if":
            self.parse_if(op, line)
        elif op.name == "scf.while":
            self.parse_while(op, line)
        elif op.name in ("tt.reduce", "tt.scan", "tt.map_elementwise"):
            self.parse_reduce(op, line)
        else:
            self.parse_plain(op, line)
            self.at += 1
        types = op.attrs.pop("types", [])
        flat = [(base if count == 1 else f"{base}#{k}", count) for base, count in names for k in range(count)]
        for (name, _), type_ in zip(flat, types, strict=False):
            op.results.append(self.define(name, type_, op))
        if len(op.results) != len(flat):
            raise UnsupportedKernel(f"Triton IR not understood (result types): {self.lines[self.at - 1]}")
        return op

    def parse_for(self, op: Op, line: str) -> None:
        head = re.match(r"scf\.for (?:unsigned )?(%[\w.$-]+) = (\S+) to (\S+) step (\S+)", line)
        op.operands = [self.lookup(head[k]) for k in (2, 3, 4)]
        op.attrs["unsigned"] = line.startswith("scf.for unsigned")
        carried = re.search(r"iter_args\((.*?)\) -> \((.*)\)  ?: ", line)
        induction = re.search(r" : (\w+) \{$", line)
        inits = [self.lookup(init) for init in re.findall(r" = (%[\w.#$-]+)", carried[1])] if carried else []
        op.operands += inits
        self.scopes.append({})
        args = [self.define(head[1], Type(induction[1]) if induction else Type("index"))]
        if carried:
            args += [
                self.define(name, init.type)
                for name, init in zip(re.findall(r"(%[\w.$-]+) = ", carried[1]), inits, strict=True)
            ]
        self.at += 1
        block, _ = self.parse_block()
        self.scopes.pop()
        block.args = args
        if not carried:
            block.ops.append(Op("scf.yield"))  # not printed where it yields nothing
        op.blocks = [block]
        op.attrs["types"] = [init.type for init in inits]

    def parse_if(self, op: Op, line: str) -> None:
        op.operands = [self.lookup(OPERAND.search(line)[0])]
        op.attrs["types"] = types_in(line.split("->", 1)[1]) if "->" in line else []
        self.at += 1
        block, closing = self.parse_block()
        op.blocks = [block]
        if closing.startswith("} else"):
            op.blocks.append(self.parse_block()[0])

    def parse_while(self, op: Op, line: str) -> None:
        inits = re.search(r"scf\.while(?: \((.*?)\))? : \((.*?)\) -> ", line)
        pairs = re.findall(r"(%[\w.$-]+) = (%[\w.#$-]+)", inits[1] or "")
        op.operands = [self.lookup(init) for _, init in pairs]
        result = line.rsplit(" -> ", 1)[1]
        op.attrs["types"] = types_in(result)
        self.scopes.append({})
        before_args = [self.define(name, value.type) for (name, _), value in zip(pairs, op.operands, strict=True)]
        self.at += 1
        before, _ = self.parse_block()
        self.scopes.pop()
        before.args = before_args
        after, _ = self.parse_block()
        op.blocks = [before, after]

    def parse_reduce(self, op: Op, line: str) -> None:
        op.operands = [self.lookup(name) for name in OPERAND.findall(line.split("<{")[0].split("({")[0])]
        if axis := re.search(r"axis = (\d+)", line):
            op.attrs["axis"] = int(axis[1])
        if pack := re.search(r"pack = (\d+)", line):
            op.attrs["pack"] = int(pack[1])
        op.attrs["reverse"] = "reverse = true" in line
        self.at += 1
        self.scopes.append({})
        blocks, closing = self.parse_region()
        self.scopes.pop()
        op.blocks = list(blocks.values())
        if len(blocks) > 1:
            op.attrs[LABELS] = list(blocks)
        closing, op.location = self.split_location(closing)
        op.attrs["types"] = types_in(closing.rsplit("->", 1)[1])

    # -- plain ops

    def parse_plain(self, op: Op, line: str) -> None:
        body = line[len(op.name) + (2 if line.startswith('"') else 0) :]
        if op.name == "arith.constant":
            op.attrs["value"], op.attrs["types"] = parse_constant(body)
            return
        if op.name.startswith("cf."):
            op.operands = [self.lookup(name) for name in OPERAND.findall(body)]
            op.attrs["targets"] = LABEL.findall(body)
            return
        if op.name == "tt.call":
            op.attrs["callee"] = CALLEE.search(body)[1]
            body = CALLEE.sub("(", body)
        if op.name in ("tt.print", "tt.assert", "tt.elementwise_inline_asm"):
            written = STRING.search(body)
            op.attrs["text"], body = unescape(written[1]), body[: written.start()] + body[written.end() :]
        colon = body.rfind(" : ")
        while colon > 0 and body[:colon].count("{") != body[:colon].count("}"):
            colon = body.rfind(" : ", 0, colon)
        if colon < 0:  # what has no operands may have results: tt.elementwise_inline_asm "..." {...} -> i64
            colon = body.rfind(" -> ")
        head, tail = (body[:colon], body[colon:]) if colon >= 0 else (body, "")
        plain_head = re.sub(r"\{.*\}|<\{.*\}>", "", head)
        op.operands = [self.lookup(name) for name in OPERAND.findall(plain_head)]
        op.attrs["template"] = OPERAND.sub("%", plain_head)
        op.attrs["words"] = re.findall(r"[A-Za-z_]\w*", op.attrs["template"])
        if braces := re.search(r"\{(.*)\}", head):
            for key, value in re.findall(r"([\w.]+) = (array<i\d+(?:: [^>]*)?>|\"[^\"]*\"|[-\w.]+)", braces[1]):
                op.attrs[key] = parse_attribute(value)
        for key, value in re.findall(r"\b(\w+) = ([\w]+)", plain_head):
            op.attrs[key] = value
        op.attrs["types"] = result_types(op, tail)


def unescape(text: str) -> str:
    """What a string of MLIR's printer stands for: bytes of UTF-8, some as two hex digits."""
    plain = re.sub(rb"\\([0-9A-F]{2}|\\)", lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1], 16)]), text.encode())
    return plain.decode(errors="replace")


def parse_attribute(text: str) -> object:
    if text.startswith("array<"):
        inside = text[:-1].partition(":")[2].strip()
        return tuple(int(item) for item in inside.split(",")) if inside else ()
    if text.startswith('"'):
        return text[1:-1]
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def parse_constant(body: str) -> tuple[str, list[Type]]:
    """(literal as printed, [type]) of `arith.constant`'s text."""
    body = re.sub(r"^ \{.*?\}", "", body).strip()
    if body in ("true", "false"):
        return body, [Type("i1")]
    literal, _, type_text = body.rpartition(" : ")
    if found := re.match(r"dense<(.*)>$", literal):
        literal = found[1]
    return literal, types_in(type_text)


def result_types(op: Op, tail: str) -> list[Type]:
    """Result types from the part after the colon, by how each op prints it."""
    if op.name == "tt.split":
        return 2 * types_in(tail.rsplit("->", 1)[1])
    if "->" in tail:
        return types_in(tail.rsplit("->", 1)[1])
    if " to " in tail:
        return types_in(tail.rsplit(" to ", 1)[1])
    types = types_in(tail)
    if op.name in ("arith.cmpi", "arith.cmpf"):
        return [Type("i1", types[0].shape)]
    if op.name == "arith.select":
        return types[-1:]
    if op.name == "tt.load":
        return [Type(types[0].pointee, types[0].shape)] if types else []
    return types[:1]
