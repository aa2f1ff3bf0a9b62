"""`fastadapt convert`: state dict to adapter directory and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastadapt import patching
from fastadapt.cli import main
from fastadapt.interop import published_state_dict, read_state_dict
from fastadapt.interop.conversion import build_host
from tests import golden
from tests.hosts import tiny
from tests.hosts.published import method_of, patched_model
from tests.interop.same import assert_agree, hub_kind

CASES = {
    "vla_vlbart_single_adapter": "vlbart",
    "vla_vlt5_single_adapter": "vlt5",
    "vlpet_vlbart_large": "vlbart",
    "vlpet_vlt5_large": "vlt5",
    "vla_vlbart_encoder_prompt_single_adapter": "vlbart",
}


@pytest.mark.parametrize("case_id", CASES)
def test_file_to_directory(case_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recorded checkpoint becomes an adapter that, loaded into the recorded base, is the recorded model."""
    case = golden.load_case(case_id)
    method, options = method_of(case)
    torch.save(case.params, tmp_path / "published.pth")
    arguments = [str(tmp_path / "published.pth"), str(tmp_path / "adapter"), "--host", CASES[case_id], "--method", method, "--tasks", case.options["tasks"]]
    for name, value in options.items():
        arguments += ["--option", f"{name}={value}"]
    assert main(["convert", *arguments]) == 0
    assert f"{method} at " in capsys.readouterr().out
    model, handle = patched_model(case, torch.float32)
    want = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in handle.trainable_parameters():
            parameter.zero_()
    handle.load(tmp_path / "adapter")
    assert all(torch.equal(tensor, want[key]) for key, tensor in model.state_dict().items())


def small(host: str) -> dict[str, torch.Tensor]:
    return {key: t for key, t in golden.load_case({"vlbart": "vla_vlbart_single_adapter", "vlt5": "vla_vlt5_single_adapter"}[host]).params.items() if "adapter" not in key}


VLPET = {"rank": 8, "heads": 4, "gate_rank": 4, "value_rank": 4}
OPTIONS: dict[str, dict[str, Any]] = {"vlpet": VLPET, "vl_adapter": {"rank": 4}, "lora": {"rank": 4}, "hyperformer": {"reduction_factor": 8}, "compacter": {"rank": 4}}


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("host", ["vlbart", "vlt5"])
@pytest.mark.parametrize(("suffix", "depths"), [(".pth", (3, 1)), (".safetensors", (1, 3))])
def test_directory_to_file_and_back(suffix: str, depths: tuple[int, int], host: str, method: str, tmp_path: Path) -> None:
    """An encoder and a decoder of different depths; the file holds what is trained and shows the sizes."""
    model: Any = build_host(host, small(host), {"encoder_layers": depths[0], "decoder_layers": depths[1]})
    handle = patching.patch(model, method, tasks=["vqa"], **OPTIONS[method])
    tiny.randomize(handle)
    handle.save(tmp_path / "adapter")
    target = tmp_path / f"out{suffix}"
    assert main(["convert", str(tmp_path / "adapter"), str(target), "--host", host]) == 0
    want = published_state_dict(handle, base=False)
    found = read_state_dict(target) if suffix == ".pth" else load_file(target)
    assert found.keys() == want.keys() and all(torch.equal(found[key], want[key]) for key in want)
    options = [part for name, value in OPTIONS[method].items() for part in ("--option", f"{name}={value}")]
    assert main(["convert", str(target), str(tmp_path / "back"), "--host", host, "--method", method, "--tasks", "vqa", *options]) == 0
    ours, again = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "back"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[key], again[key]) for key in ours)


def sizes(host: str) -> tuple[int, ...]:
    options = golden.load_case({"vlbart": "vla_vlbart_single_adapter", "vlt5": "vla_vlt5_single_adapter"}[host]).options
    return options["d_model"], 2, options["ffn"], options["feat_dim"]


def test_sizes_from_the_tensors() -> None:
    model: Any = build_host("vlt5", small("vlt5"))
    assert (model.config.d_model, model.config.num_layers, model.config.d_ff, model.config.feat_dim) == sizes("vlt5")
    model = build_host("vlbart", small("vlbart"))
    assert (model.config.d_model, model.config.encoder_layers, model.config.encoder_ffn_dim, model.config.feat_dim) == sizes("vlbart")


