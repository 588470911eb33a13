"""What a cubin's disassembly says: tensor-core instructions, spills, and one hazard of Hopper.

On sm_90 a `wgmma` may read its A operand from registers while it runs behind the program. ptxas has
had a bug that overwrites such registers before the wait (triton issue 9433). `hazards` walks every path
of the disassembly from each register-A HGMMA to the `WARPGROUP.DEPBAR` that waits for its group and
reports the instructions between that write one of its registers.
"""

import re
from collections import Counter
from dataclasses import dataclass

TENSOR = ("UTCHMMA", "UTCQMMA", "UTCIMMA", "HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA")
# A warp holds a 64 x (32 bytes) A tile of one wgmma in four registers per thread.
A_REGISTERS = 4

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:T|\d+))\s+)?([A-Z][\w.]*)\s*([^;]*);")
_FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)")
_REGISTER = re.compile(r"^[-~|!]*R(\d+)(?:\.|\b)")
_PREDICATE = re.compile(r"^!?U?P(?:T|R|\d+)$")
# The first operand of these is a source, an address or a predicate; no vector register is written.
_NO_RESULT = re.compile(
    r"^(?:ST[A-Z]*|RED[GS]?|LDGSTS|LDGDEPBAR|DEPBAR|WARPGROUP|WARPSYNC|BAR|BSSY|BSYNC|BREAK|BRA|BRX|JMP|CALL"
    r"|EXIT|RET|KILL|NOP|YIELD|NANOSLEEP|BPT|MEMBAR|FENCE|ERRBAR|CCTL[A-Z]*|SYNCS|ACQBULK|[A-Z]*SETP2?|PLOP3"
    r"|FCHK|R2P|R2UR|QSPC|ELECT|U[A-Z].*)$"
)
_WIDE_TYPES = {"F64", "S64", "U64"}


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: byte address, guard predicate, full opcode, operands."""

    address: int
    guard: str | None
    opcode: str
    operands: tuple[str, ...]
    function: str = ""

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".", 1)[0]

    @property
    def always(self) -> bool:
        """Whether no predicate can switch the instruction off."""
        return self.guard in (None, "PT", "UPT")

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"/*{self.address:04x}*/ {guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Hazard:
    """A write to registers that an HGMMA in flight still reads."""

    reader: Instruction
    writer: Instruction
    registers: tuple[int, ...]

    def __str__(self) -> str:
        names = ", ".join(f"R{r}" for r in self.registers)
        return f"{self.writer} writes {names} before the wait for {self.reader}"


def parse(text: str) -> list[Instruction]:
    """The instructions of `cuobjdump --dump-sass` output, in order; other lines are skipped."""
    found, function = [], ""
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            function = match[1]
        elif match := _LINE.match(line):
            operands = tuple(o.strip() for o in match[4].split(",") if o.strip())
            found.append(Instruction(int(match[1], 16), match[2], match[3], operands, function))
    return found


def _result_width(instruction: Instruction) -> int:
    """How many consecutive registers the result takes; the larger number where the text is ambiguous."""
    name, modifiers = instruction.name, instruction.opcode.split(".")[1:]
    if shape := re.search(r"GMMA\.64x(\d+)x\d+\.(\w+)", instruction.opcode):
        columns = int(shape[1])
        return columns // (4 if shape[2] == "F16" else 2)
    if name in ("HMMA", "QMMA"):
        return 2 if modifiers[1:2] == ["F16"] else 4
    if name == "IMMA":
        return 4
    if name == "DMMA":
        return 8
    if name in ("LDSM", "LDSMT"):
        return int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 1
    if name == "LDTM":
        return max((int(m[1:]) for m in modifiers if re.fullmatch(r"x\d+", m)), default=1)
    for bits in (256, 128, 64):
        if str(bits) in modifiers:
            return bits // 32
    if name == "CS2R":
        return 1 if "32" in modifiers else 2
    if "WIDE" in modifiers or name in ("DADD", "DMUL", "DFMA") or re.fullmatch(r"F[A-Z]+2", name):
        return 2
    if name in ("F2F", "F2I", "I2F", "I2I") and _WIDE_TYPES.intersection(modifiers):
        return 2
    return 1


def written(instruction: Instruction) -> frozenset[int]:
    """The numbers of the vector registers an instruction writes."""
    if _NO_RESULT.match(instruction.name) or instruction.guard == "!PT":
        return frozenset()
    for operand in instruction.operands:
        if match := _REGISTER.match(operand):
            first = int(match[1])
            return frozenset(range(first, first + _result_width(instruction)))
        # SHFL, LOP3, atomics and others name a predicate result first.
        if not _PREDICATE.match(operand):
            return frozenset()
    return frozenset()


def register_a(instruction: Instruction) -> frozenset[int]:
    """The registers an HGMMA reads its A operand from; empty where A is in shared memory."""
    if not instruction.name.endswith("GMMA") or len(instruction.operands) < 2:
        return frozenset()
    match = _REGISTER.match(instruction.operands[1])
    return frozenset(range(int(match[1]), int(match[1]) + A_REGISTERS)) if match else frozenset()


def _successors(instructions: list[Instruction], index: dict[int, int], i: int) -> list[int]:
    instruction = instructions[i]
    after = [i + 1] if i + 1 < len(instructions) else []
    if instruction.name in ("EXIT", "RET") and instruction.always:
        return []
    if instruction.name in ("BRA", "CALL", "JMP"):
        target = next((int(o, 16) for o in reversed(instruction.operands) if o.startswith("0x")), None)
        reached = [index[target]] if target in index else []
        # A branch can also be switched off by a predicate among its operands.
        leaves = instruction.name != "CALL" and instruction.always and len(instruction.operands) == 1
        return reached if leaves and reached else reached + after
    return after


def _function_hazards(instructions: list[Instruction]) -> list[Hazard]:
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    found: dict[tuple[int, int], Hazard] = {}
    # A path carries the groups committed and not yet waited for, oldest first, and the open group last.
    paths = [(0, ((),))]
    seen = set(paths)
    while paths:
        i, groups = paths.pop()
        instruction = instructions[i]
        changed = written(instruction)
        for j in {j for group in groups for j in group}:
            if overlap := register_a(instructions[j]) & changed:
                found[j, i] = Hazard(instructions[j], instruction, tuple(sorted(overlap)))
        if instruction.name.endswith("GMMA"):
            if register_a(instruction) and i not in groups[-1]:
                groups = (*groups[:-1], (*groups[-1], i))
            if "gsb0" in instruction.operands:
                groups = (*groups, ())
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR") and instruction.always:
            pending = int(instruction.operands[-1], 16)
            groups = groups[max(0, len(groups) - 1 - pending) :]
        for following in _successors(instructions, index, i):
            # Empty groups at the front are waited for already; more than eight never are in flight.
            state = (following, groups[-9:])
            if state not in seen:
                seen.add(state)
                paths.append(state)
    return [found[key] for key in sorted(found)]


def hazards(text: str) -> list[Hazard]:
    """Every write to an A register of an HGMMA before its wait, in `cuobjdump --dump-sass` output.

    Raises ValueError for text without instructions, so that an unreadable dump cannot pass.
    """
    functions: dict[str, list[Instruction]] = {}
    for instruction in parse(text):
        functions.setdefault(instruction.function, []).append(instruction)
    if not functions:
        raise ValueError("the text holds no SASS instructions; expected the output of cuobjdump --dump-sass")
    return [hazard for body in functions.values() for hazard in _function_hazards(body)]


def tensor_instructions(instructions: list[Instruction]) -> Counter[str]:
    """How often each tensor-core instruction occurs, such as {'HGMMA': 52}."""
    return Counter(i.name for i in instructions if i.name in TENSOR)


def spills(instructions: list[Instruction]) -> tuple[int, int]:
    """The local-memory stores and loads (STL, LDL)."""
    names = Counter(i.name for i in instructions)
    return names["STL"], names["LDL"]
