"""Devices by name, dtypes, memory, and the ways across the border, on the CPU.

Where a GPU is needed to get further, torch is told that it has two; those marked `gpu` use a real
one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gpu_lance import device as devices
from gpu_lance.device import (
    HostCopy,
    as_tensor,
    default_dtype,
    free_memory,
    is_out_of_memory,
    parse_dtype,
    resolve_device,
    start_host_copy,
    to_host,
)
from gpu_lance.errors import BadInputError, DeviceError

torch = pytest.importorskip("torch")
CPU = torch.device("cpu")
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


def forget() -> None:
    devices._automatic_device.cache_clear()
    devices.why_no_cuda.cache_clear()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing known of the devices before and after a test, and nothing in the environment."""
    monkeypatch.delenv("GPU_LANCE_DEVICE", raising=False)
    forget()
    yield
    forget()


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that says it has two GPUs, of which the second is current."""
    ones = torch.ones
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch, "ones", lambda *shape, device=None: ones(*shape))


class TestResolve:
    @pytest.mark.parametrize("given", ["cpu", "CPU", " cpu ", "cpu:0", "cpu:3", CPU])
    def test_the_cpu_has_one_name(self, given: Any):
        assert resolve_device(given) == CPU

    @WITHOUT_CUDA
    @pytest.mark.parametrize("given", ["auto", "AUTO", None])
    def test_auto_is_the_cpu_without_a_gpu_and_says_why_once(self, given: Any, caplog: Any):
        if torch.backends.mps.is_available():
            pytest.skip("this machine has MPS")
        with caplog.at_level(logging.INFO, logger="gpu_lance.device"):
            assert resolve_device(given) == CPU
            assert resolve_device(given) == CPU
        (record,) = caplog.records
        assert record.getMessage() == f"device: cpu, since {devices.why_no_cuda()}"

    @WITHOUT_CUDA
    @pytest.mark.parametrize("given", ["cuda", "gpu", "GPU", "cuda:0", "gpu:1"])
    def test_cuda_never_falls_back(self, given: str):
        with pytest.raises(DeviceError) as caught:
            resolve_device(given)
        text = str(caught.value)
        assert text.startswith(f"device={given!r} was asked for, but ")
        assert "gpu-lance[cuda13]" in text
        assert "device='auto'" in text
        assert isinstance(caught.value, RuntimeError)

    @pytest.mark.parametrize("given", ["cuda", torch.device("cuda", 0)])
    def test_a_torch_without_cuda_is_the_reason(self, given: Any, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(DeviceError, match="this torch was built without CUDA"):
            resolve_device(given)

    def test_no_driver_is_the_reason(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(DeviceError, match="torch finds no CUDA device or no working driver"):
            resolve_device("cuda")

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (RuntimeError("no kernel image\nfor this device"), r"compute \(no kernel image\)"),
            (RuntimeError(), r"compute \(RuntimeError\)"),
            (AssertionError("never"), r"compute \(never\)"),
        ],
    )
    def test_a_gpu_that_does_not_compute_is_the_reason(
        self, error: Exception, reason: str, two_gpus: None, monkeypatch: pytest.MonkeyPatch
    ):
        def fails(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(torch, "ones", fails)
        with pytest.raises(DeviceError, match=reason):
            resolve_device("cuda")
        assert resolve_device("auto").type != "cuda"

    @pytest.mark.parametrize(
        "given",
        ["tpu", "cud", "", "0", 0, 1, True, "cuda:", "cuda:-1", "cuda:x", "cuda 0", "auto:0"],
    )
    def test_another_name_is_an_error_that_lists_them(self, given: Any):
        with pytest.raises(DeviceError) as caught:
            resolve_device(given)
        name = str(given).lower()
        assert str(caught.value).startswith(f"Unknown device {name!r}; use 'auto', 'cpu', 'cuda'")

    @pytest.mark.parametrize("given", ["meta", "xpu", torch.device("meta"), "hip:0"])
    def test_what_torch_knows_and_we_do_not_use(self, given: Any):
        with pytest.raises(DeviceError, match="Unknown device"):
            resolve_device(given)

    def test_no_mps(self):
        if torch.backends.mps.is_available():
            pytest.skip("this machine has MPS")
        with pytest.raises(DeviceError, match="torch sees no MPS device"):
            resolve_device("mps")

    @pytest.mark.parametrize(
        ("given", "index"),
        [("cuda", 1), ("gpu", 1), ("auto", 1), ("cuda:0", 0), ("gpu:1", 1), ("cuda:01", 1)],
    )
    def test_a_gpu_has_its_number(self, given: str, index: int, two_gpus: None):
        assert resolve_device(given) == torch.device("cuda", index)

    @pytest.mark.parametrize("number", [2, 255, 256, 999, 10**12])
    def test_more_gpus_than_there_are(self, number: int, two_gpus: None):
        with pytest.raises(DeviceError) as caught:
            resolve_device(f"cuda:{number}")
        assert str(caught.value) == (
            f"device='cuda:{number}' was asked for, but the number of GPUs is 2; "
            "the last is 'cuda:1'."
        )

    def test_the_environment_decides_what_auto_is(
        self, two_gpus: None, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("GPU_LANCE_DEVICE", " CPU ")
        assert resolve_device("auto") == CPU
        assert resolve_device() == CPU
        assert resolve_device("cuda") == torch.device("cuda", 1)
        monkeypatch.setenv("GPU_LANCE_DEVICE", "auto")
        assert resolve_device("auto").type == "cuda"
        monkeypatch.setenv("GPU_LANCE_DEVICE", " ")
        assert resolve_device("auto").type == "cuda"

    def test_an_error_names_the_environment_variable(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("GPU_LANCE_DEVICE", "tpu")
        with pytest.raises(DeviceError, match="Unknown device 'tpu' in GPU_LANCE_DEVICE; use"):
            resolve_device("auto")
        monkeypatch.setenv("GPU_LANCE_DEVICE", "cuda")
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(DeviceError, match=r"^GPU_LANCE_DEVICE='cuda' was asked for, but this"):
            resolve_device("auto")

    @pytest.mark.gpu
    def test_a_real_gpu(self):
        assert resolve_device("gpu") == torch.device("cuda", torch.cuda.current_device())
        assert resolve_device("auto").type == "cuda"


class TestDtype:
    def test_models_run_in_float32_on_the_cpu(self):
        assert default_dtype(CPU) == torch.float32
        assert parse_dtype(None, CPU) == parse_dtype("auto", CPU) == torch.float32

    @pytest.mark.parametrize(
        ("given", "wanted"),
        [
            ("float32", torch.float32),
            ("fp32", torch.float32),
            ("float16", torch.float16),
            ("fp16", torch.float16),
            ("bfloat16", torch.bfloat16),
            ("bf16", torch.bfloat16),
            ("torch.bfloat16", torch.bfloat16),
            (torch.float16, torch.float16),
        ],
    )
    def test_by_name(self, given: Any, wanted: Any):
        assert parse_dtype(given, CPU) is wanted

    @pytest.mark.parametrize("given", ["float64", "int8", "", torch.float64, 16])
    def test_another_one_is_an_error_that_lists_them(self, given: Any):
        with pytest.raises(
            BadInputError, match=r"^dtype is .*must be one of float32, fp32, .*auto"
        ):
            parse_dtype(given, CPU)


class TestMemory:
    @pytest.mark.parametrize(
        ("error", "expected"),
        [
            (MemoryError(), True),
            (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
            (
                RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
                True,
            ),
            (RuntimeError("std::bad_alloc"), True),
            (RuntimeError("cuDNN SDPA execution failed: CUDA_ERROR_OUT_OF_MEMORY"), True),
            (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
            (ValueError("out of memory"), False),
            (KeyboardInterrupt(), False),
        ],
    )
    def test_out_of_memory(self, error: BaseException, expected: bool):
        assert is_out_of_memory(error) is expected

    def test_torchs_own_error(self):
        assert is_out_of_memory(torch.OutOfMemoryError("no more"))

    def test_a_real_one(self):
        with pytest.raises(RuntimeError) as caught:
            torch.empty(1 << 60, dtype=torch.uint8)
        assert is_out_of_memory(caught.value)

    def test_free_memory_is_that_of_the_machine(self):
        if not hasattr(os, "sysconf"):
            pytest.skip("this system does not tell how much memory it has")
        assert 0 < free_memory(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    @pytest.mark.gpu
    def test_free_memory_counts_torchs_unused_cache(self):
        cuda = resolve_device("cuda")
        torch.cuda.empty_cache()
        before = free_memory(cuda)
        block = torch.empty(64 << 20, dtype=torch.uint8, device=cuda)
        assert free_memory(cuda) <= before - (60 << 20)
        del block  # stays in torch's cache
        assert free_memory(cuda) >= before - (4 << 20)


class Foreign:
    """An array of another library, which only offers DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class TestAsTensor:
    def test_an_array_is_shared_where_its_memory_allows_it(self):
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        tensor = as_tensor(array, CPU)
        array[1, 2] = 50
        assert tensor[1, 2] == 50

    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4", "i8", "u1", "?", ">f4", "<f8"])
    def test_values_and_dtype_are_kept(self, dtype: str):
        array = np.array([[0, 1], [2, 3]]).astype(dtype)
        found = as_tensor(array).numpy()
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype.newbyteorder("=")

    def test_what_torch_cannot_share_is_copied(self):
        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        array.flags.writeable = False
        np.testing.assert_array_equal(as_tensor(array).numpy(), array)
        np.testing.assert_array_equal(as_tensor(array[:, ::-2]).numpy(), array[:, ::-2])
        np.testing.assert_array_equal(as_tensor(array.T).numpy(), array.T)

    @pytest.mark.parametrize(
        "given", [[[1, 2], [3, 4]], ((1, 2), (3, 4)), np.array([[1, 2], [3, 4]], object)]
    )
    def test_lists_become_float32(self, given: Any):
        found = as_tensor(given)
        assert found.dtype == torch.float32
        assert found.tolist() == [[1.0, 2.0], [3.0, 4.0]]

    @pytest.mark.parametrize("given", [[], np.empty((0, 4), np.float32), torch.empty(0, 4)])
    def test_empty(self, given: Any):
        assert as_tensor(given).numel() == 0

    def test_dlpack_shares(self):
        array = np.zeros(3, np.float32)
        tensor = as_tensor(Foreign(array))
        array[0] = 7
        assert tensor.tolist() == [7.0, 0.0, 0.0]

    def test_a_tensor_comes_back_without_its_history(self):
        tensor = torch.ones(3, requires_grad=True) * 2
        found = as_tensor(tensor)
        assert not found.requires_grad
        assert found.data_ptr() == tensor.data_ptr()

    @pytest.mark.parametrize("given", [[[1, 2], [3]], ["a"], object()])
    def test_what_is_no_array_is_an_error(self, given: Any):
        with pytest.raises((TypeError, ValueError)):
            as_tensor(given)

    @pytest.mark.gpu
    def test_a_copy_to_the_host_has_arrived(self):
        cuda = resolve_device("cuda")
        product = torch.ones(4096, 4096, device=cuda)
        for _ in range(20):
            product = product @ torch.full_like(product, 1 / 4096)
        assert bool((as_tensor(product, CPU) == 1).all())


