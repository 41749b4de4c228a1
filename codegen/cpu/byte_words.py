"""Products with bytes that lie four to a word, as quantized weights do.

    bytes = (w[:, None, :] >> 8 * arange(0, 4)[None, :, None]).to(int8)       w: [K / 4, N] of int32
    dot(a, reshape(bytes, [K, N]), c)    -->    dot(a, w, c), whose right operand is words

Instructions that multiply and add four bytes take w as it is: bytes of one word follow each other along k.
"""

from .affine import AffineAnalysis, Map, through_view
from .ir import Block, Op, Value

BYTES = 4  # in a word


def multiply_words(body: Block) -> None:
    """Let dots read words in place, and drop what nothing else reads then."""
    found = False
    for op in body.walk():
        if op.name == "tt.dot" and op.operands[0].type.element == "i8":
            words = words_of(op.operands[1])
            if words is not None:
                op.operands[1], found = words, True
    if found:
        drop_unread(body)


def words_of(value: Value) -> Value | None:
    """The words, [K / 4, N], whose bytes `value` [K, N] is, the lowest first; None if it is made in another way."""
    op = value.op
    if op is None or op.name != "tt.reshape" or value.type.shape[0] % BYTES:
        return None
    rows, columns = value.type.shape[0] // BYTES, value.type.shape[1]
    narrow = op.operands[0]
    if narrow.type.shape != (rows, BYTES, columns) or narrow.op is None or narrow.op.name != "arith.trunci":
        return None
    shifted = narrow.op.operands[0]
    if shifted.type.element != "i32" or shifted.op is None or shifted.op.name not in ("arith.shrsi", "arith.shrui"):
        return None
    words, distance = shifted.op.operands
    at: Map = (0, 1, 2)
    form = AffineAnalysis(set()).of(distance, at)
    if form is None or form.terms or form.constant or form.coefficients != ((1, 8),):
        return None
    while at != (0, 2) and (inner := through_view(words, at)) is not None:
        words, at = inner
    return words if at == (0, 2) and words.type.shape == (rows, columns) else None


def drop_unread(body: Block) -> None:
    """Remove reshapes that no op reads, and what only they read."""
    while True:
        read = {value for op in body.walk() for value in op.operands}
        dropped = False
        for block in blocks_of(body):
            kept = [op for op in block.ops if not is_unread(op, read)]
            dropped |= len(kept) < len(block.ops)
            block.ops[:] = kept
        if not dropped:
            return


def is_unread(op: Op, read: set[Value]) -> bool:
    moves = ("tt.reshape", "arith.trunci", "arith.shrsi", "arith.shrui", "tt.broadcast", "tt.expand_dims")
    return op.name in moves and op.result not in read


def blocks_of(block: Block) -> list[Block]:
    return [block, *(inner for op in block.walk() for inner in op.blocks)]
