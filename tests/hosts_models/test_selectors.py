"""Where in a model a patch works: towers, layers, what is dead; the register of hosts and the table made from it."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastadapt import hosts, methods, patching
from fastadapt.hosts import ROLES, roles
from fastadapt.hosts.roles import Place
from fastadapt.hosts.stages import STAGES
from fastadapt.patching import Handle, UnknownHostError, patch
from tests.hosts import tiny as seq2seq
from tests.hosts.tiny import assert_same, randomize, snapshot
from tests.hosts_models.models import KINDS, image_batch, llava, output, tiny

R4: dict[str, Any] = {"reduction_factor": 4}


def stacks(handle: Handle) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in handle.sites))


@pytest.mark.parametrize(
    ("kind", "towers", "expected"),
    [
        ("llava", ["text"], ["language"]),
        ("llava", ["vision"], ["vision"]),
        ("llava", ["projector"], ["projector"]),
        ("llava", ["projector", "text"], ["language", "projector"]),
        ("blip2_t5", ["projector"], ["qformer", "projector"]),
        ("blip2_t5", ("text",), ["encoder", "decoder"]),
        ("clip", ["vision"], ["vision"]),
        ("mllama", ["vision"], ["vision", "vision@1"]),
        ("florence2", ["vision"], ["vision", "vision@1"]),
        ("qwen3_vl", ["projector"], ["projector", "projector@1"]),
    ],
)
def test_towers(kind: str, towers: Any, expected: list[str], tmp_path: Path) -> None:
    model = tiny(kind).requires_grad_(False)
    out = output(model, KINDS[kind].batch())
    before = snapshot(model)
    handle = patch(model, "vl_adapter", towers=towers, **R4)
    assert stacks(handle) == expected
    assert any("towers=" in why for _, why in handle.skipped) and "towers=" in str(handle.report)
    randomize(handle)
    model(**KINDS[kind].batch()).loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters())
    handle.save(tmp_path)
    fresh = tiny(kind).requires_grad_(False)
    assert patching.load(fresh, tmp_path).config.towers == tuple(towers)
    assert torch.equal(output(fresh, KINDS[kind].batch()), output(model, KINDS[kind].batch()))
    handle.unpatch(restore_base=True)
    assert_same(before, snapshot(model))
    assert torch.equal(output(model, KINDS[kind].batch()), out)


def test_base_tensors_stay_in_the_towers() -> None:
    """LoRA trains biases, "layer_norm" the norms: those of the towers alone, and none that never gets a gradient."""
    trained = {}
    for towers in (["text"], ["vision"], ["projector"], None):
        model = tiny("llava")
        handle = patch(model, "lora", rank=2, towers=towers) if towers != ["projector"] else patch(model, "bitfit", towers=towers)
        names = {p.data_ptr(): name for name, p in model.named_parameters()}
        trained[str(towers)] = [names[t.parameter.data_ptr()] for t in handle._trained]
    assert trained["['text']"] == []  # Llama has none
    assert all("vision_tower" in name for name in trained["['vision']"]) and len(trained["['vision']"]) == 17
    assert trained["['projector']"] == ["model.multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_2.bias"]
    assert len(trained["None"]) == 19 and not any("layers.2." in name or "post_layernorm" in name for name in trained["None"])
    model = tiny("llava")
    named = {id(p): name for name, p in model.named_parameters()}
    for tower, part in (("text", "language_model"), ("vision", "vision_tower")):
        handle = patch(model, "layer_norm", towers=[tower])
        assert all(part in named[id(t.parameter)] for t in handle._trained) and len(handle._trained) > 4
        handle.unpatch()
    # What is in no tower counts as text.
    handle = patch(model, "lm_head", towers=["text"])
    assert [t.id for t in handle._trained] == ["lm_head.weight"]
    handle.unpatch()
    with pytest.raises(ValueError, match="base_tuning has no site in this LlavaForConditionalGeneration and nothing that its options train"):
        patch(model, "lm_head", towers=["vision"])


def test_layer_norms_of_one_family_alone() -> None:
    """BART's published values train all norms; Florence-2's vision tower has no published values."""
    model = tiny("florence2")
    named = {id(p): name for name, p in model.named_parameters()}
    handle = patch(model, "vl_adapter", **R4)
    assert set(handle.resolved) == {"other hosts", "bart"}
    trained = [named[id(t.parameter)] for t in handle._trained]
    assert trained and not any("vision_tower" in name or "projector" in name for name in trained)


def test_new_biases_and_norms_stay_in_the_towers() -> None:
    """What is in no tower, as an output layer, gets none in the others."""
    model = tiny("llava")
    handle = patch(model, "base_tuning", add_biases=True, layer_norms="all", towers=["vision"])
    named = {id(p): name for name, p in model.named_parameters()}
    assert handle._trained and [name for t in handle._trained if "vision_tower" not in (name := named[id(t.parameter)])] == []


@pytest.mark.parametrize("method", ["vl_adapter", "vlpet", "lora"])
def test_layers(method: str) -> None:
    options: dict[str, Any] = {"vl_adapter": R4, "vlpet": {"rank": 8, "gate_rank": 4}, "lora": {"rank": 2}}[method]
    model = tiny("llava")
    handle = patch(model, method, layers=range(1, 3), towers=["text", "vision"], **options)
    assert {name.split(".")[1] for name in handle.sites} == {"1"} and stacks(handle) == ["vision", "language"]
    assert handle.resolved["other hosts"].layers == (1, 2)
    assert any(why == f"{handle.config.method} leaves out this layer" for _, why in handle.skipped)


def test_layers_keep_what_is_in_no_stack(tmp_path: Path) -> None:
    """A projector has no layers; it stays with any of the others', and so it does in a file."""
    model = tiny("llava")
    handle = patch(model, "vl_adapter", layers=range(1, 2), towers=["text", "projector"], **R4)
    assert set(handle.sites) == {"language.1.self_attention", "language.1.feed_forward", "projector.0.feed_forward"}
    handle.save(tmp_path)
    assert set(patching.load(tiny("llava"), tmp_path).sites) == set(handle.sites)
    handle = patch(tiny("llama"), "vl_adapter", layers=[1], sites={"encoder.feed_forward": r".*\.down_proj|lm_head"}, **R4)
    assert [s.path.rpartition(".")[0] for s in handle.report.sites] == ["model.layers.1.mlp.down_proj", "lm_head"]