class TestToHost:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64])
    def test_values_and_dtype_are_kept(self, dtype: Any):
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        found = to_host(tensor)
        assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert str(found.dtype) == str(dtype).removeprefix("torch.")

    def test_bfloat16_arrives_as_float32(self):
        tensor = torch.tensor([1.0, 0.1], dtype=torch.bfloat16)
        found = to_host(tensor)
        assert found.dtype == np.float32
        assert found.tolist() == [1.0, 0.10009765625]

    def test_no_copy_on_the_cpu(self):
        tensor = torch.zeros(4)
        found = to_host(tensor)
        tensor[0] = 3
        assert found[0] == 3

    def test_views_and_gradients(self):
        tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3)
        found = to_host(tensor.T)
        assert found.flags.c_contiguous
        assert found.tolist() == [[0, 3], [1, 4], [2, 5]]

    @pytest.mark.parametrize("shape", [(), (0,), (0, 384), (1, 1)])
    def test_odd_shapes(self, shape: tuple[int, ...]):
        assert to_host(torch.zeros(shape)).shape == shape

    def test_a_copy_waits_for_its_event(self):
        class Event:
            waited = 0

            def synchronize(self) -> None:
                self.waited += 1

        event = Event()
        assert HostCopy(torch.ones(1), event).wait().tolist() == [1.0]
        assert event.waited == 1

    @pytest.mark.gpu
    @pytest.mark.parametrize("n", [1, 63, 100_000])
    def test_from_a_gpu(self, n: int):
        cuda = resolve_device("cuda")
        tensor = torch.arange(n * 4, device=cuda, dtype=torch.float32).reshape(n, 4)
        copy = start_host_copy(tensor * 2)
        assert copy.host.is_pinned()
        np.testing.assert_array_equal(
            copy.wait(), 2 * np.arange(n * 4, dtype=np.float32).reshape(n, 4)
        )
