"""Reads the machine code of a kernel: control flow, the main loop, and what one trip through it does.

The loop that counts is the innermost one with the most tensor work, and of it the steady state: the path from its
head back to it with all tensor work and the fewest other instructions. That drops what a trip through a persistent
kernel does once per tile and the loops in which a thread waits for a barrier. Dominators after Cooper, Harvey and
Kennedy 2001; natural loops after Aho, Lam, Sethi and Ullman, section 9.6.
"""

import re
from collections import Counter
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"(?:^|[ ,])0x([0-9a-f]+)$")
MMA = re.compile(r"H?GMMA\.(\d+)x(\d+)x(\d+)|[HI]MMA\.(16)(8)(\d+)")
WIDTH = re.compile(r"\.(U8|S8|U16|S16|64|128)\b")

BRANCHES = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "CALL")
JUMPS = ("BRA", "JMP", "CALL")
"""Those that name an address."""
WIDTH_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
WARP = 32


class Instruction(NamedTuple):
    predicate: str
    """`@P0`, `@!UP1` or empty."""
    opcode: str
    """With its modifiers, as HMMA.16816.F32.BF16."""
    operands: str

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def idle(self) -> bool:
        """Whether it never does anything: filler that the assembler predicates off."""
        return self.predicate in ("@!PT", "@!UPT") or self.base == "NOP"

    @property
    def target(self) -> int | None:
        """The address that it jumps to."""
        found = TARGET.search(self.operands) if self.base in JUMPS else None
        return int(found[1], 16) if found else None

    @property
    def width(self) -> int:
        """Bytes that one thread moves."""
        found = WIDTH.search(self.opcode)
        return WIDTH_BYTES[found[1]] if found else 4

    @property
    def flops(self) -> int:
        """Tensor operations of one warp; a warpgroup's instruction is shared by its four warps."""
        found = MMA.match(self.opcode)
        if not found:
            return 0
        m, n, k = (int(size) for size in found.groups() if size)
        return 2 * m * n * k // (4 if "GMMA" in self.base else 1)


class Flow(NamedTuple):
    """Control flow of one kernel."""

    blocks: list[list[Instruction]]
    successors: list[list[int]]


class Loop(NamedTuple):
    header: int
    blocks: frozenset[int]


class Body(NamedTuple):
    """What one warp does in a stretch of code. Bytes are of the whole warp."""

    instructions: int
    flops: int
    mma: frozenset[str]
    """HMMA, HGMMA, IMMA."""
    dtypes: frozenset[str]
    """BF16, F16, TF32, ... as the tensor instructions name their operands."""
    loads: dict[int, int]
    """How many loads from global memory into registers, by bytes per thread."""
    copies: dict[int, int]
    """How many asynchronous copies from global to shared memory (cp.async), by bytes per thread."""
    tma: int
    """Copies of whole tiles by the tensor memory accelerator."""
    stores: dict[int, int]
    """How many stores to global memory, by bytes per thread."""
    tma_stores: int
    commits: int
    """Groups of asynchronous copies."""
    wait: int | None
    """Groups that may be in flight past the strictest wait; None without a wait."""
    mma_wait: int | None
    """The same of warpgroup tensor instructions."""
    shared_bytes: int
    """Read from and written to shared memory by load, store and tensor instructions; without the asynchronous fill."""
    others: dict[str, int]
    """How many of every kind of instruction, by base opcode."""


def parse(text: str) -> Flow:
    """The control flow of a function in nvdisasm's text, an instruction a line."""
    code = {int(found[1], 16): Instruction(found[2] or "", found[3], found[4].strip()) for found in LINE.finditer(text)}
    targets = {instruction.target for instruction in code.values()}
    blocks: list[list[Instruction]] = [[]]
    starts: dict[int, int] = {}
    for address, instruction in code.items():
        if address in targets:
            if blocks[-1]:
                blocks.append([])
            starts[address] = len(blocks) - 1
        blocks[-1].append(instruction)
        if instruction.base in BRANCHES:
            blocks.append([])
    return Flow(blocks, [_successors(i, blocks, starts) for i in range(len(blocks))])


def _successors(i: int, blocks: list[list[Instruction]], starts: dict[int, int]) -> list[int]:
    after = [i + 1] if i + 1 < len(blocks) else []
    if not blocks[i] or blocks[i][-1].base not in BRANCHES:
        return after
    last = blocks[i][-1]
    # ptxas also leaves loops by calling what follows them, so a call is a jump that may or may not be taken.
    conditional = last.predicate or last.base == "CALL" or re.search(r"U?P\d", last.operands)
    return ([starts[last.target]] if last.target in starts else []) + (after if conditional else [])