def test_bad_selectors() -> None:
    model = tiny("llava")
    before = snapshot(model)
    for options, match in (
        ({"towers": "text"}, "towers: must be some of text, vision, projector, or None for all, not 'text'"),
        ({"towers": []}, r"towers: must be some of text, vision, projector, or None for all, not \[\]"),
        ({"towers": ["audio"]}, "towers: must be some of text"),
        ({"layers": "0"}, "layers: must be numbers of layers, from 0, or None for all, not '0'"),
        ({"layers": range(0)}, "layers: must be numbers of layers"),
        ({"layers": [-1]}, r"layers: must be numbers of layers, from 0, or None for all, not \[-1\]"),
        ({"layers": [0, 7]}, "layers: no stack has 7; vision has 0 to 2, language has 0 to 1"),
        ({"layers": [2], "towers": ["text", "projector"]}, "layers: no stack has 2; language has 0 to 1"),
        ({"layers": [0], "towers": ["projector"]}, "layers: no stack has 0; there is none here"),
        ({"trained_modules": ["lm_haed"]}, "trained_modules: 'lm_haed' names no module of this LlavaForConditionalGeneration that has parameters"),
        ({"trained_modules": ["lm_head"], "towers": ["vision"]}, r"trained_modules: 'lm_head' names no module .* in towers=\['vision'\]"),
        ({"layers": [7]}, "layers: no stack has 7; vision has 0 to 2, language has 0 to 1"),
    ):
        with pytest.raises(ValueError, match=match):
            patch(model, "vl_adapter", **options)  # type: ignore[arg-type]
        assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match="towers: this LlamaForCausalLM has no vision, projector; it has text"):
        patch(tiny("llama"), "vl_adapter", towers=["vision", "text", "projector"])
    # A projector stands in no residual stream.
    with pytest.raises(ValueError, match=r"has no site .* projector.0.feed_forward: there is no residual stream, which vlpet reads"):
        patch(model, "vlpet", towers=["projector"])
    with pytest.raises(ValueError, match="layers: base_tuning has no adapters that could be in some layers only"):
        patch(model, "bitfit", layers=[0])
    with pytest.raises(ValueError, match="towers: not with an intrinsic dimension, which moves the whole base"):
        patch(seq2seq.tiny("bart"), "said", dimension=5, towers=["text"])
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"model: no layer of this LlavaForConditionalGeneration is left to patch: .*vision_feature_layer=0 reads what comes before"):
        patch(llava()(vision_feature_layer=0), "vl_adapter", towers=["vision"])
    with pytest.raises(ValueError, match="model: has no encoder, so encoder_prompt must be 0"):
        patch(model, "vl_adapter", encoder_prompt=3)
    with pytest.raises(ValueError, match="uniadapter: no published values for 'other hosts'; known: blip"):
        patch(model, "uniadapter")


