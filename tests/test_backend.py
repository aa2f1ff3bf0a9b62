"""`fastadapt.backend`: what is chosen, what is said about it, what is demanded, and what really ran."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastadapt
from fastadapt import backend, functional
from tests.ops.checks import kernel_names, runs_on

ROOT = Path(fastadapt.__file__).parents[1]
HAS_CPU = "cpu" in kernel_names
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="this machine cannot have the cpu kernels")
SHAPE = {"rows": 64, "width": 32, "rank": 8}


def arguments(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return torch.randn(6, 32, dtype=dtype), torch.randn(8, 32, dtype=dtype), torch.randn(32, 8, dtype=dtype)


def python(code: str, *, missing: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a fresh interpreter in which importing ``missing`` packages fails."""
    block = f"""
        import sys
        class Missing:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {missing!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        sys.meta_path.insert(0, Missing())
    """
    env = {**{k: v for k, v in os.environ.items() if k != "FASTADAPT_BACKEND"}, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(block) + textwrap.dedent(code)], env=env, cwd=env["PYTHONPATH"], capture_output=True, text=True, timeout=120
    )


def output(*args: str, **kwargs: object) -> str:
    done = python(*args, **kwargs)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_explain_names_the_backend_and_the_reasons() -> None:
    with backend.use("auto"):
        fits, double = backend.explain("bottleneck", **SHAPE), backend.explain("bottleneck", **SHAPE, dtype=torch.float64)
    assert fits.chosen == ("cpu" if HAS_CPU else "reference")
    assert double.chosen == "reference" and double.reasons["reference"] == []
    assert any("float64" in why for why in double.reasons["cpu"])
    assert "float64" in str(double) and "bottleneck: rows=64 width=32 rank=8" in str(double) and "reference" in str(double)
    if HAS_CPU:
        assert fits.reasons == {"cpu": []}


@pytest.mark.parametrize("op", ["bottleneck", "gated_bottleneck", "phm_bottleneck"])
def test_explain_says_what_would_run_and_runs_nothing(op: str) -> None:
    before = backend.ran()
    for name in ("reference", *(n for n in kernel_names if n == "cpu")):
        with backend.use(name):
            assert backend.explain(op, **SHAPE).chosen == name
    assert backend.explain(op, **SHAPE, device="meta").chosen == "reference"
    assert backend.ran() == before


def test_a_demand_that_cannot_be_met_is_refused_with_its_reasons() -> None:
    with backend.use("triton"), pytest.raises(backend.BackendError, match=r"'triton' was demanded but cannot run bottleneck .*cpu: .+"):
        functional.bottleneck(*arguments())
    with backend.use("triton"), pytest.raises(backend.BackendError, match="'triton'"):
        backend.explain("gated_bottleneck", **SHAPE)
    with backend.use("cpu"), pytest.raises(backend.BackendError, match=r"'cpu' was demanded but cannot run bottleneck with torch.float64, width 32, rank 8 on cpu: .*float64"):
        functional.bottleneck(*arguments(torch.float64))
    with backend.use("cpu"), pytest.raises(backend.BackendError, match="cuda"):
        backend.explain("bottleneck", **SHAPE, device="cuda")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown backend 'gpu': must be one of auto, reference, cpu, triton"), backend.use("gpu"):
        pass
    with pytest.raises(ValueError, match="unknown op 'lora_x': must be one of bottleneck, dropout_add_norm, gated_bottleneck"):
        backend.explain("lora_x", **SHAPE)


