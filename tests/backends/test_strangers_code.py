"""A model's folder runs none of its code, and nobody is asked whether it should."""

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from dmdr.backends.loading import Source, load_text_encoder, load_tokenizer
from dmdr.backends.prompt_encoder import PromptEncoder
from dmdr.errors import ConfigError

TRAP = "from pathlib import Path\nPath({place!r}).touch()\n\nclass Trap: ...\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose classes are in a file of its own."""

    def ask(*arguments: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)
    (tmp_path / "trap.py").write_text(TRAP.format(place=str(tmp_path / "sprung")))
    names = {"AutoConfig": "trap.Trap", "AutoModel": "trap.Trap", "AutoTokenizer": ["trap.Trap", None]}
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(json.dumps({"model_type": "trap", "auto_map": names}))
    return tmp_path


def test_code_beside_a_text_encoder(folder: Path) -> None:
    for load in (
        lambda: load_tokenizer(AutoTokenizer, Source(str(folder)), ""),
        lambda: load_text_encoder(AutoModel, Source(str(folder)), "", torch.float32),
    ):
        with pytest.raises(ConfigError) as error:
            load()
        assert "\n" not in str(error.value) and not (folder / "sprung").exists()


@pytest.mark.parametrize("name", ["Nothing", "pipeline", "os.system", "__doc__"])
def test_a_class_that_transformers_does_not_have(name: str) -> None:
    encoder = SimpleNamespace(components={"text_encoder": ("transformers", name)}, source=Source("folder"))
    with pytest.raises(ConfigError, match=f"^folder/model_index.json: text_encoder is a {name}, which transformers"):
        PromptEncoder._class(encoder, "text_encoder")  # type: ignore[arg-type]
