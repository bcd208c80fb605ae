"""Reads the text of a program that XLA has optimised: computations, instructions, source frames."""

import collections
import math
import re
from typing import NamedTuple

# Bytes of one element. Other types (tokens, opaque) hold no data.
ELEMENT_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2,
    "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
# The metadata of a kernel of Pallas for TPU, on lines of its own within an instruction.
_SPLIT_ATTRIBUTE = re.compile(r'=\{\n("[^\n]*)\n\}')
_TABLE = re.compile(r"(FileNames|FunctionNames|FileLocations|StackFrames)\s*$")
_TABLE_ROW = re.compile(r'(\d+) (?:"(.*)"|\{(.*)\})')


class ArrayType(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        return ELEMENT_BYTES[self.dtype] * self.size


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      arrays: of its result; those of a tuple in order, nested ones flattened.
      opcode: "fusion", "dot", "all-gather-start", ...
      operands: names of instructions of the same computation.
      text: the operands and all that follows them.
      is_root: its value is that of the computation.
    """

    name: str
    arrays: tuple[ArrayType, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    is_root: bool

    @property
    def size(self) -> int:
        """Elements of the result."""
        return sum(array.size for array in self.arrays)

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(array.bytes for array in self.arrays)

    def attribute(self, name: str) -> str | None:
        """Returns the word after `name=`, without a percent sign; None where there is none."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.text)
        return match and match[1]

    def numbers(self, name: str) -> list[int]:
        """Returns the integers of `name={0,1}`, or of the JSON list `"name":["0","1"]`."""
        match = re.search(rf'\b{name}"?[=:]\s*[{{\[]([\d", ]*)[}}\]]', self.text)
        return [int(number) for number in re.findall(r"\d+", match[1])] if match else []

    @property
    def op_name(self) -> str:
        """The path of JAX transformations and primitives that it came from."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match[1] if match else ""


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """Attributes:
    computations: {name: {instruction's name: instruction}}, in the order of execution.
    entry: the name of the computation that runs first.
    frames: {stack_frame_id: "file:function" from the innermost to the outermost}.
    """

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, ...]]

    def frames_of(self, instruction: Instruction) -> tuple[str, ...]:
        number = instruction.attribute("stack_frame_id")
        return self.frames.get(int(number), ()) if number else ()


def array_types(text: str) -> tuple[ArrayType, ...]:
    """Parses the arrays of a type: "(f32[2,3]{1,0}, token[])" holds one."""
    return tuple(
        ArrayType(dtype, tuple(int(side) for side in shape.split(",") if side))
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", text)
        if dtype in ELEMENT_BYTES
    )


def parse_program(text: str) -> Program:
    """Parses the text of `Compiled.as_text()`. Raises ValueError where it has no entry."""
    computations: dict[str, Computation] = {}
    tables: dict[str, dict] = collections.defaultdict(dict)
    entry, computation, table = None, None, None
    for line in _SPLIT_ATTRIBUTE.sub(r"={\1}", text).splitlines():
        if match := _INSTRUCTION.match(line):
            root, name, type_, opcode, rest = match.groups()
            if computation is not None:
                computation[name] = Instruction(
                    name, array_types(type_), opcode, _operands(rest), rest, bool(root)
                )
        elif match := _COMPUTATION.match(line):
            computation = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _TABLE.match(line):
            table = tables[match[1]]
        elif table is not None and (match := _TABLE_ROW.match(line)):
            fields = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", match[3] or "")}
            table[int(match[1])] = match[2] if match[2] is not None else fields
    if entry is None:
        raise ValueError("the text has no ENTRY computation; it is no optimised HLO module")
    return Program(computations, entry, _stack_frames(tables))


def _operands(rest: str) -> tuple[str, ...]:
    """The names up to the parenthesis that closes the operands."""
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += (rest[end] == "(") - (rest[end] == ")")
        end += 1
    return tuple(re.findall(r"%([\w.\-]+)", rest[:end]))


def _stack_frames(tables: dict[str, dict]) -> dict[int, tuple[str, ...]]:
    stack, locations = tables["StackFrames"], tables["FileLocations"]
    frames = {}
    for number in stack:
        chain, at = [], number
        while at in stack and len(chain) < len(stack):
            location = locations[stack[at]["file_location_id"]]
            file = tables["FileNames"][location["file_name_id"]]
            chain.append(f"{file}:{tables['FunctionNames'][location['function_name_id']]}")
            # XLA writes the parent's number plus one: 1 is no frame, as the outermost has.
            at = stack[at].get("parent_frame_id", 1) - 1
        frames[number] = tuple(chain)
    return frames
