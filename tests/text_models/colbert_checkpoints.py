"""Tiny real late-interaction checkpoints with random weights, in the formats that there are.

The oracle below them is ColBERT's formula in plain torch, one text at a time.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

HIDDEN, WIDTH, POSITIONS = 32, 16, 66
QUERY_LENGTH, DOCUMENT_LENGTH = 12, 20
LETTERS = string.ascii_lowercase + string.digits
VOCABULARY = [
    "[PAD]", "[unused0]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "unused", "the",
    "quick", "fox", "row", "##s", "vector", "near", *string.punctuation, *LETTERS,
    *("##" + letter for letter in LETTERS if letter != "s"),
]  # fmt: skip
ID = {token: index for index, token in enumerate(VOCABULARY)}
METADATA = {
    "query_maxlen": QUERY_LENGTH, "doc_maxlen": DOCUMENT_LENGTH, "dim": WIDTH,
    "mask_punctuation": True, "attend_to_mask_tokens": False, "query_token_id": "[unused0]",
    "doc_token_id": "[unused1]", "query_token": "[Q]", "doc_token": "[D]",
}  # fmt: skip

TEXTS = [
    "the quick fox, near rows!",
    "",
    "?!...",
    "vector (row) near",
    "the " * 50,
    "a",
    "quick-quick quick",
    "foxes 1234",
]


def stanford(folder: Path, *, weights: str = "safetensors", **metadata: Any) -> Path:
    """A checkpoint in the format of Stanford's code; `metadata` changes artifact.metadata."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    BertTokenizerFast(vocab=dict(ID)).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
    )
    model = BertModel(config)
    for name, weight in model.named_parameters():
        if "norm" in name.lower() or name.endswith("bias"):
            weight.data.add_(torch.randn_like(weight) * 0.2)
        else:
            weight.data.normal_(std=0.3)
    state = {f"bert.{key}": value.contiguous() for key, value in model.state_dict().items()}
    state["linear.weight"] = torch.randn(WIDTH, HIDDEN) * 0.3
    if weights == "safetensors":
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    told = {**config.to_dict(), "architectures": ["HF_ColBERT"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(told))
    given = {**METADATA, **metadata}
    given = {key: value for key, value in given.items() if value is not ...}
    (folder / "artifact.metadata").write_text(json.dumps(given))
    return folder


def library_of(folder: Path) -> Any:
    """sentence-transformers' own model of a folder."""
    from sentence_transformers import MultiVectorEncoder

    return MultiVectorEncoder(str(folder), device="cpu", local_files_only=True)


def saved_by_library(
    folder: Path, source: Path, change: Callable[[Any], None] | None = None
) -> Path:
    """The model of another folder in the format of sentence-transformers' MultiVectorEncoder."""
    library = library_of(source)
    if change is not None:
        change(library)
    library.save(str(folder), create_model_card=False)
    return folder


def of_transformer(folder: Path, plain: Path, **options: Any) -> Path:
    """A MultiVectorEncoder over another transformer, with a projection of its own."""
    from sentence_transformers import MultiVectorEncoder
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    torch.manual_seed(4)
    first = Transformer(str(plain), **options)
    chain = [
        first,
        Dense(HIDDEN, WIDTH, bias=True, module_input_name="token_embeddings"),
        MultiVectorMask(skiplist_words=[",", "!"]),
        Normalize(module_input_name="token_embeddings"),
    ]
    prompts = {"query": "query: ", "document": ""}
    library = MultiVectorEncoder(modules=chain, device="cpu", prompts=prompts)
    library.save(str(folder), create_model_card=False)
    return folder


def cosines(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The lowest cosine of two lists of vectors of texts, which must have the same shapes."""
    lowest = 1.0
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        one, other = torch.as_tensor(one).double(), torch.as_tensor(other).double()
        assert one.shape == other.shape
        lowest = min(lowest, float(torch.nn.functional.cosine_similarity(one, other).min()))
    return lowest


# -- the formula


def ids_of(text: str) -> list[int]:
    """WordPiece, written out for lower-case letters, digits, punctuation and spaces."""
    ids: list[int] = []
    for symbol in string.punctuation:
        text = text.replace(symbol, f" {symbol} ")
    for word in text.split():
        start = 0
        while start < len(word):
            pieces = (word[start:end] for end in range(len(word), start, -1))
            piece = next(p for p in pieces if ("##" if start else "") + p in ID)
            ids.append(ID[("##" if start else "") + piece])
            start += len(piece)
    return ids


class Formula:
    """ColBERT as its authors write it down, from the tensors of a checkpoint of theirs."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel

        state = load_file(folder / "model.safetensors")
        self.linear = state.pop("linear.weight")
        self.bert = BertModel(BertConfig.from_pretrained(folder)).eval()
        self.bert.load_state_dict({key.removeprefix("bert."): t for key, t in state.items()})
        self.told = json.loads((folder / "artifact.metadata").read_text())

    def vectors(self, ids: list[int], attended: int) -> torch.Tensor:
        mask = [1] * attended + [0] * (len(ids) - attended)
        with torch.inference_mode():
            states = self.bert(
                input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask])
            ).last_hidden_state[0]
        projected = states @ self.linear.T
        return projected / projected.norm(dim=1, keepdim=True)

    def query(self, text: str) -> torch.Tensor:
        length = self.told["query_maxlen"]
        ids = [ID["[CLS]"], ID["[unused0]"], *ids_of(text)[: length - 3], ID["[SEP]"]]
        seen = length if self.told["attend_to_mask_tokens"] else len(ids)
        return self.vectors(ids + [ID["[MASK]"]] * (length - len(ids)), seen)

    def document(self, text: str) -> torch.Tensor:
        words = ids_of(text)[: self.told["doc_maxlen"] - 3]
        ids = [ID["[CLS]"], ID["[unused1]"], *words, ID["[SEP]"]]
        skipped = {ID[symbol] for symbol in string.punctuation}
        if not self.told["mask_punctuation"]:
            skipped = set()
        kept = [place for place, token in enumerate(ids) if token not in skipped]
        return self.vectors(ids, len(ids))[kept]


def maxsim(query: Any, document: Any) -> float:
    """Sum over the query's vectors of the largest product with one of the document's."""
    products = torch.as_tensor(query).double() @ torch.as_tensor(document).double().T
    return float(products.max(dim=1).values.sum())
