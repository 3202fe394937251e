"""Models load once a process, on first use, and not at all for a table that is only opened."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gpu_lance
from gpu_lance.embeddings import get_registry
from gpu_lance.embeddings.loading import MODELS, ModelCache
from gpu_lance.embeddings.sentence_transformers import SentenceTransformerEmbeddings
from gpu_lance.embeddings.text_models import PackedModel
from gpu_lance.errors import EmbeddingError
from gpu_lance.pydantic import LanceModel, Vector

create = SentenceTransformerEmbeddings.create


class Counted:
    """Counts real loads of weights and of tokenizers, and those that overlap."""

    def __init__(self) -> None:
        self.weights: list[str] = []
        self.tokenizers: list[str] = []
        self.running = 0
        self.most = 0
        self.lock = threading.Lock()

    def counting(self, seen: list[str], load: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: str, *args: Any, **kwargs: Any) -> Any:
            if "/plain-" in path:  # a checkpoint is being made
                return load(path, *args, **kwargs)
            with self.lock:
                seen.append(path)
                self.running += 1
                self.most = max(self.most, self.running)
            try:
                return load(path, *args, **kwargs)
            finally:
                with self.lock:
                    self.running -= 1

        return counted


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """A process in which nothing is loaded yet."""
    from transformers import AutoModel, AutoTokenizer

    counted = Counted()
    for cls, seen in ((AutoModel, counted.weights), (AutoTokenizer, counted.tokenizers)):
        monkeypatch.setattr(cls, "from_pretrained", counted.counting(seen, cls.from_pretrained))
    monkeypatch.setattr(MODELS, "_models", {})
    monkeypatch.setattr(MODELS, "loads", [])
    return counted


# -- tables


def schema_for(function: Any) -> type[LanceModel]:
    class Schema(LanceModel):
        text: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()  # type: ignore[valid-type]

    return Schema


def test_ten_adds_load_the_model_once_and_opening_loads_nothing(checkpoints, loads, tmp_path):
    name = str(checkpoints.sentence())
    db = gpu_lance.connect(tmp_path)
    function = get_registry().get("sentence-transformers").create(name=name, device="cpu")
    table = db.create_table("t", schema=schema_for(function))
    assert (loads.weights, loads.tokenizers) == ([], [])
    for i in range(10):
        table.add([{"text": f"the fox number {i}"}, {"text": "rows"}])
    assert len(loads.weights) == len(loads.tokenizers) == 1
    assert table.count_rows() == 20

    MODELS.clear()
    opened = gpu_lance.connect(tmp_path).open_table("t")
    assert opened.schema == table.schema
    assert opened.count_rows() == 20
    assert opened.search(np.ones(32, np.float32)).limit(3).to_arrow().num_rows == 3
    opened.to_arrow()
    assert opened.embedding_functions["vector"].function.ndims() == 32
    assert len(loads.weights) == len(loads.tokenizers) == 1
    assert len(MODELS) == 0

    assert opened.search("the fox number 3").limit(1).to_list()[0]["text"] == "the fox number 3"
    opened.add([{"text": "one more"}])
    assert len(loads.weights) == len(loads.tokenizers) == 2


def test_dimensions_fingerprints_and_tokens_load_no_weights(checkpoints, loads):
    function = create(name=str(checkpoints.sentence()), device="cpu")
    assert function.ndims() == 32
    assert function.fingerprint()["dims"] == "32"
    assert loads.tokenizers == []
    from gpu_lance.embeddings.calls import prepare

    prepare(function, ["the fox"], "source")
    assert loads.weights == []
    assert len(loads.tokenizers) == 1


# -- sharing


def test_functions_with_the_same_arguments_share_weights(checkpoints, loads):
    name = str(checkpoints.sentence())
    cpu = torch.device("cpu")
    functions = [
        create(name=name, device="cpu"),
        create(name=name, device="cpu", batch_size=3),
        create(name=name, device="cpu", dtype="float32", normalize=False, truncate_dim=8),
        create(name=name, device="cpu", prompts={"query": "q: "}),
        create(name=f"{name}/../{Path(name).name}", device="cpu"),  # the same folder
    ]
    for function in functions:
        function.compute_query_embeddings("fox")
    assert len({id(function._model(cpu)) for function in functions}) == 1
    assert len(loads.weights) == 1
    other = create(name=name, device="cpu", dtype="bfloat16")
    other.compute_query_embeddings("fox")
    assert len(loads.weights) == 2
    assert len(loads.tokenizers) == 1
    assert [load.device for load in MODELS.loads] == ["host", "cpu", "cpu"]
    assert all(load.name == Path(name).name and load.seconds > 0 for load in MODELS.loads)


def test_a_model_that_is_saved_anew_is_loaded_anew(checkpoints, loads, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoints.sentence(), folder)
    (before,) = create(name=str(folder), device="cpu").compute_query_embeddings("fox")
    shutil.rmtree(folder)
    shutil.copytree(checkpoints.sentence(seed=1), folder)
    (after,) = create(name=str(folder), device="cpu").compute_query_embeddings("fox")
    assert np.abs(before - after).max() > 0.01
    assert len(loads.weights) == 2


def test_weights_take_no_gradient_and_are_ordinary_tensors(checkpoints, loads):
    function = create(name=str(checkpoints.sentence(dense=8)), device="cpu")
    function.compute_query_embeddings("fox")
    model = function._model(torch.device("cpu"))
    assert isinstance(model, PackedModel)
    weights = [model._encoder.words, model._encoder.layers[0].qkv.weight]
    assert not any(weight.is_inference() or weight.requires_grad for weight in weights)


# -- threads


def test_threads_that_race_load_once(checkpoints, loads):
    name = str(checkpoints.sentence())
    barrier = threading.Barrier(8)

    def embed(i: int) -> np.ndarray:
        function = create(name=name, device="cpu")
        barrier.wait(30)
        return function.compute_source_embeddings(["the fox", f"row {i}"])[0]

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(embed, range(8)))
    assert len(loads.weights) == len(loads.tokenizers) == 1
    for vector in made:
        np.testing.assert_allclose(vector, made[0], atol=1e-6)


def test_models_that_load_at_once_leave_torch_as_it_was(checkpoints, loads):
    names = [str(checkpoints.sentence(seed=seed)) for seed in range(4)]
    alone = [create(name=n, device="cpu").compute_query_embeddings("fox")[0] for n in names]
    MODELS.clear()
    loads.most = 0
    barrier = threading.Barrier(8)

    def embed(i: int) -> np.ndarray:
        dtype = "float32" if i < 4 else "bfloat16"
        function = create(name=names[i % 4], device="cpu", dtype=dtype)
        function._tokenizer()
        loads.most = 0
        barrier.wait(30)
        return function.compute_query_embeddings("fox")[0]

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(embed, range(8)))
    assert loads.most == 1
    assert torch.get_default_dtype() == torch.float32
    for i in range(4):
        np.testing.assert_allclose(made[i], alone[i], atol=1e-6)
        np.testing.assert_allclose(made[i + 4], alone[i], atol=0.05)


# -- failures


def test_a_failed_load_is_forgotten(checkpoints, loads, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoints.sentence(), folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:100])
    function = create(name=str(folder), device="cpu")
    for _ in range(2):
        with pytest.raises(EmbeddingError, match="cannot be loaded"):
            function.compute_query_embeddings("fox")
    assert len(loads.weights) == 2
    (folder / "model.safetensors").write_bytes(weights)
    (vector,) = function.compute_query_embeddings("fox")
    wanted = create(name=str(checkpoints.sentence()), device="cpu").compute_query_embeddings("fox")
    np.testing.assert_allclose(vector, wanted[0], atol=1e-6)


class Owner:
    pass


def test_a_failure_does_not_poison_the_cache():
    cache = ModelCache()

    def fail() -> Any:
        raise OSError("the disk is gone")

    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            cache.get(Owner, {"name": "m"}, "cpu", fail)
    assert (len(cache), cache.loads) == (0, [])
    assert cache.get(Owner, {"name": "m"}, "cpu", lambda: 5) == 5


def test_threads_that_wait_for_a_load_that_fails_try_themselves():
    cache = ModelCache()
    entered, go = threading.Event(), threading.Event()
    tried: list[int] = []

    def load() -> str:
        tried.append(1)
        if len(tried) == 1:
            entered.set()
            go.wait(30)
            raise OSError("the first one fails")
        return "model"

    def get(_: int) -> str:
        try:
            return cache.get(Owner, {}, "cpu", load)
        except OSError:
            return "failed"

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(get, 0)
        assert entered.wait(30)
        others = [pool.submit(get, i) for i in range(3)]
        go.set()
        assert first.result(30) == "failed"
        assert [other.result(30) for other in others] == ["model"] * 3
    assert len(tried) == 2


@pytest.mark.parametrize(
    ("cls", "arguments", "device"),
    [
        (ModelCache, {"name": "m"}, "cpu"),
        (Owner, {"name": "n"}, "cpu"),
        (Owner, {"name": "m", "dtype": "fp16"}, "cpu"),
        (Owner, {"name": "m"}, "cuda:0"),
    ],
    ids=["class", "name", "argument", "device"],
)
def test_class_arguments_and_device_tell_models_apart(cls, arguments, device):
    cache = ModelCache()
    one = cache.get(Owner, {"name": "m"}, "cpu", object)
    assert cache.get(cls, arguments, device, object) is not one
    assert cache.get(Owner, {"name": "m"}, torch.device("cpu"), object) is one


def test_a_load_may_need_another_model():
    cache = ModelCache()
    inner: Callable[[], Any] = lambda: cache.get(Owner, {"part": "tokenizer"}, "host", object)  # noqa: E731
    outer = cache.get(Owner, {"part": "model"}, "cpu", lambda: [inner()])
    assert outer[0] is inner()


def test_a_real_model_is_found_again_by_its_folder(loads):
    function = create(device="cpu")
    folder = function._locate().folder
    assert Path(folder).is_dir()
    function.compute_query_embeddings("a")
    create(device="cpu").compute_query_embeddings("b")
    assert len(loads.weights) == 1
