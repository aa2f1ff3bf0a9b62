"""Runs PTX, the code that nvcc really emitted, on a CPU: operand order of inline assembly, address arithmetic, predication and all.

    module = ptx.load(text)                       # the PTX of one source file
    kernel = module["bottleneck_forward<"]        # by any part of the demangled name that only one kernel has
    memory = ptx.Memory()
    params = memory.pack(Params, writable={"y"}, x=x, y=y, rows=77)
    kernel.launch((2,), (128,), shared_bytes, params, memory)

All threads of several blocks run in lock step as numpy vectors, one element ("lane") per thread. Where threads part, those with the smallest program counter go first; barriers and
warp-wide instructions wait for the threads they need. Copies of `cp.async` arrive at the last legal moment, when a wait retires their group; until then their destination holds
NaN, as does shared memory that nobody wrote. Accesses are checked for bounds and alignment. What is not known raises `Unknown`, what a kernel does wrong raises `Fault`, both with
the instruction and its source line.

Not shown: races (the emulator looks for them), time, and the rounding of the hardware, which here is:
- fma is rounded to fp64 and then to fp32, wrong in about one case of 2^29;
- the products of an mma are summed in fp32 in an order of their own;
- approximations (`ex2.approx` and so on) are correctly rounded, or with ``perturb=1`` or ``-1`` off by their documented error bound in that direction.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import itertools
import math
import re
import subprocess
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from .opcodes import OPCODES, PARAM_WINDOW, POISON, SHARED_WINDOW, WARP, Copy, Mask, Step, bits_of, dtype_of, mma, nothing

Perturb = int | Mapping[str, int]
LANES = 1024  # lanes of one batch of blocks: where numpy's cost per call stops to matter


class Fault(Exception):
    """The kernel did something wrong."""


class Unknown(NotImplementedError):
    """The interpreter does not know this instruction."""


# ---- global memory


class Buffer:
    """A piece of memory at an address of its own."""

    def __init__(self, name: str, base: int, data: np.ndarray, size: int, writable: bool) -> None:
        """``data`` are bytes that start where ``base`` rounded down to 16 would."""
        self.name, self.base, self.size, self.writable, self._skip, self._data = name, base, size, writable, base % 16, data
        self._words: dict[tuple[int, int], np.ndarray] = {}

    @property
    def end(self) -> int:
        return self.base + self.size

    def words(self, size: int, vector: int = 1) -> np.ndarray:
        """Bytes as rows of `vector` unsigned numbers; `row` gives the index of an address."""
        if (size, vector) not in self._words:
            whole = self._data[: self._data.size // (size * vector) * (size * vector)]
            self._words[size, vector] = whole.view(f"u{size}").reshape(-1, vector)
        return self._words[size, vector]

    def row(self, address: np.ndarray, bytes_: int) -> np.ndarray:
        return (address - (self.base - self._skip)) // bytes_


class Memory:
    """Global memory: the tensors a kernel may touch, and nothing else.

    Every tensor gets an address that is not its real one, as aligned as the real one up to 64 bytes, and lies across a multiple of 2^32: an address that lost its upper half, or a
    carry into it, is out of bounds.
    """

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._kept: list[Any] = []

    def add(self, tensor: Any, name: str = "buffer", *, writable: bool = True) -> int:
        """The address of a tensor's or numpy array's first element. The bytes from there to its last one may be read and, if ``writable``, written, gaps between rows too."""
        if isinstance(tensor, np.ndarray):
            pointer, element, shape, strides = tensor.ctypes.data, tensor.itemsize, tensor.shape, [s // tensor.itemsize for s in tensor.strides]
        else:
            pointer, element, shape, strides = tensor.data_ptr(), tensor.element_size(), tensor.shape, tensor.stride()
        size = element * (1 + sum((n - 1) * s for n, s in zip(shape, strides))) if math.prod(shape) else 0
        skip = pointer % 16
        data = np.ctypeslib.as_array((ctypes.c_uint8 * (size + skip)).from_address(pointer - skip)) if size else np.zeros(0, np.uint8)
        base = (len(self.buffers) + 1 << 36) - (size // 2 & ~63) + pointer % 64
        self.buffers.append(Buffer(name, base, data, size, writable))
        self._kept.append(tensor)
        return base

    def add_ranges(self, ranges: Iterable[tuple[int, int, bool]]) -> None:
        """Memory at its real addresses, in place of tensors: first byte, number of bytes, whether it may be written."""
        for begin, size, writable in sorted(ranges):
            data = np.ctypeslib.as_array((ctypes.c_uint8 * (size + begin % 16)).from_address(begin - begin % 16))
            self.buffers.append(Buffer(f"range {len(self.buffers)}", begin, data, size, writable))

    def pack(self, struct: type[ctypes.Structure], *, writable: Collection[str] = (), **fields: Any) -> bytes:
        """The bytes of a parameter struct. A tensor or array given for a field is added to the memory under the field's name; None is a null pointer."""
        unknown = fields.keys() - {name for name, *_ in struct._fields_}
        assert not unknown, f"{struct.__name__} has no {sorted(unknown)}"
        value = struct()
        for name, field in fields.items():
            if hasattr(field, "data_ptr") or isinstance(field, np.ndarray):
                field = self.add(field, name, writable=name in writable)
            setattr(value, name, field)
        return bytes(value)

    def at(self, address: int) -> Buffer | None:
        """The last buffer that starts at or before an address."""
        i = bisect_right(self.buffers, address, key=lambda b: b.base)
        return self.buffers[i - 1] if i else None


