"""``fastadapt bench``: what a row says, what is refused, what the limits are made of, and that every suite runs."""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import measure, memory, models, ops, roofline, scaling, suites
from fastadapt import backend, cli, functional
from fastadapt.backend import BackendError
from tests import eager
from tests.ops import checks

NAMES = ("op", "backend", "rival", "dtype", "rows", "width", "rank", "direction", "threads", "ratio_median", "ratio_low", "ratio_high", "limit_fraction", "correct")
ROW = measure.Row("bottleneck", "cpu", "eager", "fp32", 16, 8, 2, "forward", 1, 1.0, 0.9, 0.8, 0.99, True, limit_fraction=0.5)
TINY = models.Sizes("tiny", 96, 1, 4, 99, 2, 6, 4, 3)
needs_cpu = pytest.mark.skipif(checks._NO_CPU, reason="the cpu backend needs x86-64 with AVX2 and a compiler")
quick = argparse.Namespace(quick=True, device="cpu", rounds=3, seconds=1.0)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_what_a_row_holds() -> None:
    assert {field.name for field in fields(measure.Row)} == {*NAMES, "ours_ms", "device", "param_dtype"}
    assert ROW.slower and str(ROW).endswith("1.00 ms  x0.90 [0.80, 0.99]   50 % of the limit  slower")
    assert not replace(ROW, ratio_high=1.0).slower and not replace(ROW, rival="base").slower
    assert suites.record("ops", ROW) == asdict(ROW) and "suite" not in suites.record("ops", ROW)
    assert suites.record("memory", memory.Row("m", "base", "fp32", 1, 1, 1, 1, 1))["suite"] == "memory"


