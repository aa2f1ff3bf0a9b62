"""The engine of the C++ mutants, on small sources: what it finds, that each mutant does what it says and nothing else, and what becomes of a trial that crashes or does not end."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.mutation import cpp, forks, table

SOURCE = """
extern "C" int total(const int* at, int n, bool add) {
  int sum = 0;
  for (int i = 0; i < n; ++i) {
    if (at[i] == 3) continue;  // a comment
    sum += at[i];
  }
  if (!add) sum = 2 * sum;
  return n > 4 && add ? sum - 1 : sum;
}
"""
DEVICE = """
FASTADAPT_KERNEL(kThreads, 2) kernel(const __grid_constant__ Params p) {
  ptx::cp_async_wait<kStages - 2>();
  ptx::sync_block();
  if constexpr (kStages == 1) p.out[threadIdx.x] = 0.5f * p.scale;
}
FASTADAPT_DEVICE int lane() { return threadIdx.x & 31; }
"""
NUMBERS = [1, 2, 3, 4, 5]


def library(folder: Path, text: str) -> ctypes.CDLL:
    (folder / "source.cpp").write_text(text + f'extern "C" {{ int {cpp.VARIABLE} = 0; }}\n')
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", "source.cpp", "-o", "source.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "source.so"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_each_mutant_does_what_it_says(tmp_path: Path) -> None:
    files, mutants = cpp.instrument({"source.cpp": SOURCE}, cpp.Rules())
    built = library(tmp_path, files["source.cpp"])
    chosen = ctypes.c_int.in_dll(built, cpp.VARIABLE)

    def call(number: int, add: bool = True) -> int:
        chosen.value = number
        return built.total((ctypes.c_int * 6)(*NUMBERS, 100), 5, add)

    def number(kind: str, before: str, after: str) -> int:
        (found,) = [m for m in mutants if (m.kind, m.before, m.after) == (kind, before, after)]
        assert SOURCE.splitlines()[found.line - 1].count(before) and SOURCE[found.start : found.end] == before
        return found.number

    assert (call(0), call(0, False)) == (11, 24)
    assert call(number("loop", "i < n", "i <= n")) == 111
    assert call(number("loop", "i < n", "i < (n) - (1)")) == 7 - 1
    assert call(number("loop", "0", "1")) == 10
    assert call(number("condition", "at[i] == 3", "at[i] != 3")) == 2
    assert call(number("deleted", "continue;", ";")) == 14
    assert call(number("accumulation", "sum += at[i]", "sum = at[i]")) == 4
    assert call(number("deleted", "sum += at[i];", ";")) == -1
    assert call(number("condition", "!add", "static_cast<bool>(add)")) == 23
    assert call(number("product", "2 * sum", "2"), False) == 2
    assert call(number("bound", "n > 4", "n >= 4")) == 11
    assert call(number("condition", "n > 4 && add", "static_cast<bool>(n > 4)"), False) == 23
    assert call(number("sign", "sum - 1", "sum + 1")) == 13
    assert len({m.number for m in mutants}) == len(mutants) and not any(m.static for m in mutants)


def test_kernels_of_a_device() -> None:
    """Qualifiers and macros are no obstacle; waits, barriers and conditions of the compiler are found, the latter as sources of their own."""
    mutants = cpp.instrument({"kernel.cuh": DEVICE}, cpp.Rules())[1]
    seen = {(m.kind, m.before, m.after, m.static) for m in mutants}
    assert seen >= {
        ("barrier", "ptx::cp_async_wait<kStages - 2>();", ";", False),
        ("barrier", "ptx::sync_block();", ";", False),
        ("wait count", "kStages - 2", "(kStages - 2) + 1", True),
        ("condition", "(kStages == 1)", "(!(kStages == 1))", True),
        ("constant", "0.5f", "0.55f", False),
        ("scale", "p.scale", "1.f", False),
        ("mask", "threadIdx.x & 31", "threadIdx.x", False),
    }
    (wait,) = [m for m in mutants if m.kind == "wait count"]
    assert wait.apply(DEVICE) == DEVICE.replace("kStages - 2", "(kStages - 2) + 1")


def test_what_is_not_understood_is_not_skipped() -> None:
    with pytest.raises(SyntaxError, match=r"source\.cpp:2"):
        cpp.instrument({"source.cpp": "int f() {\n  return 1 +* ]; }\n"}, cpp.Rules())


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_compiler_finds_mutants_that_are_no_cpp(tmp_path: Path) -> None:
    sources = {"source.cpp": "int f(const int* at, int n) {\n  at += n;\n  return *at + n;\n}\n"}
    files, mutants = cpp.instrument(sources, cpp.Rules())
    (tmp_path / "source.cpp").write_text(files["source.cpp"])
    done = subprocess.run(["g++", "-fsyntax-only", "source.cpp"], cwd=tmp_path, capture_output=True, text=True)
    broken = cpp.blamed(done.stderr, files, ["source.cpp"])
    assert [m.after for m in mutants if m.number in broken] == ["at = n"]
    without, again = cpp.instrument(sources, cpp.Rules(), frozenset(broken))
    assert again == mutants and f"/*{min(broken)}*/" not in without["source.cpp"]


def test_fates_of_a_trial() -> None:
    def crash() -> str:
        ctypes.string_at(0)
        return ""

    def endless() -> str:
        while True:
            pass

    def wrong() -> str:
        raise ValueError("wrong\nthe last line")

    began = time.time()
    told = dict(forks.verdicts([str, lambda: "said", wrong, crash, endless], 2, 1))
    assert told == {0: "", 1: "said", 2: "ValueError in wrong: the last line", 3: "the process died of signal 11", 4: "no end"}
    assert time.time() - began < 60


def test_survivors_without_an_explanation_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "tests" / "data").mkdir(parents=True)
    rows = [table.Row("a.h:1", "bound", "i < n", "i <= n", killed, "while (i < n) ++i;") for killed in ("a test", None)]
    explained = {("bound", "i <= n in while"): "because"}
    assert table.write("x", {"a.h": "while (i < n) ++i;\n"}, 2, rows, {}) == 1
    assert table.write("x", {"a.h": "while (i < n) ++i;\n"}, 2, rows, explained) == 0
    assert table.explain_again("x", {"a.h": "while (i < n) ++i;\n"}, {}) == 1
    with pytest.raises(AssertionError, match="other sources"):
        table.explain_again("x", {"a.h": "another"}, explained)


def test_what_a_later_run_takes_from_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "ROOT", tmp_path)
    (tmp_path / "tests" / "data").mkdir(parents=True)
    sources = {"a.h": "while (i < n) ++i;\n"}
    rows = [table.Row("a.h:1", "bound", before, "n", killed, "") for before, killed in (("i", "a test"), ("n" * 300, None))]
    table.write("x", sources, 2, rows, {})
    assert table.fates("x", sources, rows) == ["a test", None]
    with pytest.raises(AssertionError):
        table.fates("x", sources, rows[::-1])
    with pytest.raises(AssertionError, match="other sources"):
        table.fates("x", {"a.h": "another"}, rows)


def test_a_short_line_is_told_from_others_like_it() -> None:
    lines = ["  f();", "  a_longer_line_than_that();", "  }"]
    assert [table.text_of(lines, n) for n in (1, 2, 3)] == ["f(); a_longer_line_than_that();", "a_longer_line_than_that();", "}"]
