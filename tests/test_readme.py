"""What README shows runs as it stands there."""

from __future__ import annotations

import doctest
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