@pytest.mark.parametrize("host", ["vlbart", "vlt5", "bart", "t5"])
def test_depths_from_the_tensors(host: str) -> None:
    """Also those of a whole model's state dict; a stack that is not there is as deep as the other."""
    names = ("encoder_layers", "decoder_layers") if "bart" in host else ("num_layers", "num_decoder_layers")
    given: Any = build_host(host, known={"encoder_layers": 3, "decoder_layers": 1, "d_model": 12, "ffn": 16, "vocab_size": 20})
    states = given.state_dict()
    for keys, want in ((states.keys(), (3, 1)), ([key for key in states if "decoder." not in key], (3, 3)), ([], (6, 6) if "bart" in host else (12, 12))):
        found: Any = build_host(host, {key: states[key] for key in keys}, {"d_model": 12, "ffn": 16, "vocab_size": 20})
        assert tuple(getattr(found.config, name) for name in names) == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.pth", "out", "--host", "vlbart", "--method", "vlpet"], "source: 'absent.pth' does not exist; must be a .pth or .safetensors file or an adapter directory"),
        (["absent", "out", "--host", "bart"], "source: 'absent' does not exist"),
        (["a.pth", "out", "--host", "vlbart", "--layout", "peft", "--method", "lora"], "layout: the source is a state dict; must be vl or compacter, not 'peft'"),
        (["a.pth", "a.pth/out", "--host", "vlbart", "--method", "layer_norm"], "destination: 'a.pth/out' cannot be written ("),
        (["a.pth", "out", "--host", "vlbart", "--method", "vlpet", "--option", "model=1"], "model: is no option of a method"),
        (["folder", "out.pth", "--host", "bart", "--method", "vlpet"], "method: the source is an adapter directory of fastadapt, which knows its method"),
        (["folder", "out.pth", "--host", "bart", "--option", "rank=4"], "rank: the source is an adapter directory of fastadapt, which knows its method and options"),
        (["folder", "out.pth", "--host", "bart", "--tasks", "a"], "tasks: the source is an adapter directory of fastadapt, which knows its tasks; must not be given, not ['a']"),
        (["folder", "out", "--host", "bart", "--layout", "peft", "--tasks", "a,b"], "tasks: a directory of PEFT holds one task's adapters; must be one, not ['a', 'b']"),
        (["a.pth", "out", "--host", "vlbart"], "method: must be given"),
        (["a.pth", "out.pth", "--host", "vlbart", "--method", "vlpet"], "destination: must be a directory"),
        (["folder", "out", "--host", "vlbart"], "destination: must end in .pth or .safetensors"),
        (["folder", "out.pth", "--host", "bart", "--layout", "peft"], "destination: must be a directory, since AdapterHub's and PEFT's adapters are directories"),
        (["folder", "out", "--host", "bart", "--layout", "adapterhub"], "folder: must hold adapter_config.json and adapter_model.safetensors"),
        (["a.pth", "out", "--host", "vlbart", "--method", "vlpet", "--option", "rnk=3"], "unknown option 'rnk'"),
    ],
)
def test_refused(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    torch.save(small("vlbart"), tmp_path / "a.pth")
    assert main(["convert", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "folder"]


@pytest.mark.parametrize(("family", "depths"), [("bart", (3, 2)), ("t5", (1, 3))])
@pytest.mark.parametrize(
    ("library", "method", "options"),
    [
        ("adapterhub", *hub_kind("seq_bn", "t5")),
        ("adapterhub", *hub_kind("compacter", "t5")),
        ("adapterhub", "vl_adapter", {"rank": 4, "sharing": "multiple", "layer_norms": "none", "visual_embedding": False}),
        ("peft", "lora", {"rank": 4, "biases": False, "layer_norms": "none", "visual_embedding": False}),
    ],
    ids=["pfeiffer", "compacter", "one of two tasks", "lora"],
)
def test_libraries_directories_and_back(
    library: str, method: str, options: dict[str, Any], family: str, depths: tuple[int, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hosts of the sizes that the directories show: the tensors that come back are those that went."""
    tasks = ["vqa", "gqa"] if options.get("sharing") == "multiple" else []
    model = tiny.tiny(family, layers=depths)
    handle = patching.patch(model, method, tasks=tasks, **options)
    tiny.randomize(handle)
    handle.save(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--host", family, "--layout", library, *(["--tasks", "gqa"] if tasks else [])]) == 0
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "back"), "--host", family]) == 0
    said = capsys.readouterr().out
    assert f"the adapters of {len(handle.sites)} sites as {'PEFT' if library == 'peft' else 'AdapterHub'} reads them" in said and f"{method} at {len(handle.sites)} sites" in said
    if tasks:
        handle.set_task("gqa")
    other = tiny.tiny(family, layers=depths)
    patching.load(other, tmp_path / "back")
    assert_agree(tiny.logits(other), tiny.logits(model))


BART_LINEARS: list[Any] = [["q_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"], ["fc1", "fc2"], ["q_proj", "fc2"], ["lm_head"], "all-linear"]
T5_LINEARS: list[Any] = [["q"], ["o"], ["wi"], ["wo"], ["o", "wo"], ["wi", "wo"], ["v", "wo"], ["lm_head"], "all-linear"]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *(("bart", {"target_modules": targets}) for targets in BART_LINEARS),
        *(("bart", {"target_modules": targets, "bias": "all"}) for targets in (["k_proj"], ["fc2"], "all-linear")),
        *(("t5", {"target_modules": targets}) for targets in T5_LINEARS),
    ],
    ids=str,
)
def test_what_peft_saved_and_back(family: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose places are paths: the tensors that come back are those that went, whatever the depths and widths. Here a feed-forward network is twice as wide as the model, and a T5's
    attention half as wide."""
    peft = pytest.importorskip("peft")
    base: Any = tiny.tiny(family, layers=(8, 7) if family == "bart" else (1, 2))
    if family == "t5":
        base.config.d_kv = 4
        base = type(base)(base.config)
    model = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, task_type="SEQ_2_SEQ_LM", **options))
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--host", family]) == 0, capsys.readouterr().err
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--host", family, "--layout", "peft"]) == 0, capsys.readouterr().err
    want, got = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "back"))
    assert got.keys() == want.keys() and all(torch.equal(got[key], t) for key, t in want.items())


