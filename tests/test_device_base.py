"""What the base of our providers does for each of them: order, batches, bad items, shapes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from gpu_lance.device import resolve_device
from gpu_lance.embeddings import DeviceEmbeddingFunction
from gpu_lance.embeddings.calls import embed, finish, is_staged, prepare
from gpu_lance.embeddings.device_base import Payload
from gpu_lance.errors import BadInputError, DeviceError, EmbeddingError, OutOfDeviceMemoryError
from gpu_lance.types import Modality, Side

CPU = torch.device("cpu")


class Lengths(DeviceEmbeddingFunction):
    """A text's length, how often it holds an a, and 2 for queries; costs its length."""

    cpu_budget: ClassVar[int | None] = 64
    fits: int = 1 << 30  # items
    normalize: bool = False
    _batches: list[list[int]] = []  # noqa: RUF012  (pydantic copies it)

    def ndims(self) -> int:
        return 3

    def prepare_items(self, items: list[Any], side: Side) -> Payload:
        data = torch.tensor([[len(t), t.count("a"), 0] for t in items], dtype=torch.float32)
        bad = {i: "it says stop" for i, text in enumerate(items) if text == "stop"}
        return Payload(data, np.array([len(text) for text in items]), bad)

    def forward(
        self, data: Any, rows: np.ndarray, side: Side, device: torch.device
    ) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        self._batches.append(rows.tolist())
        if len(rows) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        made = data[torch.from_numpy(rows)].to(device)
        made[:, 2] = 2 if side is Side.QUERY else 1
        return self.shaped(made)

    def shaped(self, made: torch.Tensor) -> torch.Tensor:
        return made


def wanted(texts: list[str], last: int = 1) -> np.ndarray:
    return np.array([[len(t), t.count("a"), last] for t in texts], np.float32)


TEXTS = ["a" * n for n in (3, 30, 1, 12, 64, 2, 100, 12, 9)]


def test_vectors_come_in_the_order_of_the_items():
    function = Lengths(device="cpu")
    made = function.compute_source_embeddings(TEXTS)
    np.testing.assert_array_equal(np.stack(made), wanted(TEXTS))
    assert all(vector.dtype == np.float32 for vector in made)
    np.testing.assert_array_equal(
        np.stack(function.compute_query_embeddings(TEXTS)), wanted(TEXTS, 2)
    )


def test_the_costliest_go_first_and_batches_keep_to_the_budget():
    function = Lengths(device="cpu")
    function.compute_source_embeddings(TEXTS)
    lengths = [[len(TEXTS[i]) for i in batch] for batch in function._batches]
    assert [n for batch in lengths for n in batch] == sorted(map(len, TEXTS), reverse=True)
    assert all(len(batch) == 1 or len(batch) * batch[0] <= 64 for batch in lengths)
    assert len(lengths) < len(TEXTS)


def test_batch_size_caps_the_items_of_a_forward():
    function = Lengths(device="cpu", batch_size=2)
    function.compute_source_embeddings(["a"] * 7)
    assert [len(batch) for batch in function._batches] == [2, 2, 2, 1]


def test_running_out_of_memory_halves_the_batch_and_goes_on(caplog):
    function = Lengths(device="cpu", fits=3)
    texts = ["ab", "b", "aa", "ccc"] * 5
    made = function.compute_source_embeddings(texts)
    np.testing.assert_array_equal(np.stack(made), wanted(texts))
    assert "ran out of memory on cpu" in caplog.text
    function._batches.clear()
    function.compute_source_embeddings(["a"] * 6)
    # what was too much is not tried again
    assert [len(batch) for batch in function._batches] == [2, 2, 2]


def test_an_item_that_does_not_fit_is_an_error():
    with pytest.raises(OutOfDeviceMemoryError, match="Lengths: one item of cost 2 does not fit"):
        Lengths(device="cpu", fits=0).compute_source_embeddings(["ab", "a"])


def test_null_and_bad_items_have_zeros_and_a_reason():
    items = ["aa", None, "stop", chr(0xDC00), 5, "b"]
    made = embed(Lengths(), items, "source", ndims=3, device=CPU)
    assert made.valid.tolist() == [True, False, False, False, False, True]
    np.testing.assert_array_equal(made.vectors[[0, 5]].numpy(), wanted(["aa", "b"]))
    assert not made.vectors[1:5].any()
    assert list(made.errors) == [2, 3, 4]
    assert made.errors[2] == "it says stop"
    assert made.errors[4] == "it is a int, not text"


@pytest.mark.parametrize("items", [[], [None], [5], ["stop"], [None, "stop", 5]], ids=str)
def test_nothing_to_embed_runs_no_model(items):
    function = Lengths()
    made = embed(function, items, "source", ndims=3, device=CPU)
    assert made.vectors.shape == (len(items), 3)
    assert not made.valid.any()
    assert function._batches == []


def test_a_bad_query_is_an_error_that_names_it():
    with pytest.raises(BadInputError, match=r"Query 1 cannot be embedded: it says stop\."):
        Lengths(device="cpu").compute_query_embeddings(["fine", "stop"])


def test_other_kinds_of_items_are_not_checked_as_text():
    class Pictures(Lengths):
        inputs = frozenset({Modality.IMAGE})

    made = embed(Pictures(), ["a", b"aa".decode()], "source", ndims=3, device=CPU)
    assert made.valid.all()
    assert Pictures().item_fault(b"\x89PNG") is None
    assert "bytes" in str(Lengths().item_fault(b"\x89PNG"))