@pytest.mark.parametrize(("feature", "dead"), [(-2, [2]), (-1, []), (1, [1, 2]), ([0, -3], [1, 2])])
def test_layers_behind_the_vision_features_are_left_alone(feature: Any, dead: list[int]) -> None:
    many = isinstance(feature, list)
    torch.manual_seed(0)
    model = llava()(vision_feature_layer=feature).eval()
    handle = patch(model, "vl_adapter", towers=["vision"], biases=True, **R4)
    assert sorted({int(name.split(".")[1]) for name in handle.sites}) == [i for i in range(3) if i not in dead]
    reasons = {(int(name.split(".")[1]), why) for name, why in handle.skipped if name.startswith("vision.") and "puts nothing" not in why}
    assert reasons == {(i, f"vision_feature_layer={feature} reads what comes before") for i in dead}
    randomize(handle, std=0.05)
    model(**image_batch(4)).loss.backward()
    assert all(p.grad is not None for p in handle.trainable_parameters()) and len(handle._trained) >= 8
    assert not many or len(handle.sites) == 2


def test_other_dead_parts() -> None:
    """SigLIP's pooling head, which language models do not read, and the text half of the last layer of InstructBLIP's Q-Former."""
    handle = patch(tiny("paligemma"), "bitfit", towers=["vision"])
    assert handle._trained and not any("head" in t.id for t in handle._trained)
    handle = patch(tiny("instructblip"), "vl_adapter", **R4)
    assert "qformer.0.feed_forward.text" in handle.sites
    assert ("qformer.1.feed_forward.text", "only the queries leave the last layer") in handle.skipped
    handle = patch(tiny("siglip"), "bitfit")  # read by a contrast
    assert any("head" in t.id for t in handle._trained)


def test_roles_of_stacks() -> None:
    """VL-PET's gates go into every stack that reads the input by itself, its decoder modules where a stack attends to another."""
    options: dict[str, Any] = {"rank": 8, "gate_rank": 4, "value_rank": 3}
    model = tiny("blip2_t5")
    kinds = {name: type(site).__name__ for name, site in patch(model, "vlpet", **options).sites.items()}
    assert {name for name, kind in kinds.items() if kind == "ValueParallelAdapter"} == {"qformer.0.cross_attention.value", "decoder.0.cross_attention.value"}
    assert {name.split(".")[0] for name, kind in kinds.items() if kind == "GatedBottleneck"} == {"vision", "encoder"}
    assert set(kinds.values()) == {"ValueParallelAdapter", "GatedBottleneck"}
    with pytest.raises(ValueError, match=r"cross_attn.v_proj maps 32 to 16; an adapter beside it needs one width on both sides"):
        patch(tiny("mllama"), "vlpet", **options)
    handle = patch(tiny("mllama"), "vlpet", rank=8, gate_rank=4, decoder="multihead")
    assert "language.1.cross_attention" in handle.sites and "language.2.self_attention" in handle.sites