# ---- the text


class Instruction(NamedTuple):
    index: int
    opcode: str
    parts: list[str]  # the opcode cut at its dots
    args: list[str]
    predicate: str | None
    negated: bool
    text: str
    place: str  # "file:line", and where that was inlined

    def fault(self, message: str) -> Fault:
        return Fault(f"{message}\n  in {self.text}\n  at {self.place or 'an unknown line'}")

    def unknown(self, what: str = "") -> Unknown:
        return Unknown(f"{self.opcode}{what and ': ' + what}\n  in {self.text}\n  at {self.place or 'an unknown line'}")

    @property
    def registers(self) -> set[str]:
        return set(_REGISTER.findall(" ".join(self.args) + f" {self.predicate}"))

    @property
    def written(self) -> set[str]:
        return set(_REGISTER.findall(self.args[0])) if self.args else set()

    @property
    def branches(self) -> bool:
        return self.parts[0] in ("bra", "ret", "exit")

    @property
    def members(self) -> str | None:
        """Who must run this together: a block, a warp, or the lanes of a warp that an operand names."""
        name = ".".join(self.parts[:2])
        if name in ("bar.sync", "barrier.sync"):
            return "block"
        if self.parts[0] in ("mma", "ldmatrix"):
            return "warp"
        return self.args[-1] if name in ("shfl.sync", "vote.sync", "bar.warp") else None


_WORDS = re.compile(r"(%?[A-Za-z_][\w$]*)")
_REGISTER = re.compile(r"%?[A-Za-z_][\w$]*(?:@\d+)?")
_INSTRUCTION = re.compile(r"(?:@(!?)\s*([%\w$@]+)\s+)?([\w.:]+)\s*(.*)$")
_ARGUMENT = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")
_STATEMENT = re.compile(
    r"""\s*(?: (?P<brace>[{}])
             | \.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n]*?(?:inlined_at\s+(?P<outer_file>\d+)\s+(?P<outer_line>\d+))?[^\n]*\n
             | (?P<label>[$%\w]+):(?!:)
             | (?P<text>[^;]+); )""",
    re.VERBOSE,
)