def test_preparing_runs_nothing_and_finishing_may_be_elsewhere():
    function = Lengths()
    prepared = prepare(function, TEXTS, "query")
    assert function._batches == []
    made = finish(function, prepared, ndims=3, device=CPU)
    np.testing.assert_array_equal(made.vectors.numpy(), wanted(TEXTS, 2))


def test_the_caller_gets_an_ordinary_tensor():
    vectors = embed(Lengths(), ["a"], "source", ndims=3, device=CPU).vectors
    assert not vectors.is_inference()
    assert vectors.dtype == torch.float32
    vectors += 1
    assert vectors.device == resolve_device("cpu")


# -- what a forward returns


@pytest.mark.parametrize(
    ("shaped", "message"),
    [
        (lambda made: made[0], r"Wrong gave a tensor \(3,\) for 2 items"),
        (lambda made: made[:1], r"Wrong gave a tensor \(1, 3\) for 2 items"),
        (lambda made: made[:, None], r"Wrong gave a tensor \(2, 1, 3\) for 2 items"),
        (lambda made: made[:, :2], "gave vectors of 2 numbers, but the column wants 3"),
        (lambda made: made.numpy(), "gave a ndarray; it must be a torch tensor"),
        (lambda made: None, "gave a NoneType; it must be a torch tensor"),
        (lambda made: made.to(torch.complex64), "gave numbers of torch.complex64"),
    ],
)
def test_wrong_shapes_are_errors(shaped, message):
    class Wrong(Lengths):
        def shaped(self, made: torch.Tensor) -> Any:
            return shaped(made)

    with pytest.raises(EmbeddingError, match=message):
        Wrong(device="cpu").compute_source_embeddings(["a", "b"])


def test_costs_must_be_one_for_each_item():
    class Wrong(Lengths):
        def prepare_items(self, items: list[Any], side: Side) -> Payload:
            return Payload(items, np.ones(1))

    with pytest.raises(EmbeddingError, match=r"Wrong gave costs of shape \(1,\) for 2 items"):
        Wrong(device="cpu").compute_source_embeddings(["a", "b"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_any_real_dtype_becomes_float32(dtype):
    class Narrow(Lengths):
        def shaped(self, made: torch.Tensor) -> torch.Tensor:
            return made.to(dtype)

    made = embed(Narrow(), ["aab"], "source", ndims=3, device=CPU)
    assert made.vectors.dtype == torch.float32
    assert made.vectors.tolist() == [[3, 2, 1]]


def test_normalising_scales_to_length_one_and_leaves_zeros():
    class Zero(Lengths):
        normalize: bool = True

        def shaped(self, made: torch.Tensor) -> torch.Tensor:
            return made * (made[:, :1] > 1)

    made = embed(Zero(), ["aaaa", "a"], "source", ndims=3, device=CPU).vectors
    np.testing.assert_allclose(made[0], np.array([4, 4, 1]) / 33**0.5, atol=1e-6)
    assert made[1].tolist() == [0, 0, 0]


def test_not_a_number_is_left_for_the_table_to_judge():
    class Nan(Lengths):
        def shaped(self, made: torch.Tensor) -> torch.Tensor:
            return made / 0

    made = embed(Nan(), ["b", "ab"], "source", ndims=3, device=CPU)
    assert made.valid.all()
    assert torch.isnan(made.vectors[0, 1])


def test_an_error_of_the_model_comes_at_once_and_unchanged():
    error = RuntimeError("no such kernel")

    class Broken(Lengths):
        def shaped(self, made: torch.Tensor) -> torch.Tensor:
            raise error

    function = Broken(device="cpu")
    with pytest.raises(RuntimeError) as caught:
        function.compute_source_embeddings_with_retry(["a", "b"])
    assert caught.value is error
    assert len(function._batches) == 1


# -- a user's subclass


def test_an_overridden_list_method_is_asked():
    class Own(Lengths):
        def compute_source_embeddings(self, items: Any, *args: Any, **kwargs: Any) -> list[Any]:
            return [[7.0, 8.0, 9.0] for _ in self.sanitize_input(items)]

    function = Own()
    assert not is_staged(function, Side.SOURCE)
    made = embed(function, ["a", None], "source", ndims=3, device=CPU)
    assert made.vectors.tolist() == [[7, 8, 9], [0, 0, 0]]
    assert is_staged(Lengths(), Side.SOURCE)


def test_session_arguments_are_not_stored():
    function = Lengths.create(device="cpu", batch_size=3, dtype="float32", fits=5)
    assert function.safe_model_dump() == {"fits": 5}


def test_a_function_that_names_its_device_runs_there_wherever_the_vectors_go():
    places: list[torch.device] = []

    class Placed(Lengths):
        def shaped(self, made: torch.Tensor) -> torch.Tensor:
            places.append(made.device)
            return made

    meta = torch.device("meta")
    made = embed(Placed(device=" CPU "), TEXTS, Side.SOURCE, ndims=3, device=meta)
    assert made.vectors.device == meta
    assert set(places) == {CPU}
    assert made.valid.all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_function_that_names_a_gpu_never_falls_back():
    with pytest.raises(DeviceError, match="device='cuda' was asked for"):
        embed(Lengths(device="cuda"), TEXTS, Side.SOURCE, ndims=3, device=CPU)