def small(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    return [torch.randn(70, 64).to(dtype), torch.randn(9, 64) * 0.1, torch.randn(64, 9) * 0.1, torch.randn(9) * 0.1], torch.randn(70, 64).to(dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_no_speed_of_a_wrong_result(dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(measure, "interleave", lambda *args: pytest.fail("something was timed"))
    tensors, dy = small(measure.DTYPES[dtype])

    def twisted(x: Tensor, *parameters: Tensor) -> Tensor:
        # A right output, and a wrong gradient of nine numbers, which one seed alone would not judge.
        *others, b = parameters
        return functional.bottleneck(x, *others, 1.5 * b - 0.5 * b.detach())

    rows = measure.compare("bottleneck", twisted, eager.bottleneck, tensors, 0, dy, backend="reference", dtype=dtype, rank=9, rounds=3)
    assert [(row.direction, row.rival) for row in rows] == [(d, r) for d in ("forward", "forward+backward") for r in ("eager", "compile")]
    for row in rows:
        assert not row.correct and row.ours_ms is row.ratio_median is row.ratio_low is row.ratio_high is row.limit_fraction is None
        assert str(row).endswith("not shown: the result is outside the tolerance") and not row.slower
    assert "no speed is shown. gradient 3: error" in capsys.readouterr().err
    assert measure.wrong(functional.bottleneck, eager.bottleneck, tensors, 0, dy) == ""


def test_the_limit_is_the_larger_time() -> None:
    assert measure.Limit(flops=6e9, bytes=4e9, rate=2e9, bandwidth=1e9).seconds == 4.0
    assert measure.Limit(flops=6e9, bytes=4e9, rate=1e9, bandwidth=1e9).seconds == 6.0
    products = [measure.Product(100, 20, 30), measure.Product(100, 20, 30, across=True)]
    assert [product.flops for product in products] == [120e3, 120e3]
    found = measure.limit(480e3, products, 1e6, {"products": [1e-3, 2e-3, 9e-3], "copy": [1e-3]})
    assert found == (480e3, 1e6, 120e6, 1e9) and found.seconds == 4e-3
    big = 4.0 * measure.COPIED
    assert measure.limit(1.0, products, big, {"products": [1e-9], "copy": [1.0]}).seconds == 4.0


def work(op: str, dtype: str = "bf16", **more: Any) -> measure.Work:
    bench = import_module(f"benchmarks.ops.{op}")
    return bench.work(argparse.Namespace(**{"rows": 4096, "width": 768, "rank": 96, "param_dtype": "fp32", **getattr(bench, "OPTIONS", {}), **more}), dtype)


def test_the_work_of_each_op() -> None:
    """FLOPs of the plain algorithm: 12 T d r of a bottleneck, twice that of VL-PET-large; and each tensor read or written once."""
    t, d, r = 4096, 768, 96
    for op, flops in {"bottleneck": 12 * t * d * r, "gated_bottleneck": 24 * t * d * r, "lora": 12 * t * d * r, "routed_bottleneck": 12 * t * d * r}.items():
        assert work(op).part(True)[0] == flops and work(op).part(False)[0] == flops / 3
    assert work("phm_bottleneck").part(True)[0] == 3 * 2 * 2 * t * 4 * (d + r)
    assert work("lora", out_width=3072).part(True)[0] == 6 * t * (d + 3072) * r
    weights = 4 * (2 * d * r + d + r)
    assert work("bottleneck").part(False)[2] == 2 * 2 * t * d + weights
    assert work("bottleneck", "fp32").part(True)[2] == 4 * 5 * t * d + 4 * 2 * t * r + 3 * weights
    assert work("gated_bottleneck").part(True)[2] == 2 * 8 * t * d + 2 * 4 * t * r + 6 * weights
    assert work("routed_bottleneck").part(False)[2] == 2 * 2 * t * d + 4 * weights


def test_the_library_computes_the_products() -> None:
    """Whatever is timed as the library's is the product that it stands for."""
    for product in (measure.Product(50, 24, 8), measure.Product(50, 24, 8, across=True)):
        for dtype in measure.DTYPES.values():
            torch.manual_seed(0)
            calls = measure.library_calls(product, dtype, torch.device("cpu"))
            onednn = {"onednn"} if measure.onednn_has(dtype) else set()
            assert set(calls) == {"mm", "mm turned" if product.across else "linear", *onednn}
            expected = calls.pop("mm")().float()
            assert expected.shape == ((24, 8) if product.across else (50, 8)) and expected.norm() > 1
            for call in calls.values():
                got = call().float()
                torch.testing.assert_close(got if got.shape == expected.shape else got.t(), expected, rtol=0.02, atol=0.1)
    assert measure.onednn_has(torch.float32) == torch.backends.mkldnn.is_available()
    assert len(measure.best_library_calls([product, product], torch.float32, torch.device("cpu"))) == 2


def test_interleaving() -> None:
    called: list[str] = []
    times = measure.interleave({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 6)
    assert [len(seconds) for seconds in times.values()] == [6, 6]
    assert called[:8] == ["b", "b", "a", "a", "a", "a", "b", "b"], "the order alternates, and each sample follows a call of its own that is not timed"
    assert len(called) == 2 * (2 * 2 + 6 * (1 + measure.CALLS)), "what takes microseconds is called often enough for the clock"
    assert [len(seconds) for seconds in measure.interleave({"a": lambda: None}, 50, seconds=0.0).values()] == [5]


def test_a_narrow_spread_needs_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.settled([[1.0] * 9, [2.0] * 9, [3.0, 3.0, *[3.03] * 7]]) and not measure.settled([[1.0] * 9])
    assert not measure.settled([[1.0] * 9, [2.0] * 9, [3.0] * 3 + [3.03] * 3 + [3.09] * 3]), "every rival's ratio counts"
    clock = iter(range(10**6))
    for spread, rounds in ((0.0, 9), (0.1, 21)):
        monkeypatch.setattr(measure, "timed", lambda f, device, calls, spread=spread: f() * (1 + spread * (next(clock) % 5)))
        assert [len(seconds) for seconds in measure.interleave({"ours": lambda: 1.0, "eager": lambda: 2.0}, 21).values()] == [rounds, rounds]


def test_every_op_is_in_the_list() -> None:
    """An op is added by a module beside the others, with its work, and a line in the table."""
    for op in backend._plans:
        assert {case.op for case, _, _ in ops.selected(True, op)} == {op} and work(op).forward_bytes > 0
    full = list(ops.selected(False))
    assert {rows for _, rows, _ in full} == {16, 64, 128, 512, 4096, 32768} and {case.width for case, _, _ in full} == {768, 1024, 4096}
    assert {case.rank for case, _, _ in ops.selected(False, "lora")} == {16, 64, 128} and {case.rank for case, _, _ in ops.selected(False, "bottleneck")} >= {96, 192}
    assert all(found in full for found in ops.selected(True)) and {dtype for _, _, dtype in full} == {"fp32", "bf16", "fp16"}


@needs_cpu
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One tiny call through the whole command: rows with the limit, JSON, history, plots."""
    monkeypatch.setattr(ops, "CASES", [ops.Case("lora", 64, 8, quick=(64,), options={"dropout": 10}), ops.Case("bottleneck", 64, 8)])
    monkeypatch.setattr(ops, "selected", lambda quick, op, every=ops.selected, **only: (found for found in every(quick, op) if found[2] == "fp32"))
    monkeypatch.setattr(suites, "HISTORY", tmp_path / "history.csv")
    file, plots = tmp_path / "rows.json", tmp_path / "plots"
    assert cli.main(["bench", "--suite", "ops", "--quick", "--op", "lora", "--json", str(file), "--history", "--plots", str(plots)]) == 0
    rows = json.loads(file.read_text())
    assert not list(tmp_path.glob("*.part")) and len(rows) == 4 and all(set(row) == {*NAMES, "ours_ms", "device", "param_dtype"} for row in rows)
    assert {(row["op"], row["backend"], row["rows"], row["width"], row["rank"], row["correct"], row["param_dtype"]) for row in rows} == {
        ("lora p=0.1", "cpu", 64, 64, 8, True, "fp32")
    }
    assert all(0 < row["ratio_low"] <= row["ratio_median"] <= row["ratio_high"] and row["limit_fraction"] > 0 and row["device"].startswith("cpu: ") for row in rows)
    assert len(list(csv.DictReader((tmp_path / "history.csv").open()))) == 4
    assert {path.name for path in plots.glob("*.png")} == {
        *(f"ratio_{rival}_{direction}.png" for rival in ("eager", "compile") for direction in ("forward", "forward_backward")),
        *(f"limit_{direction}.png" for direction in ("forward", "forward_backward")),
    }
    assert "4 comparisons: 0 wrong and not timed" in capsys.readouterr().out


def test_a_run_that_is_cut_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(options: argparse.Namespace) -> Iterator[list[Any]]:
        yield [ROW]
        yield [ROW, replace(ROW, rows=17)]
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "run", cut)
    file = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["bench", "--suite", "ops", "--json", str(file)])
    assert [row["rows"] for row in json.loads(file.read_text())] == [16, 16, 17]


def test_the_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run would measure, suite by suite: as many lines as batches of rows, of which nothing is measured."""
    for name in cli.SUITES:
        monkeypatch.setattr(import_module(f"benchmarks.{name}"), "run", lambda options: pytest.fail("something was measured"))
    monkeypatch.setattr(measure.os, "cpu_count", lambda: 2)
    for options in ([], ["--quick"]):
        assert cli.main(["bench", "--list", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        counts = {line.split()[1]: int(line.split()[2]) for line in lines if line.startswith("== ")}
        assert [name + ":" for name in cli.SUITES] == list(counts) and sum(counts.values()) + len(counts) == len(lines)
        assert counts["ops:"] == (1 if options else 2) * len(list(ops.selected(bool(options)))) and counts["scaling:"] == len(scaling.curves(bool(options)))
        assert ("bottleneck fp32 T=16 d=4096 r=128, 1 threads" in lines) == (not options)
        assert "BLIP uniadapter, 1 layer, 2 threads" in lines if options else "BLIP uniadapter, 2 layers, 2 threads" in lines
    assert cli.main(["bench", "--list", "--suite", "ops", "--op", "lora", "--rows", "16", "--rank", "64", "--width", "768"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "== ops: 4", *(f"lora {dtype} T=16 d=768 r=64, {threads} threads" for threads in (2, 1) for dtype in ("fp32", "bf16"))
    ]  # fmt: skip


def rivals_are_compiled_ahead(folder: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    case = ops.Case("lora", 64, 8, quick=(48,))
    ops.CASES = [case]
    options = argparse.Namespace(**vars(quick), op=None)
    ops.compile_ahead(options)
    assert not os.listdir(folder), "a short list is not worth it"
    ops.AHEAD = 1
    ops.compile_ahead(options)
    for _ in measure.threads_of(options):
        for rows, hits in ((48, 2), (49, 0)):
            torch._dynamo.utils.counters.clear()
            assert ops.call(case, rows, "bf16", device="cpu", backend="reference", rounds=0, seconds=0.0) == []
            found = torch._dynamo.utils.counters["aot_autograd"]
            assert (found["autograd_cache_hit"], found["autograd_cache_miss"]) == (hits, 2 - hits)


def test_rivals_are_compiled_ahead(tmp_path: Path) -> None:
    """By other processes, into the files that one of the same settings then finds: other tests leave other settings behind, so not this one."""
    process = multiprocessing.get_context("spawn").Process(target=rivals_are_compiled_ahead, args=(str(tmp_path),))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_backend_that_cannot_run_the_call_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(args: argparse.Namespace, dtype: str) -> list[measure.Row]:
        raise BackendError("the cuda kernels take bfloat16")

    monkeypatch.setattr(import_module("benchmarks.ops.lora"), "run", refuse)
    monkeypatch.setattr(ops, "CASES", [ops.Case("lora", 64, 8, quick=(16,))])
    assert list(ops.run(argparse.Namespace(**vars(quick), op=None))) == []
    assert "lora cpu fp32 T=16: not run: the cuda kernels take bfloat16" in capsys.readouterr().out


def test_the_history_grows(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    for _ in range(2):
        suites.append_history([ROW, replace(ROW, ratio_median=None)], path)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == 4 and tuple(rows[0]) == suites.COLUMNS and rows[0]["torch"] == torch.__version__ and rows[0]["ratio_low"] == "0.8" and rows[1]["ratio_median"] == ""
    assert rows[0]["commit"] == suites.commit() != "unknown"
    path.write_text("date,commit\n")
    with pytest.raises(ValueError, match="its columns are date, commit, not date, commit, fastadapt"):
        suites.append_history([ROW], path)


def test_what_cannot_be_kept_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(import_module("benchmarks.launches"), "run", lambda options: pytest.fail("something was measured"))
    monkeypatch.setattr(suites, "HISTORY", tmp_path / "history.csv")
    (tmp_path / "history.csv").write_text("date,commit\n")
    file, whys = tmp_path / "history.csv", []
    for options in (("--plots", str(file)), ("--json", str(file / "rows.json")), ("--json", str(tmp_path)), ("--history",)):
        assert cli.main(["bench", "--suite", "launches", *options]) == 1
        whys.append(capsys.readouterr().err)
    assert all(why.startswith("fastadapt bench: --") and why.count("\n") == 1 for why in whys)
    assert [why.partition(": cannot be written (")[0] for why in whys[:3]] == [
        f"fastadapt bench: {what}" for what in (f"--plots {file}", f"--json {file}/rows.json", f"--json {tmp_path}")
    ]
    assert "its columns are date, commit, not" in whys[3]
    assert cli.main(["bench", "--suite", "launches", "--list", "--plots", str(tmp_path / "plots")]) == 0 and not (tmp_path / "plots").exists()


def test_options_that_nothing_is_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--quick", "--suite", "ops", "--op", "bottleneck", "--rows", "17"]) == 2
    assert "nothing was measured; --list, with the same options" in capsys.readouterr().err


def test_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastadapt" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--suite", "launches"]) == 1
    assert "the benchmarks are not installed with the package" in capsys.readouterr().err


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "benchmarks.plots", raising=False)
    monkeypatch.setattr(import_module("benchmarks.launches"), "run", lambda options: pytest.fail("something was measured"))
    assert cli.main(["bench", "--suite", "launches", "--plots", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "fastadapt bench: matplotlib is not installed; pip install 'fastadapt[bench]'\n"


def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_suites_have_one_name() -> None:
    for name in cli.SUITES:
        module = import_module(f"benchmarks.{name}")
        assert callable(module.run) and module.__doc__ and f"python -m benchmarks.{name}" in module.__doc__
    with pytest.raises(SystemExit):
        cli.main(["bench", "--suite", "speed"])


@needs_cpu
@pytest.mark.parametrize(("host", "method"), [("VL-BART", "vlpet"), ("BLIP", "uniadapter"), ("LLaVA", "lora")])
def test_models(host: str, method: str) -> None:
    """The rivals compute what ours does, without the library's ops; a model whose adapters differ is not timed."""
    rows = models.compare(host, method, TINY, quick, compiled=False)
    rival = "peft" if method == "lora" else "eager"
    assert [(row.rival, row.direction) for row in rows] == [(who, part) for part in ("training step", "generation") for who in (rival, "base")]
    assert all(row.correct and row.ours_ms and row.ratio_median for row in rows) and rows[0].rows == 20


@needs_cpu
def test_no_speed_of_a_wrong_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "wrong", lambda *args: "error 1 > 0")
    monkeypatch.setattr(models, "wrong_tokens", lambda *args: "generated other tokens")
    monkeypatch.setattr(measure, "interleave", lambda *args: pytest.fail("something was timed"))
    rows = models.compare("VL-BART", "vl_adapter", TINY, quick, compiled=False)
    assert len(rows) == 4 and all(not row.correct and row.ours_ms is row.ratio_median is None for row in rows)
    assert capsys.readouterr().err.splitlines()[-1] == "VL-BART vl_adapter, generation: no speed is shown. generated other tokens"


@needs_cpu
def test_other_tokens_are_seen() -> None:
    host = models.HOSTS["VL-BART"]
    pair, inputs = models.adapted(host, "vl_adapter", TINY), host.batch(TINY)
    assert models.wrong_tokens(pair, inputs, 3) == ""
    with torch.no_grad():
        for p in models.trained(pair["ours"]):
            p.add_(torch.randn_like(p))
    assert models.wrong_tokens(pair, inputs, 3) == "generated other tokens"


@needs_cpu
def test_the_authors_code_runs_no_fused_op() -> None:
    host = models.HOSTS["VL-BART"]
    pair, inputs = models.adapted(host, "vlpet", TINY), host.batch(TINY)
    before, op = backend.ran(), functional.gated_bottleneck
    with models.authors():
        theirs = models.gradients(pair["eager"], inputs)
    assert backend.ran() == before and functional.gated_bottleneck is op
    ours = models.gradients(pair["ours"], inputs)
    assert backend.ran() != before and ours.shape == theirs.shape
    assert models.wrong(pair, inputs) == ""
    with torch.no_grad():
        models.trained(pair["ours"])[0].mul_(1.01)
    assert models.wrong(pair, inputs).startswith("loss and gradients: error ")


@needs_cpu
def test_shares_add_up() -> None:
    found = models.shares("VL-BART", "vl_adapter", TINY, quick)
    parts = found.base_forward + found.base_backward + found.adapters_forward + found.adapters_backward + found.optimizer
    assert parts == pytest.approx(found.step) and "base forward" in str(found) and found.base_forward > 0


def test_memory_is_counted() -> None:
    x, w = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
    size = x.nbytes
    assert memory.kept(lambda: (x * w).sigmoid(), [x, w]) == size, "sigmoid keeps its output; the product keeps arguments"
    assert memory.peak(lambda: (w + 1).neg()) == 2 * size and memory.peak(lambda: w.add_(0)) < 64


@needs_cpu
def test_memory_of_sites_and_models() -> None:
    site, spec = next(iter(memory.launches.sites(128, 64).items()))
    theirs, ours = memory.of_site(site, spec, "cpu")
    assert (theirs.who, ours.who) == ("eager", "fastadapt") and ours.kept_bytes == 2 * 128 * 96 < theirs.kept_bytes
    by = {row.who: row for row in memory.of_model("VL-BART", "vl_adapter", TINY, "cpu")}
    assert set(by) == {"base", "eager", "fastadapt"} and by["fastadapt"].kept_bytes < by["eager"].kept_bytes and all(row.peak_bytes >= row.kept_bytes for row in by.values())


@needs_cpu
def test_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert scaling.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1) and scaling.exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2)
    row = scaling.Row("op", "rows", "fp32", 1, [1, 2], [1.0, 2.0], [1, 2], 1.0, 1.0, "cpu")
    assert not row.grows and replace(row, time_exponent=1.2).grows and replace(row, memory_exponent=2.0).grows and replace(row, against="tasks").grows
    with backend.use("cpu"):
        found = scaling.row("bottleneck", "rows", [64, 256, 1024], lambda n: scaling.step_of(scaling.site("bottleneck", rows=n, width=64, rank=8), "cpu"), quick)
    assert found.memory_exponent > 0.3 and len(found.milliseconds) == len(found.peak_bytes) == 3
    assert {against for _, against, _ in scaling.curves(True)} == set(scaling.MOST) == {against for _, against, _ in scaling.curves(False)}


@pytest.mark.parametrize("op", roofline.gpu_check.OPS)
def test_roofline(op: str) -> None:
    """Every direction has a limit below its modelled time, and every kernel the compiler's record: the large ones in CUDA, all in Triton, whose sites are recorded alone."""
    for name in ("cuda", "triton"):
        for arch in roofline.ARCHS:
            rows = list(roofline.rows_of(op, name, arch, 4096, rank=roofline.RANKS.get(op, 96)))
            assert [row.direction for row in rows if row.kernel == "all"] == ["forward", "backward"]
            assert all(0 <= row.limit_fraction <= 1 and row.basis == "modelled, not run" for row in rows)
            for row in rows:
                if row.kernel in ("forward", "gates", "rows", "slabs") if name == "cuda" else row.kernel not in ("all", "pack"):
                    assert row.blocks_per_sm and row.registers and 0 < (row.occupancy or 0) <= 1, (op, name, arch, row.kernel)
                    assert row.tile or name == "triton", (op, arch, row.kernel)
            assert all(row.registers is None for row in roofline.rows_of(op, "triton", arch, 4096, width=1024, rank=roofline.RANKS.get(op, 96)) if name == "triton")


def test_the_makefile_runs_it() -> None:
    text = (Path(__file__).parents[1] / "Makefile").read_text()
    assert "\t$(BIN)/fastadapt bench " in text and "benchmarks.ops." not in text


def test_a_part_of_the_list() -> None:
    found = list(ops.selected(False, rows=[16, 4096], width=[768], rank=[96], dtype=["bf16"]))
    assert {(case.op, case.width, case.rank, dtype) for case, _, dtype in found} == {
        (op, 768, 96, "bf16") for op in ("bottleneck", "gated_bottleneck", "phm_bottleneck", "routed_bottleneck")
    }
    assert {rows for _, rows, _ in found} == {16, 4096} and len(found) == 8 < len(list(ops.selected(False, dtype=["bf16"])))