class Module:
    """The kernels of one PTX file by their demangled names."""

    def __init__(self, text: str) -> None:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
        files = {number: path.rpartition("/")[2] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
        entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text))
        outside = re.sub(r"\{[^{}]*\}", "", text[: entries[0].start()] if entries else text)
        names = subprocess.run(["c++filt"], input="\n".join(e[1] for e in entries), capture_output=True, text=True, check=True).stdout.split("\n")
        self.kernels = {name: Kernel(name, entry[2], entry[3], outside, text, entry.end(), files) for name, entry in zip(names, entries)}

    def __getitem__(self, part: str) -> Kernel:
        found = [name for name in self.kernels if part in name]
        if part in self.kernels:
            found = [part]
        if len(found) != 1:
            raise KeyError(f"{part!r} is in {len(found)} of the names {list(self.kernels)}")
        return self.kernels[found[0]]


load = Module


class Kernel:
    def __init__(self, name: str, params: str, directives: str, outside: str, text: str, start: int, files: Mapping[str, str]) -> None:
        self.name, self._text, self._start, self._files = name, text, start, files
        bounds = {key: math.prod(map(int, re.findall(r"\d+", value))) for key, value in re.findall(r"\.(maxntid|reqntid)([\d, ]+)", directives)}
        self.max_threads: int = bounds.get("reqntid", bounds.get("maxntid", 1024))
        self.params: dict[str, int] = {}
        size = 0
        for align, kind, param, count in re.findall(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^,)]*?)?([\w$]+)(?:\[(\d+)\])?\s*(?=,|$)", params):
            bytes_ = int(kind[1:]) // 8
            self.params[param] = size = -(-size // int(align or bytes_)) * int(align or bytes_)
            size += bytes_ * int(count or 1)
        self.param_bytes = size
        self._outside = outside
        self.instructions: list[Instruction] = []
        self._machines: dict[Any, Machine] = {}

    def parse(self) -> None:
        """Reads the body, on first use: instructions, labels, registers, shared variables; what can be said of them without a machine."""
        if self.instructions:
            return
        self._read()
        for i in {i.opcode: i for i in self.instructions}.values():
            known(i)
        last = len(self.instructions)
        # Per instruction, the next one at or after it that may change who runs: for all lanes together, and for some of them, when warp-wide instructions may have to wait.
        self.next_branch, self.next_any = [last] * (last + 1), [last] * (last + 1)
        for i in reversed(self.instructions):
            self.next_branch[i.index] = i.index if i.branches else self.next_branch[i.index + 1]
            self.next_any[i.index] = i.index if i.branches or i.members else self.next_any[i.index + 1]
        self.batches = {batch[-1].index: batch for batch in self._batches()}
        self.batched = {i.index for batch in self.batches.values() for i in batch}

    def _batches(self) -> Iterator[list[Instruction]]:
        """An mma touches registers only and may wait until its result is wanted: those that can wait for each other run as one, in the place of the last, which saves most time."""
        labels, pending = set(self.labels.values()), []
        used: set[str] = set()
        written: set[str] = set()
        for i in self.instructions:
            is_mma = i.parts[0] == "mma"
            if pending:
                conflict = i.registers & written or (not is_mma and i.written & used) or (is_mma and i.opcode != pending[0].opcode)
                if conflict or i.branches or i.index in labels:
                    yield pending
                    pending, used, written = [], set(), set()
            if is_mma:
                pending.append(i)
                used |= i.registers
                written |= i.written
        if pending:
            yield pending

    def _read(self) -> None:
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int | None] = {}  # register, or the letters it starts with and "<" -> bits, 1 for predicates
        self.declared: collections.Counter[int] = collections.Counter()  # bits -> how many registers
        instructions: list[Instruction] = []
        scopes: list[dict[str, str]] = [{}]  # declared in nested braces: name -> unique name
        declared, place, counter, position = [self._outside], "", itertools.count(1), self._start
        while scopes:
            m = _STATEMENT.match(self._text, position)
            position = m.end()
            if m["brace"] == "{":
                scopes.append(dict(scopes[-1]))
            elif m["brace"]:
                scopes.pop()
            elif m["line"]:
                place = f"{self._files.get(m['file'], '?')}:{m['line']}"
                place += f", inlined at {self._files.get(m['outer_file'], '?')}:{m['outer_line']}" if m["outer_file"] else ""
            elif m["label"]:
                self.labels[m["label"]] = len(instructions)
            else:
                text = " ".join(m["text"].split())
                if text.startswith(".reg"):
                    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text).groups()
                    for name in names.split(","):
                        base, many = re.match(r"\s*([%\w$]+)(?:<(\d+)>)?", name).groups()
                        if len(scopes) > 1:
                            scopes[-1][base] = base = f"{base}@{next(counter)}"
                        self.widths[base + "<" * bool(many)] = bits = bits_of(kind)
                        self.declared[bits] += int(many or 1)
                elif text.startswith("."):
                    declared.append(text + ";")
                else:
                    if scopes[-1]:
                        text = "".join(scopes[-1].get(word, word) for word in _WORDS.split(text))
                    instructions.append(_instruction(len(instructions), text, place))
        self.symbols, self.static_shared = _shared_variables("\n".join(declared))
        if any(re.match(r"\.local", d) for d in declared):
            raise Unknown(f"{self.name} has local memory (a spill, or an array that is indexed at run time)")
        self.instructions = instructions

    def width(self, register: str) -> int | None:
        """Bits of a register; None for what is none."""
        if register not in self.widths:
            self.widths[register] = self.widths.get(register.rstrip("0123456789") + "<")
        return self.widths[register]

    def launch(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, params: bytes, memory: Memory, *, perturb: Perturb = 0, lanes: int = LANES) -> int:
        """Runs a launch and returns how many instructions that took, each counted once for all threads that run it together.

        Args:
            grid, block: 1 to 3 numbers, x first.
            shared_bytes: dynamic shared memory.
            params: the kernel's arguments, laid out as in the kernel's signature.
            perturb: 0, or 1 or -1 for approximations that are off by their documented bound; ``{"ex2": 1, "rcp": -1}`` names opcodes.
            lanes: how many threads are to run at once, rounded down to whole blocks.
        """
        grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        threads, blocks = math.prod(block), math.prod(grid)
        if threads % WARP or threads > self.max_threads:
            raise Fault(f"{self.name}: {threads} threads in a block; a multiple of {WARP} up to {self.max_threads} is wanted")
        if len(params) != self.param_bytes:
            raise Fault(f"{self.name}: {len(params)} bytes of parameters, the kernel has {self.param_bytes}")
        self.parse()
        key = (block, shared_bytes, max(1, min(blocks, lanes // threads)))
        with np.errstate(all="ignore"):
            if key not in self._machines:
                self._machines.clear()  # one takes tens of MB
                self._machines[key] = Machine(self, *key)
            return self._machines[key].launch(grid, params, memory, perturb)


@functools.cache
def _opcode(text: str) -> list[str]:
    return [part.replace("§", "::") for part in text.replace("::", "§").split(".")]


def _instruction(index: int, text: str, place: str) -> Instruction:
    negated, predicate, opcode, rest = _INSTRUCTION.match(text).groups()
    arguments = _ARGUMENT.findall(rest) if "{" in rest or "[" in rest else rest.split(",")
    return Instruction(index, opcode, _opcode(opcode), [a for a in map(str.strip, arguments) if a], predicate, bool(negated), text, place)


def _shared_variables(declarations: str) -> tuple[dict[str, int], int]:
    """Offsets of the shared variables, and the bytes of the static ones; dynamic memory comes after those."""
    symbols, size = {}, 0
    for align, kind, name, count in re.findall(r"(?<!extern )\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?\s*;", declarations):
        bytes_ = int(kind[1:]) // 8
        symbols[name] = size = -(-size // int(align or bytes_)) * int(align or bytes_)
        size += bytes_ * int(count or 1)
    size = -(-size // 128) * 128
    symbols |= dict.fromkeys(re.findall(r"\.extern\s+\.shared[^;]*?([\w$]+)\[\]", declarations), size)
    return symbols, size


# ---- the machine


class Machine:
    """Registers, shared memory and compiled instructions for a number of blocks that run together."""

    def __init__(self, kernel: Kernel, block: tuple[int, ...], shared_bytes: int, blocks: int) -> None:
        self.kernel, self.block_size, self.blocks, self.threads = kernel, block, blocks, math.prod(block)
        n = self.n = blocks * self.threads
        self.params = np.zeros(-(-kernel.param_bytes // 16) * 16, np.uint8)[: kernel.param_bytes]
        self.shared_bytes = kernel.static_shared + shared_bytes
        pitch = -(-max(self.shared_bytes, 1) // 16) * 16
        self.shared = Buffer("shared memory", 0, np.zeros(blocks * pitch, np.uint8), blocks * pitch, True)
        self.shift = np.repeat(np.arange(blocks, dtype=np.int64) * pitch, self.threads)
        self.lane = np.arange(n) % WARP
        self.files = {bits: np.empty((count, n), np.bool_ if bits == 1 else f"u{bits // 8}") for bits, count in kernel.declared.items()}
        self.rows: dict[str, int] = {}  # register -> its row in the file of its width
        self.used = collections.Counter[int]()
        self.special = self._special_registers(shared_bytes)
        self.scratch64 = np.zeros(n)
        self.copies: list[Copy] = []
        self.committed = np.zeros(n, np.int64)
        # A step is built when it is first run: much of a kernel is for options that a launch does not have.
        self.steps: list[Step | None] = [None] * len(kernel.instructions)

    def _special_registers(self, dynamic_shared: int) -> dict[str, np.ndarray]:
        u32 = functools.partial(np.full, self.n, dtype=np.uint32)
        index = np.arange(self.n, dtype=np.uint32) % np.uint32(self.threads)
        special = {"%laneid": self.lane.astype(np.uint32), "%warpid": index // np.uint32(WARP), "%dynamic_smem_size": u32(dynamic_shared)}
        for axis, size in zip("xyz", self.block_size):
            special |= {f"%tid.{axis}": index % np.uint32(size), f"%ntid.{axis}": u32(size), f"%nctaid.{axis}": u32(0), f"%ctaid.{axis}": u32(0)}
            index = index // np.uint32(size)
        return special

    # -- what instructions are built from

    def row(self, name: str) -> int:
        """Of a register in the file of its width; rows are dealt out as registers come up."""
        if name not in self.rows:
            bits = self.kernel.width(name)
            self.rows[name] = self.used[bits]
            self.used[bits] += 1
            self._poison(self.files[bits][self.rows[name]])
        return self.rows[name]

    def register(self, name: str) -> np.ndarray:
        return self.files[self.kernel.width(name)][self.row(name)]

    @staticmethod
    def _poison(registers: np.ndarray) -> None:
        registers.view(np.uint8).fill(0 if registers.dtype == np.bool_ else POISON)

    def read(self, operand: str, kind: str, i: Instruction) -> np.ndarray:
        """An operand as a live view: one element per lane, or one element that stands for all."""
        dtype, bits = dtype_of(kind), bits_of(kind)
        if operand in self.special and bits == 32:
            return self.special[operand].view(dtype)
        if (width := self.kernel.width(operand)) is not None:
            register = self.register(operand)
            if (bits == 1) != (width == 1) or width < bits:
                raise i.unknown(f"{operand} has {width} bits")
            return register if bits == 1 else register.view(dtype)[:: width // bits]
        if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", operand):
            return np.array([int(m[1], 16)], f"u{len(m[1]) // 2}").view(dtype)
        if m := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", operand):
            return np.array([int(m[1], 0)]).astype(bool) if bits == 1 else np.array([int(m[1], 0) & (1 << bits) - 1], f"u{bits // 8}").view(dtype)
        symbol, _, offset = operand.partition("+")
        for where in (self.kernel.symbols, self.kernel.params):
            if symbol in where:
                return np.array([where[symbol] + int(offset or 0)], f"u{bits // 8}").view(dtype)
        raise i.unknown(f"operand {operand}")

    def target(self, operand: str, kind: str, i: Instruction) -> np.ndarray:
        """The register that an instruction writes, in its own width: a narrower result is extended by its sign."""
        width = self.kernel.width(operand)
        if width is None or width < bits_of(kind) or (width == 1) != (kind == "pred"):
            raise i.unknown(f"{operand} has {width} bits")
        register = self.register(operand)
        return register if width == 1 else register.view(dtype_of(kind) if width == bits_of(kind) else f"{'i' if kind[0] == 's' else 'u'}{width // 8}")

    def writer(self, operand: str, kind: str, i: Instruction) -> Callable[[np.ndarray, Mask], None]:
        """What stores a value of a type into a register."""
        if operand == "_":
            return lambda value, mask: None
        target, dtype = self.target(operand, kind, i), dtype_of(kind)
        if target.dtype == dtype:
            return lambda value, mask: np.copyto(target, value, where=mask, casting="unsafe")
        return lambda value, mask: np.copyto(target, value.astype(dtype, copy=False), where=mask, casting="unsafe")

    def full(self, operand: str, kind: str, i: Instruction) -> Callable[[], np.ndarray]:
        """What reads an operand as one element per lane."""
        value = self.read(operand, kind, i)
        return (lambda: value) if value.size == self.n else functools.partial(np.broadcast_to, value, self.n)

    def address(self, operand: str, i: Instruction) -> tuple[Callable[[], np.ndarray], int | None]:
        """What computes the addresses of an operand in brackets, and the address itself where it is a constant."""
        base, offset = re.fullmatch(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand).groups()
        offset = int(offset or 0)
        if (width := self.kernel.width(base)) is not None:
            register = self.read(base, "s64" if width == 64 else "u32", i)
            return (lambda: register + offset if register.itemsize == 8 else register.astype(np.int64) + offset), None
        constant = int(self.read(base, "s64", i)[0]) + offset
        return (lambda: np.full(self.n, constant)), constant

    def where(self, lane: int) -> str:
        thread, block = lane % self.threads, (self.first_block + lane // self.threads)
        return f"thread {thread} of block {block}"

    def locate(self, space: str, address: np.ndarray, lanes: np.ndarray | None, bytes_: int, i: Instruction, write: bool = False) -> list[tuple[Buffer, np.ndarray, np.ndarray]]:
        """Checks an access: per buffer, the addresses in it and which of the lanes they belong to."""
        lane_of = lambda k: int(k if lanes is None else lanes[k])
        what = f"{'write' if write else 'read'} of {bytes_} bytes"
        if np.bitwise_or.reduce(address) & (bytes_ - 1):
            k = int(np.argmax(address % bytes_ != 0))
            raise i.fault(f"misaligned {space} {what} at {int(address[k]):#x} by {self.where(lane_of(k))}")
        low, high = int(address.min()), int(address.max())
        if space == "generic":
            space, window = ("param", PARAM_WINDOW) if low >= PARAM_WINDOW else ("shared", SHARED_WINDOW) if low >= SHARED_WINDOW else ("global", 0)
            if window == 0 and high >= SHARED_WINDOW:
                raise i.unknown("generic addresses of several spaces in one instruction")
            address, low, high = address - window, low - window, high - window
        if space == "shared":
            if low < 0 or high + bytes_ > self.shared_bytes:
                k = int(np.argmax((address < 0) | (address + bytes_ > self.shared_bytes)))
                raise i.fault(f"shared {what} at {int(address[k])} of {self.shared_bytes} by {self.where(lane_of(k))}")
            return [(self.shared, address + (self.shift if lanes is None else self.shift[lanes]), slice(None))]
        if space == "param":
            if low < 0 or high + bytes_ > self.kernel.param_bytes or write:
                raise i.fault(f"parameter {what} at {low} to {high} of {self.kernel.param_bytes}")
            return [(Buffer("parameters", 0, self.params, self.params.size, False), address, slice(None))]
        buffer = self.memory.at(low)
        if buffer and high + bytes_ <= buffer.end and (buffer.writable or not write):
            return [(buffer, address, slice(None))]
        found = []
        starts = np.searchsorted([b.base for b in self.memory.buffers], address, "right") - 1
        for index in np.unique(starts):
            which = np.flatnonzero(starts == index)
            buffer, part = self.memory.buffers[index] if index >= 0 else None, address[which]
            if buffer is None or int(part.max()) + bytes_ > buffer.end or (write and not buffer.writable):
                k = int(which[np.argmax(part)])
                near = f"{buffer.name} + {int(address[k]) - buffer.base} of {buffer.size}{'' if buffer.writable else ', read-only'}" if buffer else "before all buffers"
                raise i.fault(f"global {what} at {int(address[k]):#x} ({near}) by {self.where(lane_of(k))}")
            found.append((buffer, part, which))
        return found

    # -- running

    def launch(self, grid: tuple[int, ...], params: bytes, memory: Memory, perturb: Perturb) -> int:
        self.params[:] = np.frombuffer(params, np.uint8)
        self.memory, self.perturb = memory, perturb
        blocks = math.prod(grid)
        return sum(self._run(grid, first, min(self.blocks, blocks - first)) for first in range(0, blocks, self.blocks))

    def _run(self, grid: tuple[int, ...], first: int, count: int) -> int:
        """Runs `count` blocks from the linear index `first`."""
        self.first_block = first
        index = np.repeat(np.arange(first, first + self.blocks, dtype=np.uint32), self.threads)
        for axis, size in zip("xyz", grid):
            self.special[f"%nctaid.{axis}"][:] = size
            self.special[f"%ctaid.{axis}"][:] = index % np.uint32(size)
            index = index // np.uint32(size)
        for bits, file in self.files.items():
            self._poison(file[: self.used[bits]])
        self.shared.words(1).fill(POISON)
        self.copies, self.executed = [], 0
        self.committed[:] = 0
        self.alive = np.arange(self.n) < count * self.threads
        self.parked: dict[int, np.ndarray] = {}
        self.groups: dict[int, Mask] = {0: True if count == self.blocks else self.alive}
        while self.groups or self._wake():
            pc = min(self.groups)
            self._advance(pc, self.groups.pop(pc))
        if self.copies:
            raise Fault(f"{self.kernel.name}: {self.where(int(self.copies[0].lanes[0]))} and others exit with copies in flight")
        return self.executed

    def _advance(self, pc: int, mask: Mask) -> None:
        """Runs a group until it parts, ends, waits, or reaches another group."""
        steps, end = self.steps, len(self.steps)
        stop = min(self.groups, default=end)
        following = self.kernel.next_branch if mask is True else self.kernel.next_any
        while True:
            special = min(following[pc], stop)
            self.executed += special - pc
            for index in range(pc, special):
                (steps[index] or self._build(index))(mask)
            pc = special
            if pc == stop:
                if pc < end:
                    return self._join(pc, mask)
                raise Fault(f"{self.kernel.name}: ran past its last instruction")
            i = self.kernel.instructions[pc]
            self.executed += 1
            if i.parts[0] == "bra":
                taken = self._taken(i)
                if taken is not True and not (part := taken if mask is True else taken & mask).all():
                    rest = ~taken if mask is True else ~taken & mask
                    if not part.any():
                        taken = False
                    elif rest.any():
                        self._join(pc + 1, rest)
                        return self._join(self.kernel.labels[i.args[0]], part)
                pc = self.kernel.labels[i.args[0]] if taken is not False else pc + 1
            elif i.parts[0] in ("ret", "exit"):
                leaving = self.alive if mask is True else mask
                if i.predicate is not None:
                    leaving = leaving & self._taken(i)
                self.alive = self.alive & ~leaving
                rest = ~leaving if mask is True else mask & ~leaving
                return self._join(pc + 1, rest) if rest.any() else None
            else:  # warp- or block-wide, and not all lanes are here
                here = self.parked.pop(pc, np.False_) | mask
                ready = self._ready(i, here)
                if (waiting := here & ~ready).any():
                    self.parked[pc] = waiting
                if not ready.any():
                    return None
                mask = True if ready.all() else ready
                following = self.kernel.next_branch if mask is True else self.kernel.next_any
                (steps[pc] or self._build(pc))(mask)
                pc += 1
            if pc >= stop:
                return self._join(pc, mask)

    def _join(self, pc: int, mask: Mask) -> None:
        if pc in self.groups:
            mask = True if self.groups[pc] is True or mask is True else self.groups[pc] | mask
        self.groups[pc] = True if mask is True or mask.all() else mask

    def _taken(self, i: Instruction) -> Mask:
        if i.predicate is None:
            return True
        predicate = self.register(i.predicate)
        return ~predicate if i.negated else predicate.copy()  # it outlives the register's value

    def _ready(self, i: Instruction, mask: np.ndarray) -> np.ndarray:
        """Those of the lanes at an instruction that need wait for nobody."""
        who = i.members
        if who == "block":
            return mask & np.repeat((mask | ~self.alive).reshape(self.blocks, -1).all(1), self.threads)
        here = mask.reshape(-1, WARP)
        wanted = np.ones_like(here)
        if who != "warp":
            values = np.broadcast_to(self.read(who, "u32", i), self.n).reshape(-1, WARP)
            union = np.bitwise_or.reduce(np.where(here, values, np.uint32(0)), axis=1)
            wanted = (union[:, None] >> np.arange(WARP, dtype=np.uint32) & 1).astype(bool)
            if (here & ~wanted).any():
                raise i.fault("a lane runs this that its own mask leaves out")
        return mask & np.repeat((here | ~wanted).all(1), WARP)

    def _wake(self) -> bool:
        """When nobody can run: those that waited for threads which have left since go on; if there are none, it is a deadlock."""
        for pc, mask in list(self.parked.items()):
            if self._ready(self.kernel.instructions[pc], mask).any():
                del self.parked[pc]
                self._join(pc, mask)
                return True
        if self.parked:
            at = lambda i, mask: f"{int(mask.sum())} threads, {self.where(int(np.argmax(mask)))} the first, wait at {i.text} ({i.place})"
            waits = "; ".join(at(self.kernel.instructions[pc], mask) for pc, mask in self.parked.items())
            raise Fault(f"{self.kernel.name}: deadlock: {waits}; {int((~self.alive).sum())} threads have left")
        return False

    # -- building

    def _build(self, index: int) -> Step:
        self.steps[index] = step = self._step(self.kernel.instructions[index])
        return step

    def _step(self, i: Instruction) -> Step:
        if i.branches:
            return nothing
        if i.members and i.predicate is not None:
            raise i.unknown("under a predicate")
        if i.index in self.kernel.batched:
            return mma(self, self.kernel.batches[i.index]) if i.index in self.kernel.batches else nothing
        step = known(i)(self, i)
        if i.predicate is None:
            return step
        predicate = self.register(i.predicate)
        if i.negated:
            return lambda mask: step(~predicate if mask is True else ~predicate & mask)
        return lambda mask: step(predicate if mask is True else predicate & mask)


def known(i: Instruction) -> Callable[[Machine, Instruction], Step]:
    """What builds the step of an instruction, if opcode and modifiers are known."""
    if i.branches:
        return lambda m, i: nothing
    name = next((n for n in (".".join(i.parts[:2]), i.parts[0]) if n in OPCODES), None)
    if name is None:
        raise i.unknown()
    build, allowed = OPCODES[name]
    if allowed is not None and (extra := [p for p in i.parts[name.count(".") + 1 : -1] if p not in allowed]):
        raise i.unknown(f"modifier {extra[0]}")
    return build