# Per kind of block: the last projections of attention and feed-forward network, and the modules whose inputs are the streams before both.
LLAMA = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
SUB_LAYERS: dict[str, tuple[str, str, str, str]] = {
    "MBartEncoderLayer": ("self_attn.out_proj", "fc2", "self_attn_layer_norm", "final_layer_norm"),
    "CLIPEncoderLayer": ("self_attn.out_proj", "mlp.fc2", "layer_norm1", "layer_norm2"),
    "SiglipEncoderLayer": ("self_attn.out_proj", "mlp.fc2", "layer_norm1", "layer_norm2"),
    "LlamaDecoderLayer": LLAMA,
    "Qwen2VLDecoderLayer": LLAMA,
    "Qwen3VLTextDecoderLayer": LLAMA,
    # In the sandwich, before the second norm.
    "Gemma2DecoderLayer": ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "pre_feedforward_layernorm"),
    "Gemma3DecoderLayer": ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "pre_feedforward_layernorm"),
    "OPTDecoderLayer": ("self_attn.out_proj", "fc2", "self_attn_layer_norm", "final_layer_norm"),
    "Blip2EncoderLayer": ("self_attn.projection", "mlp.fc2", "layer_norm1", "layer_norm2"),
    "Qwen2VLVisionBlock": ("attn.proj", "mlp.fc2", "norm1", "norm2"),
    "Qwen2_5_VLVisionBlock": ("attn.proj", "mlp.down_proj", "norm1", "norm2"),
    "Qwen3VLVisionBlock": ("attn.proj", "mlp.linear_fc2", "norm1", "norm2"),
    # Before the factors of its channels.
    "InternVLVisionLayer": ("attention.projection_layer", "mlp.fc2", "layernorm_before", "layernorm_after"),
    # Windows are put back in place behind the projection.
    "Florence2VisionSpatialBlock": ("window_attn", "ffn.fc2", "norm1", "norm2"),
    "Florence2VisionChannelBlock": ("channel_attn.proj", "ffn.fc2", "norm1", "norm2"),
    # Before the gates.
    "MllamaSelfAttentionDecoderLayer": LLAMA,
    "MllamaVisionEncoderLayer": ("self_attn.o_proj", "mlp.fc2", "input_layernorm", "post_attention_layernorm"),
}


@pytest.mark.parametrize(
    "kind", ["mbart", "clip", "llama", "gemma2", "gemma3", "opt", "blip2_opt", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "florence2", "mllama"]
)
def test_modules_see_what_their_role_says(kind: str) -> None:
    """h is what the sub-layer's last projection gave, x the stream before its layer norm."""
    model: Any = tiny(kind)
    handle = patch(model, "vlpet", init="identity", rank=8, gate_rank=4, decoder=())
    seen: dict[str, Any] = {}
    checked = []
    for report in handle.report.sites:
        path, part = report.path.rpartition(".")[0], report.id.split(".")[2]
        block = model.get_submodule(path)
        if type(block).__name__ not in SUB_LAYERS or part not in ("self_attention", "feed_forward"):
            continue
        projection, norm = SUB_LAYERS[type(block).__name__][part == "feed_forward" :: 2]
        handle.sites[report.id].register_forward_hook(lambda _m, args, _out, key=report.id: seen.__setitem__(key, args))
        block.get_submodule(projection).register_forward_hook(lambda _m, _a, out, key=report.id: seen.__setitem__(key + " h", out))
        block.get_submodule(norm).register_forward_hook(lambda _m, args, _out, key=report.id: seen.__setitem__(key + " x", args[0]))
        checked.append(report.id)
    output(model, KINDS[kind].batch())
    assert len(checked) >= 4
    for key in checked:
        (h, x), shape = seen[key], seen[key][0].shape
        assert torch.equal(h, seen[f"{key} h"].view(shape)) and torch.equal(x, seen[f"{key} x"].view(shape)), key


def test_the_qformers_modules_see_what_their_role_says() -> None:
    model: Any = tiny("instructblip")
    handle = patch(model, "vl_adapter", **R4)
    seen: dict[str, Any] = {}
    layer = model.qformer.encoder.layer[0]
    owners = {"self_attention": layer.attention.output, "cross_attention": layer.crossattention.output, "feed_forward": layer.output_query, "feed_forward.text": layer.output}
    for name, owner in owners.items():
        handle.sites[f"qformer.0.{name}"].register_forward_hook(lambda _m, args, _out, name=name: seen.__setitem__(name, args))
        owner.dense.register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name + " h", out))
        owner.register_forward_hook(lambda _m, args, _out, name=name: seen.__setitem__(name + " x", args[1]))
    output(model, KINDS["instructblip"].batch())
    for name in owners:
        assert torch.equal(seen[name][0], seen[f"{name} h"]) and torch.equal(seen[name][1], seen[f"{name} x"])
    assert seen["feed_forward"][0].shape[1] == 3 and seen["feed_forward.text"][0].shape[1] == 5


def test_towers_of_blip() -> None:
    from tests.hosts.published_blip import tiny_blip

    handle = patch(tiny_blip("retrieval"), "uniadapter", rank=4, key_value_rank=2, towers=["text"])
    assert stacks(handle) == ["text"] and any("belongs to the vision tower" in why for _, why in handle.skipped)


