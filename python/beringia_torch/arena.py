"""The shared memory file in which numbers travel: tokens in, parameters both ways.

The agent makes the file, both sides map it. A place is a byte offset, 64-byte aligned; numbers are little-endian f32
and i32. A tensor made here is a view: it is valid until the request it belongs to is answered, for the agent writes
there next.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys

import torch

from .errors import request_error

ALIGNMENT_BYTES = 64
_ELEMENT_BYTES = 4


class Arena:
    """One mapping of the file; a grown file is mapped anew."""

    def __init__(self, path: str, size_bytes: int) -> None:
        if sys.byteorder != "little":
            raise request_error("numbers in the arena are little-endian, and so must this machine be")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise request_error(f"the arena cannot be opened: {error}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < size_bytes:
                # A mapping past the file's end would kill this process at the first touch.
                raise request_error(f"the arena is not a file of {size_bytes} bytes, it has {status.st_size}")
            self._mapping = mmap.mmap(descriptor, size_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise request_error(f"the arena cannot be mapped: {error}") from None
        finally:
            os.close(descriptor)
        self.size_bytes = size_bytes

    def floats(self, offset: int, count: int) -> torch.Tensor:
        """`count` f32 at `offset`, a view."""
        return self._view(offset, count, torch.float32)

    def integers(self, offset: int, count: int) -> torch.Tensor:
        """`count` i32 at `offset`, a view."""
        return self._view(offset, count, torch.int32)

    def _view(self, offset: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        if offset % ALIGNMENT_BYTES != 0:
            raise request_error(f"offset {offset} is not a multiple of {ALIGNMENT_BYTES}")
        if offset + count * _ELEMENT_BYTES > self.size_bytes:
            end = offset + count * _ELEMENT_BYTES
            raise request_error(f"bytes {offset} to {end} are outside the arena of {self.size_bytes}")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=offset)
