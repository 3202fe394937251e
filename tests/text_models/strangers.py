"""What a stranger can put into a model's folder, and how to notice that it ran."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch

SOURCE = """
from pathlib import Path
Path({sentinel!r}).write_text("ran")
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class Config(BertConfig):
    model_type = "mine"
class Model(BertModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
from sentence_transformers.sentence_transformer.modules import Pooling
class Mine(Pooling):
    pass
"""


class Bomb:
    """What a pickle can do: write a file when it is read."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return (Path.touch, (self.sentinel,))


def plant(folder: Path, content: Any, wrapped: bool = True) -> None:
    """Put a pickle in the place of a folder's weights, as torch saves it or bare."""
    (folder / "model.safetensors").unlink()
    if wrapped:
        torch.save(content, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))


def edit(path: Path, **changes: Any) -> None:
    """Change values in a JSON file; ``...`` takes one out."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not ...}))