def test_prompts_where_a_part_has_them() -> None:
    """BART's stages in Florence-2, whose vision tower has none."""
    model = tiny("florence2")
    handle = patch(model, "vl_adapter", encoder_prompt=2, prompt_mid=None, **R4)
    randomize(handle)
    model(**KINDS["florence2"].batch()).loss.backward()
    assert "encoder.prompt" in handle.sites and all(p.grad is not None for p in handle.trainable_parameters())


def test_files_without_selectors_are_as_before(tmp_path: Path) -> None:
    import json

    model = seq2seq.tiny("bart")
    handle = patch(model, "vl_adapter", **R4)
    randomize(handle)
    handle.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"towers", "layers", "sites"} & config["options"]["bart"].keys()
    # Files of the time when VL-Adapter alone had layers say that they were not given.
    config["options"]["bart"]["layers"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    fresh = seq2seq.tiny("bart")
    patching.load(fresh, tmp_path)
    assert torch.equal(seq2seq.logits(fresh), seq2seq.logits(model))


@pytest.mark.parametrize("kind", ["llava", "blip2_t5", "gemma3", "mbart"])
def test_copied_and_pickled(kind: str) -> None:
    model = tiny(kind)
    randomize(patch(model, "vl_adapter", **R4))
    out = output(model, KINDS[kind].batch())  # of the fresh model: its recording of hidden states holds local functions that do not pickle
    other = copy.deepcopy(model)
    assert torch.equal(output(other, KINDS[kind].batch()), out) and Handle.of(other).model is other
    Handle.of(other).unpatch()
    assert not any(roles.is_adapted(m) for m in other.modules()) and any(roles.is_adapted(m) for m in model.modules())
    if kind != "llava":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(output(torch.load(buffer, weights_only=False), KINDS[kind].batch()), out)


@pytest.mark.full
def test_unpickled_in_another_process(tmp_path: Path) -> None:
    """Classes made on the way are found by name: adapted layers, modules with an adapter behind them."""
    model = tiny("paligemma")
    randomize(patch(model, "vl_adapter", **R4))
    named = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    randomize(patch(named, "vl_adapter", sites={"encoder.feed_forward": "1"}, rank=2))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.save((model, named, KINDS["paligemma"].batch(), output(model, KINDS["paligemma"].batch()), x, named(x).detach()), tmp_path / "model.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1); m, n, b, y, x, z = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): assert torch.allclose(m(**b).logits, y, atol=1e-6) and torch.allclose(n(x), z, atol=1e-6)\n"
        "from fastadapt.patching import Handle; Handle.of(m).unpatch(); Handle.of(n).unpatch(); print(type(m.model.language_model.layers[0]).__module__, type(n[1]).__module__)"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == "transformers.models.gemma.modeling_gemma torch.nn.modules.linear"


def test_save_pretrained_stays_loadable(tmp_path: Path) -> None:
    model: Any = tiny("llava")
    patch(model, "vl_adapter", init="identity", **R4)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, image_batch(4)), output(tiny("llava").requires_grad_(False), image_batch(4)))


def test_declared_sources_are_those_installed() -> None:
    """Every declared class is there, its forward is one that the copy was made from, and no source that is said to be of this version is of no class."""
    roles.load_declarations()
    used = set()
    for (module, block), declared in roles._declared.items():
        stock = import_module(module)
        host = declared.host(getattr(stock, block))
        for cls, adapted in host.adapted.items():
            roles.check_source(cls, host.sources[cls])
            used.add(roles.source_hash(cls))
            assert adapted.__name__ == cls.__name__ and issubclass(adapted, cls) and roles.is_adapted(adapted.__new__(adapted))
            assert getattr(roles, adapted.__qualname__) is adapted
    import transformers

    version = ".".join(transformers.__version__.split(".")[:2])
    assert used == {known for copy_ in roles._copies.values() for known, versions in copy_.sources.items() if version in versions.split(", ")}


def test_every_declared_block_is_tested() -> None:
    """Each declared class turns up in a tiny model, with places that exist and have known roles."""
    seen = set()
    for kind in KINDS:
        model = tiny(kind)
        for _, block, host in roles.find(model)[0]:
            seen.add((type(block).__module__, type(block).__name__))
            places: tuple[Place, ...] = host.places(block)
            assert len({place.id for place in places}) == len(places)
            for place in places:
                assert place.role in ROLES and place.role not in STAGES
                assert isinstance(block.get_submodule(place.owner), nn.Module)
            assert host.tower(block) in methods.TOWERS
    assert not set(roles._declared) - seen