@pytest.mark.parametrize(("family", "pattern"), [("bart", r".*\.(out_proj|fc2)"), ("t5", r".*\.wo")])
def test_sites_of_a_pattern_to_peft(family: str, pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pattern of one's own shows no depths, so that the host is as deep as the published one."""
    model = tiny.tiny(family, layers=6 if family == "bart" else 12)
    options: dict[str, Any] = {"biases": False, "layer_norms": "none", "visual_embedding": False}
    handle = patching.patch(model, "lora", rank=4, sites={"encoder.self_attention.value": pattern}, tasks=["a", "b"], sharing="multiple", **options)
    handle.save(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--host", family, "--layout", "peft", "--tasks", "b"]) == 0, capsys.readouterr().err
    assert len(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) == 2 * len(handle.sites)


def test_tables_of_a_t5_do_not_go_to_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patching.patch(tiny.tiny("t5"), "lora", rank=4, layer_norms="none").save(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--host", "t5", "--layout", "peft"]) == 1
    assert "source: holds T5's tables of relative position biases, for which PEFT's files have no place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--method", "vlpet"], "method: the source is an adapter directory of PEFT, which knows its method and options; must not be given, not 'vlpet'"),
        (["--option", "granularity=small"], "granularity: the source is an adapter directory of PEFT, which knows its method and options; must not be given, not 'small'"),
        (["--tasks", "a,b"], "tasks: the source is an adapter directory of PEFT, which has none; must not be given, not ['a', 'b']"),
        (["--layout", "adapterhub"], "layout: the source is an adapter directory of PEFT, which is written as fastadapt's; must not be given, not 'adapterhub'"),
    ],
)
def test_arguments_that_a_librarys_directory_has_no_use_for(given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out"), "--host", "bart", *given]) == 1
    assert capsys.readouterr().err == f"fastadapt convert: {message}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["file/out.pth", "file/out.safetensors", "file/out"])
def test_destinations_that_cannot_be_written(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patching.patch(tiny.tiny("bart"), "lora", rank=4, biases=False, layer_norms="none", tasks=["a"]).save(tmp_path / "ours")
    (tmp_path / "file").touch()
    layout = [] if "." in target else ["--layout", "peft"]
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / target), "--host", "bart", *layout]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"fastadapt convert: destination: '{tmp_path / target}' cannot be written (") and said.count("\n") == 1


@pytest.mark.parametrize("config", ["3", "null", "[]"])
def test_a_configuration_that_is_none(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text(config)
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "out.pth"), "--host", "bart"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastadapt convert: ") and "adapter_config.json" in said and said.count("\n") == 1


@pytest.mark.parametrize(("host", "key"), [("vlbart", "model.shared.weight"), ("vlt5", "encoder.block.0.layer.0.SelfAttention.q.weight")])
def test_a_tensor_of_too_few_dimensions(host: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({key: torch.tensor(3.0)}, tmp_path / "theirs.pth")
    assert main(["convert", str(tmp_path / "theirs.pth"), str(tmp_path / "out"), "--host", host, "--method", "vlpet", "--tasks", "vqa"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastadapt convert: ") and key in said and said.count("\n") == 1


def test_bad_option() -> None:
    with pytest.raises(SystemExit):
        main(["convert", "a", "b", "--host", "vlbart", "--option", "rank"])
    with pytest.raises(ValueError, match="host: must be one of vlbart, vlt5, t5, bart, not 'blip'"):
        build_host("blip")
