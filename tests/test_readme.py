"""What README shows runs as it stands there."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BartForConditionalGeneration, PreTrainedTokenizerFast

from fastadapt.training import metrics, mixing
from tests.hosts import tiny

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("module", [mixing, metrics])
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


def test_the_first_example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a small random model and a tokenizer of a few words, in place of the downloaded ones: it trains, saves, and leaves the model as it was."""
    words = Tokenizer(models.WordLevel({"[UNK]": 3, "what": 4, "is": 5, "on": 6, "the": 7, "table": 8, "a": 9, "book": 10}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer, model = PreTrainedTokenizerFast(tokenizer_object=words), tiny.tiny("bart")
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    monkeypatch.setattr(BartForConditionalGeneration, "from_pretrained", lambda name: model)
    monkeypatch.chdir(tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    example = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert example
    scope: dict[str, Any] = {}
    exec(example[1], scope)
    trained = scope["optimizer"].param_groups[0]["params"]
    assert trained and all(scope["optimizer"].state[p]["step"] == 1 and p.grad is None for p in trained)
    assert sorted(p.name for p in (tmp_path / "my-adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_speeds_are_rows_of_the_data(page: str) -> None:
    """Each row of a table of speeds is as it was measured, at 4096 rows where it names none."""
    measured: dict[tuple[str, str, str], dict[str, set[str]]] = {}
    for row in json.loads((README.parent / "benchmarks/data/full_cpu.json").read_text()):
        if (row.get("width"), row.get("threads"), row.get("direction")) == (768, 2, "forward+backward"):
            of_call = measured.setdefault((row["op"].split()[0], str(row["rows"]), row["dtype"]), {"ours": set(), "eager": set(), "compile": set(), "limit": set()})
            of_call["ours"].add(f"{row['ours_ms']:.2f} ms")
            of_call[row["rival"]].add(f"{row['ratio_median']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]")
            of_call["limit"].add(f"{100 * row['limit_fraction']:.0f} %")
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in (README.parent / page).read_text().splitlines() if re.match(r"\| `\w+`.* ms \|", line)]
    assert len(rows) >= 18
    for name, *rest in rows:
        op = name.split("`")[1].replace("_norm", "_rms" if "RMS" in name else "_layer")
        height, dtype, ours, eager, compiled, limit = rest if len(rest) == 6 else ["4096", *rest]
        of_call = measured[op, height, dtype]
        assert (ours in of_call["ours"], eager in of_call["eager"], compiled in of_call["compile"], limit in of_call["limit"]) == (True,) * 4, (name, rest)