def reachable(flow: Flow) -> list[int]:
    """Blocks that can run, in reverse postorder."""
    order, seen, stack = [], {0}, [(0, iter(flow.successors[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((b for b in rest if b not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(flow.successors[following])))
    return order[::-1]


def predecessors(flow: Flow) -> dict[int, list[int]]:
    """Of the blocks that can run, in reverse postorder."""
    order = reachable(flow)
    before: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in flow.successors[block]:
            before[following].append(block)
    return before


def dominators(flow: Flow) -> dict[int, set[int]]:
    """The blocks that every path to a block passes, for each block that can run."""
    before = predecessors(flow)
    found = {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in list(before)[1:]:
            # In reverse postorder, one block before it at least is known; an unknown one limits nothing yet.
            new = set.intersection(*(found[b] for b in before[block] if b in found)) | {block}
            changed |= new != found.get(block)
            found[block] = new
    return found


def natural_loops(flow: Flow) -> list[Loop]:
    """One per loop head: all blocks that reach a jump back to it without passing it."""
    before = predecessors(flow)
    members: dict[int, set[int]] = {}
    for latch, above in dominators(flow).items():
        for header in set(flow.successors[latch]) & above:
            inside = members.setdefault(header, {header})
            stack = [latch]
            while stack:
                block = stack.pop()
                if block not in inside:
                    inside.add(block)
                    stack += before[block]
    return [Loop(header, frozenset(blocks)) for header, blocks in members.items()]


def steady_path(flow: Flow, loop: Loop) -> list[Instruction]:
    """One trip through the loop: the path from its head to a jump back with the most tensor work, of those the
    shortest. Loops inside it count as passed once."""
    best: dict[int, tuple[int, int, int | None]] = {}  # block -> (tensor work, -instructions, next block) from here on
    for block in reversed(reachable(flow)):
        if block not in loop.blocks:
            continue
        onwards = [(*best[b][:2], b) for b in flow.successors[block] if b in best and b != loop.header]
        if loop.header in flow.successors[block]:
            onwards.append((0, 0, None))
        if onwards:
            flops, short, following = max(onwards, key=lambda way: way[:2])
            code = [instruction for instruction in flow.blocks[block] if not instruction.idle]
            best[block] = (flops + sum(i.flops for i in code), short - len(code), following)
    path: list[Instruction] = []
    block: int | None = loop.header
    while block is not None:
        path += flow.blocks[block]
        block = best[block][2]
    return path


def product_loops(flow: Flow) -> list[Body]:
    """The steady states of the innermost loops with tensor work, that with the most of it first, of equals the
    shortest."""
    loops = natural_loops(flow)
    working = [loop for loop in loops if any(i.flops for b in loop.blocks for i in flow.blocks[b])]
    innermost = [loop for loop in working if not any(other.blocks < loop.blocks for other in working)]
    bodies = [count(steady_path(flow, loop)) for loop in innermost]
    return sorted(bodies, key=lambda body: (-body.flops, body.instructions))


def count(code: list[Instruction]) -> Body:
    code = [instruction for instruction in code if not instruction.idle]
    others = Counter(i.base for i in code)
    tensor = [i for i in code if i.flops]
    return Body(
        instructions=len(code),
        flops=sum(i.flops for i in tensor),
        mma=frozenset(i.base for i in tensor),
        dtypes=frozenset(_dtype(i) for i in tensor),
        loads=dict(Counter(i.width for i in code if i.base == "LDG")),
        copies=dict(Counter(i.width for i in code if i.base == "LDGSTS")),
        tma=others["UTMALDG"],
        stores=dict(Counter(i.width for i in code if i.base == "STG")),
        tma_stores=others["UTMASTG"],
        commits=others["LDGDEPBAR"],
        wait=min((_last_number(i) for i in code if i.base == "DEPBAR" and "SB0" in i.operands), default=None),
        mma_wait=min((_last_number(i) for i in code if i.opcode.startswith("WARPGROUP.DEPBAR")), default=None),
        shared_bytes=sum(_shared_bytes(i) for i in code),
        others=dict(others),
    )


def _dtype(instruction: Instruction) -> str:
    """Of a tensor instruction's operands; a 16-bit float is what it does not name."""
    named = [part for part in instruction.opcode.split(".") if part in ("BF16", "TF32", "E4M3", "E5M2", "S8", "U8")]
    return named[0] if named else "F16"


def _last_number(instruction: Instruction) -> int:
    found = re.findall(r"0x([0-9a-f]+)", instruction.operands)
    return int(found[-1], 16) if found else 0


def _shared_bytes(instruction: Instruction) -> int:
    base = instruction.base
    if base in ("LDS", "STS"):
        return instruction.width * WARP
    if base in ("LDSM", "STSM"):
        matrices = 4 if instruction.opcode.endswith(".4") else 2 if instruction.opcode.endswith(".2") else 1
        return matrices * 128
    if base in ("HGMMA", "QGMMA", "IGMMA"):
        # Operand rows are 32 bytes per instruction in every type. The left one may come from registers.
        left = 64 if instruction.operands.split(",")[1].strip().startswith("gdesc") else 0
        return (left + int(MMA.match(instruction.opcode)[2])) * 32 // 4
    return 0
