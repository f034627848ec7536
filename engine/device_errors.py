"""Tells a device that failed, memory that ran out, and a kernel that does not run apart."""

import torch

TRITON = "Triton Error [CUDA]:"
# How a RuntimeError says that memory ran out: the CPU's allocator, the compiler around PyTorch's
# allocator, the CUDA runtime, Triton, and the libraries, which allocate their own workspaces. NCCL
# gives the number of CUDA's error as well, or did not in older versions.
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    f"{TRITON} out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
    "Failed to CUDA calloc",
)
# How it says that the device failed.
DEVICE_FAULTS = ("CUDA error:", TRITON, "CUBLAS_STATUS_", "CUDNN_STATUS_")
# After which of Triton's errors this process can use the device no more ("leaves the process in an
# inconsistent state", says CUDA's cudaError_t). Others say that a kernel can't be loaded.
LASTING = (
    "illegal memory access",
    "misaligned address",
    "launch failure",
    "launch timed out",
    "illegal instruction",
    "invalid program counter",
    "address space",
    "hardware stack error",
    "device-side assert",
    "uncorrectable ECC",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a tensor did not fit, on a device or in main memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _says(error, OUT_OF_MEMORY)


def is_device_fault(error: BaseException) -> bool:
    """Whether ``error`` says that the device failed otherwise, such as by a fault in its memory."""
    is_one = isinstance(error, torch.AcceleratorError) or _says(error, DEVICE_FAULTS)
    return is_one and not is_out_of_memory(error)


def is_lasting_fault(error: BaseException) -> bool:
    """Whether after ``error`` this process can use the device no more."""
    return _says(error, LASTING)


def is_of_a_kernel(error: BaseException) -> bool:
    """Whether something else may run where a Triton kernel has raised ``error``."""
    if is_out_of_memory(error):
        return False
    return not is_device_fault(error) or (_says(error, (TRITON,)) and not is_lasting_fault(error))


def cure_for_kernels(root: BaseException) -> str:
    """What the user can do about an error for which `is_of_a_kernel` holds.

    Triton comes with PyTorch's builds for GPUs. It compiles a part of each kernel with the
    machine's C compiler and Python.h, and keeps it in a folder. Containers may lack any of these.

    Args:
        root: the first of the error's chain (`run.errors.root_cause`).
    """
    if isinstance(root, ImportError):
        return "pip install -r requirements.txt"
    if isinstance(root, OSError) and not isinstance(root, FileNotFoundError):
        return "set TRITON_CACHE_DIR to a folder that can be written"
    if _says(root, (TRITON,)):
        return "update the GPU's driver"
    return "install a C compiler and Python's headers (Debian, Ubuntu: apt install gcc python3-dev)"


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)
