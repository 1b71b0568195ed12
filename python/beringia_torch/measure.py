"""Speeds of a device as measured, not as printed in a data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .devices import Device
from .errors import is_out_of_memory

#: Square matrices: large enough for the units to be busy (2·n³ operations), small enough for one product to be short:
#: 2 GFLOP on a processor, 1.1 TFLOP on an accelerator.
MATRIX_SIZE_CPU, MATRIX_SIZE_ACCELERATOR = 1024, 8192
#: Copied bytes: beyond any cache.
COPY_BYTES_CPU, COPY_BYTES_ACCELERATOR = 1 << 28, 1 << 30


def measure(device: Device, seconds: float) -> dict[str, float | None]:
    """Matrix rates in 10^12 operations a second, copy in 10^9 bytes read and written a second: a third of it each."""
    size = MATRIX_SIZE_ACCELERATOR if device.is_accelerator else MATRIX_SIZE_CPU
    part = seconds / 3
    return {
        "matrix_f32_tflops": _matrix(device, size, torch.float32, part),
        "matrix_bf16_tflops": _matrix(device, size, torch.bfloat16, part) if device.computes_bf16 else None,
        "copy_gigabytes_per_second": _copy(device, part),
    }


def _matrix(device: Device, size: int, dtype: torch.dtype, seconds: float) -> float | None:
    def prepare() -> Callable[[], object]:
        a = torch.randn(size, size, device=device.torch_device).to(dtype)
        b = torch.randn(size, size, device=device.torch_device).to(dtype)
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out)

    rate = _calls_per_second(device, prepare, seconds)
    return None if rate is None else 2.0 * size**3 * rate / 1e12


def _copy(device: Device, seconds: float) -> float | None:
    size_bytes = COPY_BYTES_ACCELERATOR if device.is_accelerator else COPY_BYTES_CPU

    def prepare() -> Callable[[], object]:
        source = torch.ones(size_bytes // 4, device=device.torch_device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    rate = _calls_per_second(device, prepare, seconds)
    return None if rate is None else 2.0 * size_bytes * rate / 1e9


def _calls_per_second(device: Device, prepare: Callable[[], Callable[[], object]], seconds: float) -> float | None:
    """The rate of the best of the calls' groups; None where the device cannot do it or has no room."""
    try:
        call = prepare()
        call()
        device.synchronize()
        # Groups of about a tenth of the time: a wait for the device costs more than a short call.
        start = time.perf_counter()
        call()
        device.synchronize()
        once = max(time.perf_counter() - start, 1e-6)
        group = max(1, int(seconds / 10 / once))
        best, end = 1 / once, start + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            for _ in range(group):
                call()
            device.synchronize()
            best = max(best, group / (time.perf_counter() - begin))
        return best
    except (RuntimeError, TypeError, NotImplementedError, MemoryError) as error:
        if is_out_of_memory(error):
            device.empty_cache()
        return None
