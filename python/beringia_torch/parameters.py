"""The flat vector that an engine exchanges: all parameters one after the other, in the order of `named_parameters`.

A rank holds of each parameter a run of rows, so an interval of the flat vector. Ranges of the vector are copied to and
from the arena by cutting them with those intervals: one rank holds them all, several write to one arena side by side.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch

from .distributed import Group
from .errors import shape_error

Range = tuple[int, int]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that may be sharded; shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class FlatLayout:
    """Where each parameter, and this rank's part of it, lies in the flat vector."""

    def __init__(self, named: Sequence[tuple[str, torch.Tensor]], group: Group) -> None:
        self.named_shapes = [(name, list(tensor.shape)) for name, tensor in named]
        self._starts: list[int] = []
        self._held: list[Range] = []
        self.elements = 0
        for name, tensor in named:
            row_elements = tensor.numel() // max(tensor.shape[0], 1) if tensor.ndim > 0 else 1
            first, last = group.rows(tensor.shape[0] if tensor.ndim > 0 else 1)
            held = (self.elements + first * row_elements, self.elements + last * row_elements)
            assert local(tensor).numel() == held[1] - held[0], f"{name} is not sharded by rows"
            self._starts.append(self.elements)
            self._held.append(held)
            self.elements += tensor.numel()

    @property
    def whole(self) -> list[Range]:
        """The range of all parameters."""
        return [(0, self.elements)]

    def check(self, ranges: Sequence[Range]) -> int:
        """Elements of `ranges` together."""
        for start, end in ranges:
            if end > self.elements:
                raise shape_error("fragment", f"elements {start} to {end}, the model has {self.elements}")
        return sum(end - start for start, end in ranges)

    def read(self, tensors: Sequence[torch.Tensor], ranges: Sequence[Range], values: torch.Tensor) -> None:
        """Copies this rank's part of `ranges` of `tensors` (one for each parameter) to `values`."""
        with torch.no_grad():
            for index, held, place in self._cut(ranges):
                values[place].copy_(local(tensors[index]).reshape(-1)[held])

    def write(self, tensors: Sequence[torch.Tensor], ranges: Sequence[Range], values: torch.Tensor) -> None:
        """Replaces this rank's part of `ranges` of `tensors` by `values`."""
        with torch.no_grad():
            for index, held, place in self._cut(ranges):
                local(tensors[index]).view(-1)[held].copy_(values[place])

    def _cut(self, ranges: Sequence[Range]) -> Iterator[tuple[int, slice, slice]]:
        """(parameter, slice of this rank's part of it, slice of the packed values)."""
        packed = 0
        for start, end in ranges:
            index = max(bisect_right(self._starts, start) - 1, 0)
            while index < len(self._starts) and self._starts[index] < end:
                held_start, held_end = self._held[index]
                low, high = max(start, held_start), min(end, held_end)
                if low < high:
                    place = slice(packed + low - start, packed + high - start)
                    yield index, slice(low - held_start, high - held_start), place
                index += 1
            packed += end - start
