"""Mutants of C++ by schemata: all of them in one instrumented copy of the sources, compiled once, chosen at run time by the number in the global ``fastadapt_mutant``.

A mutable expression e becomes ``(fastadapt_mutant == 17 ? (after) : (e))``, a deletable statement ``{ if (fastadapt_mutant != 18) s }``, nested ones included. Places are found in
the syntax tree: every one of the kinds of `alternatives`, nothing is picked by hand. What a run-time number cannot change (a condition of ``if constexpr``, an integer among
template arguments) is a mutant of its own source text, compiled by itself. Left out, by rule: other constant expressions (array bounds, constexpr declarations, case labels,
sizeof: the sizes of buffers and loops are changed where they are used), macros, code under ``#if`` or ``#ifdef FASTADAPT_MUTATION`` (the build of the mutants differs there: it
guards its memory), and the update of a for loop, whose change never ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import tree_sitter_cpp
from tree_sitter import Language, Node, Parser

VARIABLE = "fastadapt_mutant"
DECLARATION = f'extern "C" int {VARIABLE};\n'
_PARSER = Parser(Language(tree_sitter_cpp.language()))
_CONSTANT = (
    "template_argument_list",
    "sizeof_expression",
    "static_assert_declaration",
    "enumerator",
    "optional_parameter_declaration",
    "preproc_def",
    "preproc_function_def",
    "preproc_call",
)
_SWAPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_OFFSETS = "stride,row,ld,width,rank,chunk,Panel,panel,Tile,tile,kBlock,layout,size,c +,+ c,j0,n0,k0,r0,+ j,+ i,+ r,+ k,+ q".split(",")
_WORDS = (("bias", ("bias", "b_up", "b_down", "bu +", "bd +")), ("scale", ("scale",)), ("offset", tuple(_OFFSETS)))


class Rules(NamedTuple):
    """What the places of a family of kernels are called."""

    scales: tuple[str, ...] = ("scale", "adapter_scale", "input_scale")
    """Fields that hold a scale: they become 1."""
    flags: tuple[str, ...] = ("add",)
    """Arguments that say whether a tile is the first of a sum: they become true and false."""
    barriers: tuple[str, ...] = ("sync_block", "sync_warp", "cp_async_commit", "cp_async_wait", "__syncthreads", "__syncwarp")
    """Calls whose loss is a mutant of its own kind, and whose template arguments are counts of what may still be under way."""
    spelled: tuple[tuple[str, str], ...] = ((r"FASTADAPT_KERNEL\([^()]*\)", "void"), (r"\b(FASTADAPT_DEVICE|__\w+__)(?!\w|\()", ""))
    """What a C++ parser does not know -> the word that it sees instead, no longer than it."""


class Mutant(NamedTuple):
    number: int
    file: str
    line: int
    kind: str
    before: str
    after: str
    start: int
    end: int
    static: bool

    def apply(self, source: str) -> str:
        """The source with this one change, for mutants that are compiled by themselves."""
        return source[: self.start] + self.after + source[self.end :]


def text(node: Node) -> str:
    return (node.text or b"").decode()


def operator(node: Node) -> str:
    found = node.child_by_field_name("operator")
    return "" if found is None else text(found)


def side(node: Node, name: str) -> str:
    found = node.child_by_field_name(name)
    assert found is not None, f"{node.type} without {name}: {text(node)}"
    return text(found)


def kind_of_arithmetic(expression: str, symbol: str) -> str:
    """The kind of a sum or product, from what it is about."""
    for kind, words in _WORDS:
        if any(word in expression for word in words):
            return kind
    return "product" if symbol in "*/" else "sign"


def can_be_negated(condition: Node) -> bool:
    """Comparisons, negations, and conjunctions have mutants of their own that say the same or more."""
    return condition.type in ("identifier", "field_expression", "call_expression", "subscript_expression")


def alternatives(node: Node, rules: Rules) -> Iterator[tuple[str, str]]:
    """(kind, text after) of every change of an expression at run time."""
    parent = node.parent
    if node.type == "binary_expression":
        left, symbol, right = side(node, "left"), operator(node), side(node, "right")
        if symbol in _SWAPPED:
            loop = parent is not None and parent.type == "for_statement"
            yield "loop" if loop else "condition" if symbol in ("==", "!=") else "bound", f"{left} {_SWAPPED[symbol]} {right}"
            if loop and symbol == "<" and parent is not None:
                update = parent.child_by_field_name("update")
                step = side(update, "right") if update is not None and update.type == "assignment_expression" else "1"
                yield "loop", f"{left} < ({right}) - ({step})"
        elif symbol in ("+", "-"):
            yield kind_of_arithmetic(text(node), symbol), f"{left} {'-' if symbol == '+' else '+'} {right}"
        elif symbol in ("*", "/"):
            yield kind_of_arithmetic(text(node), symbol), left
        elif symbol in ("&&", "||", "&"):
            yield from (("mask", operand) if symbol == "&" else ("condition", f"static_cast<bool>({operand})") for operand in (left, right))
    elif node.type == "unary_expression" and operator(node) in ("!", "-"):
        argument = side(node, "argument")
        yield ("condition", f"static_cast<bool>({argument})") if operator(node) == "!" else ("sign", argument)
    elif node.type == "conditional_expression":
        condition = node.child_by_field_name("condition")
        if condition is not None and can_be_negated(condition):
            yield "condition", f"!({text(condition)}) ? ({side(node, 'consequence')}) : ({side(node, 'alternative')})"
    elif node.type == "call_expression":
        function, arguments = side(node, "function"), side(node, "arguments")
        if swapped := re.match(r"std::(min|max)\b(.*)", function, re.DOTALL):
            yield "bound", f"std::{'max' if swapped[1] == 'min' else 'min'}{swapped[2]}{arguments}"
        elif function == "std::abs":
            yield "sign", arguments
        elif function.endswith(".neg"):
            yield "sign", function.removesuffix(".neg")
    elif node.type == "number_literal":
        number = text(node)
        if re.search(r"[.eE]|f$", number) and not number.startswith("0x"):
            value = float(number.rstrip("fF"))
            yield "constant", (f"{value * 1.1!r}" if value else "0.5") + ("f" if number[-1] in "fF" else "")
        elif number == "0" and parent is not None and parent.type == "init_declarator" and parent.parent is not None and parent.parent.parent is not None:
            if parent.parent.parent.type == "for_statement":
                yield "loop", "1"
    elif node.type in ("true", "false"):
        yield "condition", "false" if node.type == "true" else "true"
    elif node.type == "identifier" and text(node) in rules.flags and parent is not None and parent.type == "argument_list":
        yield "first tile", "true"
        yield "later tile", "false"
    elif node.type == "field_expression" and side(node, "field") in rules.scales and parent is not None and parent.type != "assignment_expression":
        yield "scale", "1.f"
    elif node.type == "assignment_expression" and operator(node) in ("+=", "-="):
        yield "accumulation", f"{side(node, 'left')} = {side(node, 'right')}"


class _Instrumented:
    """One file: its mutants, and its text with all of them that are not among ``broken``."""

    def __init__(self, file: str, source: str, rules: Rules, first: int, broken: frozenset[int]) -> None:
        self.file, self.rules, self.next, self.broken = file, rules, first, broken
        self.bytes = source.encode()
        assert source.isascii(), f"{file}: offsets of the syntax tree count bytes"
        seen = source
        for pattern, word in rules.spelled:
            seen = re.sub(pattern, lambda m, word=word: word.ljust(len(m[0])), seen)  # type: ignore[misc]
        self.mutants: list[Mutant] = []
        tree = _PARSER.parse(seen.encode())
        self.complain(tree.root_node)
        self.text = DECLARATION + self.render(tree.root_node)

    def complain(self, node: Node) -> None:
        """What is not understood must not be skipped in silence. (A macro call without a semicolon is understood.)"""
        if node.type == "ERROR":
            raise SyntaxError(f"{self.file}:{node.start_point[0] + 1}: not understood: {text(node)[:80]!r}")
        for child in node.children:
            if child.has_error:
                self.complain(child)

    def add(self, node: Node, kind: str, after: str, static: bool = False) -> int:
        line, before = node.start_point[0] + 1, self.bytes[node.start_byte : node.end_byte].decode()
        self.mutants.append(Mutant(self.next, self.file, line, kind, before, after, node.start_byte, node.end_byte, static))
        self.next += 1
        return self.next - 1

    def choice(self, node: Node, kind: str, after: str, otherwise: str) -> str:
        """Each on a line of its own, so that a compiler's message names one mutant."""
        number = self.add(node, kind, after)
        return otherwise if number in self.broken else f"({VARIABLE} == {number} ?\n({after}) /*{number}*/:\n({otherwise}))"

    def render(self, node: Node) -> str:
        if node.type in _CONSTANT or self.is_constant(node):
            self.static(node)
            return self.bytes[node.start_byte : node.end_byte].decode()
        out, at = "", node.start_byte
        for i, child in enumerate(node.children):
            out += self.bytes[at : child.start_byte].decode()
            field = node.field_name_for_child(i)
            if (node.type, field) in (("for_statement", "update"), ("array_declarator", "size"), ("case_statement", "value")):
                out += self.bytes[child.start_byte : child.end_byte].decode()
            elif node.type == "if_statement" and field == "condition" and any(c.type == "constexpr" for c in node.children):
                condition = self.bytes[child.start_byte : child.end_byte].decode()
                self.add(child, "condition", f"(!{condition})", static=True)
                out += condition
            else:
                out += self.render(child)
            at = child.end_byte
        out += self.bytes[at : node.end_byte].decode()
        parent = node.parent
        if node.type in ("identifier", "field_expression", "call_expression", "subscript_expression") and parent is not None and parent.type == "condition_clause":
            if parent.parent is not None and parent.parent.type == "if_statement":
                out = self.choice(node, "condition", f"!({text(node)})", f"static_cast<bool>({out})")
        if node.type == "comma_expression" and parent is not None and parent.type in ("expression_statement", "comma_expression"):
            for kept in ("left", "right"):
                out = self.choice(node, "deleted", f"static_cast<void>({side(node, kept)})", f"static_cast<void>({out})")
        for kind, after in alternatives(node, self.rules):
            out = self.choice(node, kind, after, out)
        if self.is_deletable(node):
            called = re.match(r"(?:\w+::)*(\w+)", text(node))
            kind = "barrier" if called and called[1] in self.rules.barriers else "deleted"
            number = self.add(node, kind, ";")
            if number not in self.broken:
                out = f"{{ if ({VARIABLE} != {number})\n{out} }}"
        return out

    def is_constant(self, node: Node) -> bool:
        if node.type in ("preproc_if", "preproc_ifdef"):
            return "FASTADAPT_MUTATION" in text(node).splitlines()[0] or text(node).startswith("#if ")
        return node.type in ("declaration", "field_declaration") and any(text(c) == "constexpr" for c in node.children)

    def is_deletable(self, node: Node) -> bool:
        if node.parent is None or any(c.is_missing for c in node.children) or text(node) == ";":
            return False
        if node.type == "expression_statement":
            return node.parent.type != "for_statement" or node.parent.child_by_field_name("body") == node
        return node.type in ("continue_statement", "break_statement") or (node.type == "return_statement" and len(node.children) == 2)

    def static(self, node: Node) -> None:
        """Template arguments of a barrier: one more may be under way."""
        called = node.parent.child_by_field_name("name") if node.type == "template_argument_list" and node.parent is not None else None
        if called is not None and text(called) in self.rules.barriers:
            for child in node.named_children:
                self.add(child, "wait count", f"({text(child)}) + 1", static=True)


def instrument(sources: dict[str, str], rules: Rules, broken: frozenset[int] = frozenset()) -> tuple[dict[str, str], list[Mutant]]:
    """The instrumented files, and every mutant. ``broken``: numbers of mutants that do not compile and are left out of the files."""
    files: dict[str, str] = {}
    mutants: list[Mutant] = []
    for file, source in sources.items():
        made = _Instrumented(file, source, rules, len(mutants) + 1, broken)
        files[file] = made.text
        mutants += made.mutants
    return files, mutants


def blamed(messages: str, files: dict[str, str], names: Sequence[str]) -> set[int]:
    """The mutants that a compiler's errors in instrumented files speak of."""
    found: set[int] = set()
    for name, line in re.findall(r"^(\S+?):(\d+):\d+: (?:fatal )?error:", messages, re.MULTILINE):
        file = next((f for f in names if name.endswith(f)), None)
        if file is not None:
            around = files[file].splitlines()[int(line) - 1]
            numbers = re.findall(r"/\*(\d+)\*/", around) or re.findall(rf"{VARIABLE} == (\d+) \?", around)
            found |= {int(n) for n in numbers}
    return found