@pytest.mark.parametrize(
    ("op", "changes", "kind", "says"),
    [
        ("bottleneck", {"granularty": "large"}, TypeError, "granularty: is no option of bottleneck, which has none"),
        ("gated_bottleneck", {"granularty": "large"}, TypeError, "granularty: is no option of gated_bottleneck, which has gate_rank, granularity"),
        ("gated_bottleneck", {"granularity": "huge"}, ValueError, "granularity: must be one of large, large_full, middleX, middleY, small, not 'huge'"),
        ("gated_bottleneck", {"granularity": "small", "gate_rank": 4}, ValueError, "gate_rank: granularity 'small' has none, not 4"),
        ("bottleneck", {"dtype": torch.int64}, TypeError, "dtype: must be a floating-point torch.dtype or one of fp32, bf16, fp16, fp64, not torch.int64"),
        ("bottleneck", {"dtype": "int8"}, TypeError, "dtype: must be a floating-point torch.dtype or one of fp32, bf16, fp16, fp64, not 'int8'"),
        ("bottleneck", {"param_dtype": torch.int8}, TypeError, "param_dtype: must be a floating-point torch.dtype or one of fp32, bf16, fp16, fp64, not torch.int8"),
        ("bottleneck", {"rows": -1}, ValueError, "rows: must be a whole number from 0 on, not -1"),
        ("bottleneck", {"width": 0}, ValueError, "width: must be a whole number from 1 on, not 0"),
        ("bottleneck", {"width": 8.0}, ValueError, "width: must be a whole number from 1 on, not 8.0"),
        ("bottleneck", {"rank": 0}, ValueError, "rank: must be a whole number from 1 on, not 0"),
        ("dropout_add_norm", {}, ValueError, "rank: must be 0, dropout_add_norm has none, not 8"),
        ("dropout_add_norm", {"rank": 0, "wide": True}, ValueError, "wide: a float32 residual stands beside half-precision activations, not beside torch.float32"),
        ("dropout_add_norm", {"rank": 0, "norm": "batch"}, ValueError, "norm: must be 'layer', 'rms' or 'none', not 'batch'"),
        ("lora", {"dropout": 0.1}, ValueError, "dropout: must be True or False, not 0.1"),
        ("lora", {"out_width": 0}, ValueError, "out_width: must be a whole number from 1 on, not 0"),
        ("phm_bottleneck", {"division": 3}, ValueError, "division: must divide the width 32 and the rank 8, not 3"),
        ("phm_bottleneck", {"division": 4, "rank": 6}, ValueError, "division: must divide the width 32 and the rank 6, not 4"),
        ("routed_bottleneck", {"tasks": 0}, ValueError, "tasks: must be a whole number from 1 on, not 0"),
        ("bottleneck", {"device": "sm_999"}, ValueError, "device: unknown architecture 'sm_999': must be one of sm_50, "),
        ("bottleneck", {"device": "gpu"}, ValueError, "device: must be a torch device or an architecture such as 'sm_90', not 'gpu'"),
    ],
)
def test_explain_refuses_what_the_op_refuses(op: str, changes: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as raised:
        backend.explain(op, **{**SHAPE, **changes})
    assert str(raised.value).startswith(says)


def test_explain_takes_the_command_lines_dtypes() -> None:
    with backend.use("auto"):
        assert backend.explain("bottleneck", **SHAPE, dtype="bf16", param_dtype="fp32") == backend.explain("bottleneck", **SHAPE, dtype=torch.bfloat16, param_dtype=torch.float32)


def test_use_nests_and_ends() -> None:
    x, w_down, w_up = arguments()
    with backend.use("reference"):
        with runs_on("bottleneck", "reference", counts=(1, 0)):
            functional.bottleneck(x, w_down, w_up)
        with backend.use("auto"), pytest.raises(RuntimeError, match="inside"):
            assert backend.demand() == backend.AUTO
            raise RuntimeError("inside")
        assert backend.demand() == backend.index("reference")
        assert backend.explain("bottleneck", **SHAPE).chosen == "reference"
    assert backend.demand() == backend.index(os.environ.get("FASTADAPT_BACKEND", "auto"))


def test_a_demand_holds_for_its_own_thread() -> None:
    inside, looked, demands = threading.Event(), threading.Event(), []

    def demanding() -> None:
        with backend.use("reference"):
            inside.set()
            looked.wait(10)
            demands.append(backend.demand())

    thread = threading.Thread(target=demanding)
    thread.start()
    assert inside.wait(10)
    demands.append(backend.demand())
    looked.set()
    thread.join()
    assert demands == [backend.index(os.environ.get("FASTADAPT_BACKEND", "auto")), backend.index("reference")]


def test_blocks_of_threads_that_overlap_leave_no_demand_behind() -> None:
    """What a compilation sees is the last block entered, and, when all are left, in whatever order, no demand."""
    before, entered, leave = backend._traced_demand, [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def demanding(i: int, name: str) -> None:
        with backend.use(name):
            entered[i].set()
            leave[i].wait(10)

    threads = [threading.Thread(target=demanding, args=each) for each in enumerate(("reference", "cpu"))]
    seen = []
    for i, thread in enumerate(threads):
        thread.start()
        assert entered[i].wait(10)
        seen.append(backend._traced_demand)
    for i, thread in enumerate(threads):
        leave[i].set()
        thread.join()
        seen.append(backend._traced_demand)
    assert seen == [backend.index("reference"), backend.index("cpu"), backend.index("cpu"), before]


def test_ran_counts_kernels_and_resets() -> None:
    x, w_down, w_up = arguments()
    w_down.requires_grad_()
    before = backend.ran(reset=True)
    try:
        with backend.use("reference"):
            y = [functional.bottleneck(x, w_down, w_up) for _ in range(3)]
            y[1].sum().backward()
        assert backend.ran() == {("bottleneck", "forward", "reference"): 3, ("bottleneck", "backward", "reference"): 1}
        assert backend.ran(reset=True) and backend.ran() == {}
    finally:
        for key, n in before.items():
            for _ in range(n):
                backend.count(*key)


def test_ran_counts_from_many_threads() -> None:
    x, w_down, w_up = arguments()

    def work() -> None:
        with backend.use("reference"):
            for _ in range(50):
                functional.bottleneck(x, w_down, w_up)

    key = ("bottleneck", "forward", "reference")
    before = backend.ran().get(key, 0)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.ran()[key] - before == 200


def test_auto_passes_over_with_exactly_one_warning() -> None:
    x, w_down, w_up = arguments(torch.float64)
    backend._warned.clear()
    with warnings.catch_warnings(record=True) as caught, backend.use("auto"):
        warnings.simplefilter("always")
        for _ in range(3):
            functional.bottleneck(x, w_down, w_up)
    assert len(caught) == 1 and issubclass(caught[0].category, UserWarning)
    assert "bottleneck runs on 'reference' instead of 'cpu'" in str(caught[0].message) and "float64" in str(caught[0].message)


@needs_cpu
def test_auto_takes_the_kernel_without_a_word() -> None:
    with warnings.catch_warnings(), backend.use("auto"):
        warnings.simplefilter("error")
        before = backend.ran()
        functional.bottleneck(*arguments())
        assert backend.ran()["bottleneck", "forward", "cpu"] == before.get(("bottleneck", "forward", "cpu"), 0) + 1


CALL = """
    import torch, fastadapt
    from fastadapt import backend, functional
    x = torch.randn(6, 32)
    y = functional.bottleneck(x, torch.randn(8, 32).requires_grad_(), torch.randn(32, 8))
    y.sum().backward()
    print(sorted({name for _, _, name in backend.ran()}), backend.explain("bottleneck", rows=6, width=32, rank=8).chosen)
"""


def test_the_environment_demands() -> None:
    assert output(CALL, FASTADAPT_BACKEND="reference") == "['reference'] reference\n"
    assert output(CALL, FASTADAPT_BACKEND="") == output(CALL)


def test_the_environment_is_a_demand_and_not_a_wish() -> None:
    code = """
        import torch
        from fastadapt import backend, functional
        arguments = torch.randn(6, 32), torch.randn(8, 32), torch.randn(32, 8)
        try:
            functional.bottleneck(*arguments)
        except backend.BackendError as error:
            print(error)
        with backend.use("reference"):
            functional.bottleneck(*arguments)
        print(backend.ran())
    """
    refused, ran = output(code, FASTADAPT_BACKEND="triton").splitlines()
    assert refused.startswith("backend 'triton' was demanded but cannot run bottleneck")
    assert ran == "{('bottleneck', 'forward', 'reference'): 1}"


def test_an_unknown_name_in_the_environment() -> None:
    done = python("import fastadapt", FASTADAPT_BACKEND="fastest")
    assert done.returncode != 0 and "FASTADAPT_BACKEND: unknown backend 'fastest': must be one of auto, reference, cpu, triton" in done.stderr


def test_import_loads_nothing_heavy() -> None:
    code = """
        import sys, torch
        before = set(sys.modules)
        import fastadapt
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new & {"triton", "transformers", "sklearn", "matplotlib", "accelerate", "peft"}), torch.cuda.is_initialized())
        print([line.rsplit("/", 1)[1] for line in open("/proc/self/maps").read().split("\\n") if "/_cpu_" in line] if sys.platform == "linux" else [])
    """
    assert output(code) == "[] False\n[]\n"


def test_public_names_are_listed_and_found_before_they_are_loaded() -> None:
    code = """
        import fastadapt
        absent = {"checkpoint", "hosts", "interop", "methods", "nn", "patching", "training", "Handle", "fuse", "load", "patch", "unfuse"} - set(vars(fastadapt))
        print(len(absent), absent - set(dir(fastadapt)), absent - set(fastadapt.__all__))
        for name in absent:
            assert fastadapt.__getattr__(name) is not None  # which of them a former one has loaded does not matter
        try:
            fastadapt.nothing
        except AttributeError as error:
            print(error)
    """
    assert output(code) == "12 set() set()\nmodule 'fastadapt' has no attribute 'nothing'\n"


def test_everything_runs_without_triton_transformers_and_compiled_kernels(tmp_path: Path) -> None:
    """A pure-Python copy of the package: one warning says what is missing, and the call runs on reference."""
    package = tmp_path / "fastadapt"
    for source in (ROOT / "fastadapt").rglob("*.py"):
        (package / source.relative_to(ROOT / "fastadapt")).parent.mkdir(parents=True, exist_ok=True)
        (package / source.relative_to(ROOT / "fastadapt")).write_bytes(source.read_bytes())
    code = (
        CALL
        + """
    print(fastadapt.__file__)
    try:
        with backend.use("cpu"):
            functional.bottleneck(x, torch.randn(8, 32), torch.randn(32, 8))
    except backend.BackendError as error:
        print(error)
    """
    )
    done = python(code, missing=("triton", "transformers"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    ran, where, refused = done.stdout.splitlines()
    assert (ran, where) == ("['reference'] reference", str(package / "__init__.py"))
    assert refused.startswith("backend 'cpu' was demanded but cannot run bottleneck")
    if HAS_CPU:
        assert done.stderr.count("UserWarning") == 1 and "instead of 'cpu'" in done.stderr and "not built" in done.stderr


def test_explain_for_a_device_that_is_not_here() -> None:
    """A CUDA call is explained on any machine: what would run there, or why not."""
    with backend.use("auto"):
        explanation = backend.explain("bottleneck", **SHAPE, device="cuda", dtype=torch.bfloat16, param_dtype=torch.float32)
    assert explanation.chosen in ("cuda", "triton", "reference")
    assert explanation.chosen == "cuda" or explanation.reasons["cuda"]
    assert explanation.chosen != "reference" or explanation.reasons["triton"]


BF16 = {"rows": 16384, "width": 768, "rank": 96, "dtype": torch.bfloat16, "param_dtype": torch.float32}


def test_explain_for_an_architecture_is_of_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would run on an A100 or H100, with its modelled times; what this machine lacks is said beside it and changes nothing."""
    monkeypatch.setenv("FASTADAPT_CALIBRATION", "")
    told = {}
    for here in (torch.cuda.is_available(), False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        backend._choice.cache_clear()
        with backend.use("auto"):
            told[here] = [backend.explain("bottleneck", **BF16, device=device) for device in ("sm_80", "sm_90", "sm90", "sm_90a")]
    for explanations in told.values():
        assert [(e.chosen, e.call.arch, e.call.device) for e in explanations] == [("cuda", 80, "cuda"), *[("cuda", 90, "cuda")] * 3]
    e = told[False][1]
    assert e.reasons == {"cuda": [], "triton": [], "reference": []} and e.here.keys() == {"cuda", "triton"} and e.passed_over == ()
    assert e.estimates["cuda"].microseconds == e.estimates["cuda"].forward.microseconds + e.estimates["cuda"].backward.microseconds
    for name, estimate in e.estimates.items():
        assert f"  {name}: can run it, {estimate.microseconds:.0f} us modelled: forward {estimate.forward.microseconds:.0f} (" in str(e)
    assert "times modelled for H100-SXM5, which stands for sm_90, not measured" in str(e) and "on this machine: triton: " in str(e) and "on sm_90: cuda" in str(e)
    with backend.use("triton"):
        assert backend.explain("bottleneck", **BF16, device="sm_90").chosen == "triton"
    with backend.use("cpu"), pytest.raises(backend.BackendError, match="'cpu' was demanded"):
        backend.explain("bottleneck", **BF16, device="sm_90")
    backend._choice.cache_clear()


def test_numbers_in_schemas_stay() -> None:
    assert [backend.index(name) for name in ("auto", "reference", "cpu", "triton", "cuda", "emulated-cuda")] == list(range(6))


def test_the_emulator_is_for_tests() -> None:
    with pytest.raises(ValueError, match=r"must be one of auto, reference, cpu, triton, cuda$"):
        backend.index("gpu")
    code = """
        from fastadapt import backend
        with backend.use("emulated-cuda"):
            try:
                backend.explain("bottleneck", rows=4, width=8, rank=2)
            except backend.BackendError as error:
                print(error)
    """
    refused = output(code)
    assert refused.startswith("backend 'emulated-cuda' was demanded but cannot run bottleneck") and "for tests" in refused


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with one device of compute capability 9.0 where every kernel is built, as far as the choice goes."""
    from fastadapt.ops.bottleneck.plan import Plan

    monkeypatch.setenv("FASTADAPT_CALIBRATION", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(Plan, "reasons", lambda self, name, call: [] if name == "reference" else self.limits_of_the_call(name, call))
    monkeypatch.setattr(Plan, "limits_of_the_call", lambda self, name, call: ["not bfloat16"] if name == "cuda" and call.dtype != torch.bfloat16 else [], raising=False)
    backend._warned.clear()
    backend._choice.cache_clear()
    backend._capability.cache_clear()
    with backend.use("auto"):
        yield monkeypatch
    backend._choice.cache_clear()
    backend._capability.cache_clear()


def test_auto_on_a_cuda_device(gpu: pytest.MonkeyPatch) -> None:
    assert backend.architecture(torch.device("cuda")) == backend.architecture(torch.device("cuda:0")) == 90 and backend.architecture(torch.device("cpu")) == 0
    told = backend.explain("bottleneck", **BF16, device="cuda")
    assert (told.chosen, told.call.arch, told.here) == ("cuda", 90, {}) and set(told.estimates) == {"cuda", "triton", "reference"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose(told.call) == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (1000, 2000):
            assert backend.choose(told.call._replace(dtype=torch.float32, rows=rows)) == "triton"
    assert [str(w.message) for w in caught] == ["fastadapt: bottleneck runs on 'triton' instead of 'cuda': not bfloat16"]
    assert backend.choose(told.call, backend.index("reference")) == "reference"


def test_forward_and_backward_are_one_choice(gpu: pytest.MonkeyPatch) -> None:
    """The call that an op describes is the same in both directions, so the backend is too."""
    from fastadapt.ops.bottleneck import schema as bottleneck
    from fastadapt.ops.gated_bottleneck import schema as gated

    class OnDevice:
        """A tensor as far as `call_of` looks."""

        def __init__(self, *shape: int, dtype: torch.dtype) -> None:
            self.shape, self.dtype, self.device = shape, dtype, torch.device("cuda:0")

    x, w = OnDevice(4096, 768, dtype=torch.bfloat16), OnDevice(96, 768, dtype=torch.float32)
    plain, large = bottleneck.call_of(x, w), gated.call_of(x, w, w, 0)  # type: ignore[arg-type]
    assert plain == backend.explain("bottleneck", **{**BF16, "rows": 4096}, device="cuda").call
    assert large == backend.explain("gated_bottleneck", **{**BF16, "rows": 4096}, device="cuda", granularity="large", gate_rank=96).call
    assert plain.arch == large.arch == 90 and backend.choose(plain) == backend.choose(large) == "cuda"


def test_the_capability_is_asked_for_once_a_device(gpu: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    gpu.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (8, index))
    assert [backend.architecture(torch.device("cuda", i)) for i in (0, 6, 0, 6, 6)] == [80, 86, 80, 86, 86] and asked == [0, 6]
