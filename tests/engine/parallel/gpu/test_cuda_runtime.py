"""The binding: arguments, results and errors, with a library that answers as told; then the real one (marker `gpu`)."""

import ctypes
import mmap
from typing import Any

import pytest
import torch

from tests.engine.parallel.device_fleet import ON_GPU
from tetrion.engine.parallel.gpu.cuda_runtime import CudaError, CudaRuntime, device_index_of
from tetrion.engine.parallel.gpu.raw_memory import tensor_at

gpu = pytest.mark.gpu


class Function:
    """A C function: keeps what it was called with; writes `out` through its first argument."""

    def __init__(self, code: int, out: int | None) -> None:
        self.code, self.out, self.calls = code, out, list[tuple[Any, ...]]()

    def __call__(self, *arguments: Any) -> int:
        self.calls.append(arguments)
        if self.out is not None:
            arguments[0]._obj.value = self.out
        return self.code


class ErrorTexts:
    def __call__(self, code: int) -> bytes:
        return f"text of {code}".encode()


class Library:
    """All functions succeed, unless `codes` says otherwise."""

    def __init__(self, codes: dict[str, int] | None = None, out: int = 4096) -> None:
        self._codes, self._out, self.functions = codes or {}, out, dict[str, Function]()
        self.cudaGetErrorString = ErrorTexts()

    def __getattr__(self, name: str) -> Any:
        gives = name in ("cudaMalloc", "cudaIpcOpenMemHandle", "cudaDeviceCanAccessPeer", "cudaHostGetDevicePointer")
        self.__dict__[name] = self.functions[name] = Function(self._codes.get(name, 0), self._out if gives else None)
        return self.functions[name]


def test_errors_name_the_call_and_the_code() -> None:
    library = Library({"cudaIpcOpenMemHandle": 201})
    runtime = CudaRuntime(library)  # type: ignore[arg-type]
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle failed with error 201: text of 201") as caught:
        runtime.ipc_open(bytes(64))
    assert caught.value.code == 201
    assert len(library.functions["cudaGetLastError"].calls) == 1, "torch would report this error as its own"


def test_memory_is_zeroed_and_all_is_waited_for() -> None:
    library = Library()
    assert CudaRuntime(library).malloc(100) == 4096  # type: ignore[arg-type]
    ((address, value, size),) = library.functions["cudaMemset"].calls
    assert (address.value, value, size) == (4096, 0, 100) and library.functions["cudaDeviceSynchronize"].calls


def test_host_memory_gives_its_device_pointer() -> None:
    library = Library(out=8192)
    assert CudaRuntime(library).host_register(4096, 64) == 8192  # type: ignore[arg-type]
    assert library.functions["cudaHostRegister"].calls == [(4096, 64, 3)]


def test_a_handle_of_another_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="64 bytes, not 3"):
        CudaRuntime(Library()).ipc_open(b"abc")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float32])
def test_a_tensor_over_host_memory_is_no_copy(dtype: torch.dtype) -> None:
    buffer = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(buffer))
    view = tensor_at(address + 64, (3, 5), dtype, torch.device("cpu"))
    assert view.data_ptr() == address + 64 and view.dtype == dtype and view.shape == (3, 5)
    view.fill_(1)
    assert any(buffer[64 : 64 + view.nbytes]) and not any(buffer[64 + view.nbytes :])
    assert tensor_at(0, (0, 5), dtype, torch.device("cpu")).shape == (0, 5)


@gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_real_runtime() -> None:
    torch.cuda.set_device(0)
    runtime, device = CudaRuntime.of_torch(), torch.device("cuda", 0)
    address = runtime.malloc(1 << 20)
    whole = tensor_at(address, (1 << 20,), torch.uint8, device)
    assert not whole.any() and whole.data_ptr() == address
    part = tensor_at(address + 256, (4, 8), torch.bfloat16, device)
    part.fill_(1.5)
    torch.cuda.synchronize()
    assert (
        runtime.read(address + 256, 64)
        == torch.full((32,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    )
    assert len(runtime.ipc_handle(address)) == 64 and any(runtime.ipc_handle(address))
    assert device_index_of(str(torch.cuda.get_device_properties(0).uuid)) == 0 and device_index_of("GPU-none") is None
    with pytest.raises(CudaError, match="cudaIpcOpenMemHandle"):
        runtime.ipc_open(bytes(64))
    with pytest.raises(CudaError, match="cudaMalloc"):
        runtime.malloc(1 << 60)
    assert torch.ones(3, device=device).sum().item() == 3, "an error stays behind"
    runtime.free(address)


@gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_registered_host_memory_is_a_tensor_of_the_gpu() -> None:
    torch.cuda.set_device(0)
    runtime, buffer = CudaRuntime.of_torch(), mmap.mmap(-1, 8192)
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(buffer))
    pointer = runtime.host_register(address, 8192)
    words = tensor_at(pointer + 4096, (2,), torch.int32, torch.device("cuda", 0))
    words.fill_(7)
    torch.cuda.synchronize()
    assert buffer[4096:4104] == bytes([7, 0, 0, 0, 7, 0, 0, 0])
    buffer[4096] = 9
    assert words.tolist() == [9, 7]
    runtime.host_unregister(address)
