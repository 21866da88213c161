"""Reads the loops of a kernel from its disassembly: which instructions every turn executes, and which only some do.

A function's code is cut into basic blocks. A block is executed in every turn of a loop if all ways back to the loop's
head lead through it; the others are rare paths, such as rescaling an output.
"""

from __future__ import annotations

import collections
import dataclasses
import re

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")

# The classes of reference tables, in their order; opcodes that none lists are "other".
CLASSES = {
    "matrix": "OMMA QMMA IMMA HMMA",
    "float": "FFMA FADD FMUL FSETP FSEL FSET HADD2 HFMA2 HMUL2",
    "MUFU": "MUFU",
    "max": "FMNMX FMNMX3 VIMNMX",
    "byte, logic": "LOP3 PRMT SHF SEL PLOP3 R2P P2R BFE LOP",
    "integer": "IMAD IADD3 IADD LEA ISETP IABS UIADD3 ULEA UIMAD USHF ULOP3",
    "moves": "MOV UMOV S2R S2UR CS2R R2UR",
    "shared loads": "LDS LDSM",
    "conversions": "F2FP F2F I2F F2I",
    "shuffles": "SHFL",
    "waiting": "NOP",
}
CLASS_OF = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


@dataclasses.dataclass
class Loop:
    """How often each opcode, suffixes included, occurs in a loop: in every turn, and in some turns only."""

    always: collections.Counter
    sometimes: collections.Counter

    @property
    def instructions(self) -> int:
        return self.always.total() + self.sometimes.total()

    def count(self, name: str) -> int:
        """Instructions of every turn whose opcode without suffixes is `name`."""
        return sum(n for opcode, n in self.always.items() if _name(opcode) == name)


def instruction(line: str) -> tuple[int, str] | None:
    """(address, text) of a line of `cuobjdump -sass`, or None where it holds no instruction."""
    match = INSTRUCTION.match(line)
    return (int(match[1], 16), match[2]) if match else None


def _opcode(text: str) -> str:
    return PREDICATE.sub("", text).split()[0]


def _name(opcode: str) -> str:
    return opcode.split(".")[0]


def _blocks(code):
    """(first, end) of each basic block, and its successors."""
    at = {address: i for i, (address, _) in enumerate(code)}
    target = lambda text: at.get(int(match[1], 16)) if (match := TARGET.search(text)) else None  # noqa: E731
    starts = {0}
    for i, (_, text) in enumerate(code):
        name = _name(_opcode(text))
        if name in ("BRA", "EXIT", "RET", "BRX", "BSYNC"):
            starts.add(i + 1)
        if name in ("BRA", "BSSY"):
            starts.add(target(text))
    starts = sorted(x for x in starts if x is not None and x < len(code))
    blocks = list(zip(starts, [*starts[1:], len(code)]))
    number = {first: n for n, (first, _) in enumerate(blocks)}
    successors = []
    for _, end in blocks:
        text = code[end - 1][1]
        name, rest = _name(_opcode(text)), PREDICATE.sub("", text)
        conditional = rest != text or re.match(r"BRA\S*\s+!?U?[PR]\w*,|BRA\.(DIV|CONV)", rest) is not None
        following = []
        if name == "BRA":
            following.append(number[target(text)])
        if name not in ("BRA", "EXIT", "RET", "BRX") or conditional:
            following.append(number.get(end))
        successors.append([n for n in following if n is not None])
    return blocks, successors


def _dominators(successors):
    everything = set(range(len(successors)))
    before = [[] for _ in successors]
    for n, following in enumerate(successors):
        for other in following:
            before[other].append(n)
    dominators = [{0}] + [everything] * (len(successors) - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(successors)):
            ways = [dominators[other] for other in before[n]]
            new = (set.intersection(*ways) if ways else set()) | {n}
            if new != dominators[n]:
                dominators[n], changed = new, True
    return dominators, before


def main_loop(code: list[tuple[int, str]], product: str) -> Loop | None:
    """The loop whose every turn executes the most `product` instructions; the innermost of equals.

    Args:
      code: (address, text) of a function's instructions, in order.
      product: an opcode, such as "OMMA".
    """
    blocks, successors = _blocks(code)
    dominators, before = _dominators(successors)
    loops: dict[int, tuple[set, list]] = {}
    for n, following in enumerate(successors):
        for head in following:
            if head not in dominators[n]:
                continue
            body, ends = loops.setdefault(head, ({head}, []))
            ends.append(n)
            stack = [n]
            while stack:
                if (one := stack.pop()) not in body:
                    body.add(one)
                    stack += before[one]
    count = lambda numbers: collections.Counter(  # noqa: E731
        _opcode(code[i][1]) for n in numbers for i in range(*blocks[n])
    )
    best = None
    for body, ends in loops.values():
        always = set.intersection(*(dominators[n] for n in ends)) & body
        loop = Loop(count(always), count(body - always))
        rank = (loop.count(product), -loop.instructions)
        if loop.count(product) and (best is None or rank > best[0]):
            best = (rank, loop)
    return best[1] if best else None


def by_class(opcodes: collections.Counter) -> dict[str, int]:
    """Instructions of each of CLASSES, and "other". Suffixes of opcodes are ignored."""
    counts = {name: 0 for name in (*CLASSES, "other")}
    for name, n in opcodes.items():
        counts[CLASS_OF.get(_name(name), "other")] += n
    return counts