def test_unknown_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny("llama")
    before = snapshot(model)

    def forward(self: Any, hidden_states: Any, **kwargs: Any) -> Any:  # a later release's
        return hidden_states

    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
    with pytest.raises(UnknownHostError, match=r"LlamaDecoderLayer.forward of transformers .* is unknown"):
        patch(model, "vl_adapter", **R4)
    assert_same(before, snapshot(model))


def test_registers_agree() -> None:
    assert set(roles.STACKS.values()) == set(methods.TOWERS)
    roles.load_declarations()
    assert set(roles._DECLARATIONS) == {declared.family for declared in roles._declared.values()}
    assert hosts.families() == (*roles._FAMILIES, *roles._DECLARATIONS)


def test_the_readmes_table_is_the_generated_one() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert hosts.table() in readme, "README.md: put the output of `python -c 'from fastadapt import hosts; print(hosts.table())'` under \"Hosts\""


def test_the_table_names_every_family_and_layer() -> None:
    table = hosts.table()
    assert all(f"| `{family}` |" in table for family in (*hosts.families(), "projector", "generic"))
    assert all(f"`{block}`" in table for _, block in roles._declared)
    assert len({line.count("|") for line in table.splitlines()}) == 1


@pytest.mark.parametrize("kind", ["llama", "opt", "mllama", "llava"])
def test_a_gate_over_the_sequence_is_refused_in_causal_models(kind: str) -> None:
    """Tokens would see those behind them, and a cache would not give what no cache gives."""
    model = tiny(kind)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"granularity: 'small' averages a gate over the sequence, so in .*, of a causal language model, tokens would see those behind them"):
        patch(model, "vlpet", granularity="small", rank=8)
    assert_same(snapshot(model), before)
    if kind == "llava":
        assert patch(model, "vlpet", granularity="small", rank=8, towers=["vision"]).sites


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("towers", [["vision"], ["projector"], ["text"]])
def test_mixed_batches_are_refused_where_images_are_one_sequence(kind: str, towers: list[str]) -> None:
    handle = patch(tiny(kind), "vl_adapter", towers=towers, tasks=["a", "b"], sharing="multiple", **R4)
    if towers == ["text"]:
        with handle.route(["a", "b"]):
            return
    with pytest.raises(ValueError, match=r"task_ids: .* sees the patches of all images as one sequence, and not whose they are; patch with towers=\['text'\]"):
        handle.route(["a", "b"]).__enter__()


def test_layers_that_accelerate_has_hooked() -> None:
    """Its hooks run the forward that a layer had, whatever its class becomes; taken off, they leave it there."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    base, batch = output(model, KINDS["llama"].batch()), KINDS["llama"].batch()
    handle = patch(model, "vl_adapter", **R4)
    randomize(handle)
    adapted = output(model, batch)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert torch.equal(output(model, batch), adapted)
    for call in (lambda: handle.disabled().__enter__(), handle.unpatch):
        with pytest.raises(RuntimeError, match=r"a patched LlamaDecoderLayer has got a forward of its own, as a hook of accelerate gives one; undo that first"):
            call()
    assert torch.equal(output(model, batch), adapted)
    accelerate.hooks.remove_hook_from_submodules(model)
    with handle.disabled():
        assert torch.equal(output(model, batch), base)
    assert torch.equal(output(model, batch), adapted)
    handle.unpatch(restore_base=True)
    assert torch.equal(output(model, batch), base)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3", "blip2_opt"])
def test_bfloat16_base(kind: str) -> None:
    """Adapters are fp32 over a bf16 base, behind projectors too."""
    model: Any = tiny(kind).bfloat16()
    handle = patch(model, "vl_adapter", **R4)
    randomize(handle, std=0.05)
    inputs = {name: t.bfloat16() if t.is_floating_point() else t for name, t in KINDS[kind].batch().items()}
    out = model(**inputs)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in handle.trainable_parameters())


def test_meta_device() -> None:
    with torch.device("meta"):
        model: Any = tiny("llava")
    handle = patch(model, "vl_adapter", **R4)
    assert len(handle.sites) == 9 and all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    handle.reset_parameters()
    stock = tiny("llava")
    model.load_state_dict(stock.state_dict(), strict=False)
    for (_, buffer), (_, value) in zip(model.named_buffers(), stock.named_buffers(), strict=True):
        buffer.copy_(value)  # positions, which no state dict holds
    assert output(model, image_batch(4)).isfinite().all()
