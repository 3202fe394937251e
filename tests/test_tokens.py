"""Tokenising as the model's own tokenizer does, a whole chunk a call, in any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gpu_lance.embeddings import tokens as tokens_module
from gpu_lance.embeddings.locate import locate
from gpu_lance.embeddings.model_folder import ModelFolder
from gpu_lance.embeddings.tokens import TextTokenizer, Tokens

TEXTS = [
    "one two three",
    "",
    "naïve café 你好 🦙",
    "long " * 400,
    "[CLS] spelled [SEP] out [PAD]",
    "\x00 \t tabs",
    "x" * 500,
]


@pytest.fixture(scope="module")
def folder() -> ModelFolder:
    return ModelFolder(locate("all-MiniLM-L6-v2", None, "sentence-transformers").folder)


@pytest.fixture(scope="module")
def tokenizer(folder: ModelFolder) -> TextTokenizer:
    made = TextTokenizer.load(folder, False)
    assert made is not None
    return made


def split(tokens: Tokens) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(tokens.ids, tokens.offsets[1:-1])]


def upstream(folder: ModelFolder, texts: list[str], limit: int = 256) -> Any:
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(str(folder.folder), local_files_only=True)
    return own(texts, truncation=True, max_length=limit)["input_ids"]


def test_tokens_equal_those_of_the_models_tokenizer(folder, tokenizer):
    made = tokenizer(TEXTS)
    assert split(made) == upstream(folder, TEXTS)
    assert made.ids.dtype == np.int32
    # the file's own limit and padding are 128; the model's limit is 256
    assert made.lengths.tolist()[:2] == [5, 2]
    assert made.lengths[3] == 256 == tokenizer.limit


def test_a_prompt_comes_before_each_text(folder, tokenizer):
    assert split(tokenizer(TEXTS, "query: ")) == upstream(folder, ["query: " + t for t in TEXTS])


def test_no_texts_give_no_tokens(tokenizer):
    made = tokenizer([])
    assert made.ids.shape == (0,)
    assert made.offsets.tolist() == [0]


def test_chunks_change_nothing(tokenizer, monkeypatch):
    wanted = split(tokenizer(TEXTS))
    for size in (1, 20, 600):
        monkeypatch.setattr(tokens_module, "_CHUNK", size)
        assert split(tokenizer(TEXTS)) == wanted
    monkeypatch.undo()
    for count in (1, 2, 5):
        monkeypatch.setattr(tokens_module, "_CHUNK_TEXTS", count)
        assert split(tokenizer(TEXTS)) == wanted


def test_an_error_in_a_later_chunk_reaches_the_caller(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens_module, "_CHUNK_TEXTS", 2)
    with pytest.raises(TypeError):
        tokenizer(["a", "b", "c", "d", None, "f", "g"])


def test_threads_share_a_tokenizer(tokenizer):
    texts = [[f"text {i} of thread {j} " * (i % 7) for i in range(50)] for j in range(8)]
    wanted = [split(tokenizer(part)) for part in texts]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert [split(made) for made in pool.map(tokenizer, texts)] == wanted


def test_loading_leaves_the_models_tokenizer_as_it_was(tokenizer):
    before = tokenizer.hf.backend_tokenizer.to_str()
    tokenizer(TEXTS)
    assert tokenizer.hf.backend_tokenizer.to_str() == before


def test_taken_rows_are_the_texts_in_that_order(tokenizer):
    made = tokenizer(TEXTS)
    rows = np.array([3, 0, 0, 6, 1])
    assert split(made.take(rows)) == [split(made)[row] for row in rows]
    assert made.take(np.array([], np.int64)).ids.shape == (0,)
