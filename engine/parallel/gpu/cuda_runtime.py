"""The few functions of the CUDA runtime that torch does not offer: raw allocations, IPC handles, registered memory.

Owns the calls and their errors; knows no slabs. It calls the library that torch has loaded, hence in torch's context of
the current device. Addresses are plain numbers.
"""

import ctypes
from pathlib import Path

import torch

IPC_HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1
REGISTER_PORTABLE, REGISTER_MAPPED = 1, 2
MEMCPY_DEFAULT = 4


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call} failed with error {code}: {text}")
        self.code = code


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * IPC_HANDLE_BYTES),)


class CudaRuntime:
    def __init__(self, library: ctypes.CDLL) -> None:
        """`library`: libcudart, or for tests something that has its functions. Use `of_torch`."""
        self._library = library
        library.cudaGetErrorString.restype = ctypes.c_char_p
        pointer, size, flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
        library.cudaMalloc.argtypes = [pointer, size]
        library.cudaFree.argtypes = [pointer]
        library.cudaMemset.argtypes = [pointer, ctypes.c_int, size]
        library.cudaMemcpy.argtypes = [pointer, pointer, size, ctypes.c_int]
        library.cudaIpcGetMemHandle.argtypes = [pointer, pointer]
        library.cudaIpcOpenMemHandle.argtypes = [pointer, _IpcHandle, flags]
        library.cudaIpcCloseMemHandle.argtypes = [pointer]
        library.cudaDeviceCanAccessPeer.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
        library.cudaHostRegister.argtypes = [pointer, size, flags]
        library.cudaHostUnregister.argtypes = [pointer]
        library.cudaHostGetDevicePointer.argtypes = [pointer, pointer, flags]

    @classmethod
    def of_torch(cls) -> "CudaRuntime":
        """The runtime in this process. Raises RuntimeError if torch has none."""
        torch.cuda.init()
        return cls(ctypes.CDLL(_loaded_library()))

    def malloc(self, num_bytes: int) -> int:
        """Zeroed memory of the current device. Raises CudaError if there is too little."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), num_bytes)
        assert address.value is not None, "cudaMalloc gave no address"
        self._call("cudaMemset", address, 0, num_bytes)
        self._call("cudaDeviceSynchronize")
        return address.value

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def read(self, address: int, num_bytes: int) -> bytes:
        """A copy of device memory, of this device or a mapped peer. Waits for the device."""
        target = ctypes.create_string_buffer(num_bytes)
        self._call("cudaMemcpy", target, address, num_bytes, MEMCPY_DEFAULT)
        return target.raw

    def ipc_handle(self, address: int) -> bytes:
        """What another process opens to map the allocation that begins at `address`."""
        handle = _IpcHandle()
        self._call("cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(memoryview(handle))

    def ipc_open(self, handle: bytes) -> int:
        """Map an allocation of another process; peer access comes with it. Raises CudaError where there is none."""
        assert len(handle) == IPC_HANDLE_BYTES, f"an IPC handle has {IPC_HANDLE_BYTES} bytes, not {len(handle)}"
        address = ctypes.c_void_p()
        opaque = _IpcHandle.from_buffer_copy(handle)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(address), opaque, LAZY_PEER_ACCESS)
        assert address.value is not None, "cudaIpcOpenMemHandle gave no address"
        return address.value

    def ipc_close(self, address: int) -> None:
        self._call("cudaIpcCloseMemHandle", address)

    def can_access_peer(self, device_index: int, peer_index: int) -> bool:
        can = ctypes.c_int()
        self._call("cudaDeviceCanAccessPeer", ctypes.byref(can), device_index, peer_index)
        return bool(can.value)

    def host_register(self, address: int, num_bytes: int) -> int:
        """Pin host memory and make it readable and writable for GPUs. Returns the device pointer."""
        self._call("cudaHostRegister", address, num_bytes, REGISTER_PORTABLE | REGISTER_MAPPED)
        pointer = ctypes.c_void_p()
        self._call("cudaHostGetDevicePointer", ctypes.byref(pointer), address, 0)
        assert pointer.value is not None, "cudaHostGetDevicePointer gave no address"
        return pointer.value

    def host_unregister(self, address: int) -> None:
        self._call("cudaHostUnregister", address)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            self._library.cudaGetLastError()  # or torch's next check would report this one
            raise CudaError(name, code, self._library.cudaGetErrorString(code).decode())


def device_index_of(uuid: str) -> int | None:
    """This process' number of the GPU with `uuid`; None if it does not see it."""
    indices = range(torch.cuda.device_count())
    return next((i for i in indices if str(torch.cuda.get_device_properties(i).uuid) == uuid), None)


def _loaded_library() -> str:
    """Path of the libcudart in this process; its usual name if the process does not say."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            path = line.split(maxsplit=5)[-1]
            if Path(path).name.startswith("libcudart"):
                return path
    if torch.version.cuda is None:
        raise RuntimeError("this torch was built without CUDA")
    return f"libcudart.so.{torch.version.cuda.partition('.')[0]}"
