"""Several ranks that act as one engine: who speaks with the agent, how others hear of it, how parameters are sharded.

Rank 0 holds the connection; every request goes to the others as bytes. All ranks run on one machine and map the same
arena, so each reads its samples and its part of the parameters there and writes its part of a result: nothing is
gathered, and what is saved does not depend on the number of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch

#: How long a rank waits for the next request: rounds may pause for days. 2^31 milliseconds are 24 days.
IDLE_LIMIT = timedelta(days=20)


def rank_count() -> int:
    """Ranks that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Group:
    """One rank alone: every exchange is with itself."""

    rank = 0
    size = 1

    def share_request(self, request: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank."""
        assert request is not None, "rank 0 gives the request"
        return request

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, on every rank."""
        return tensor

    def all_well(self, well: bool) -> bool:
        """Whether all ranks say so. All are known to have come this far: also a barrier."""
        return well

    def shard(self, module: torch.nn.Module, device: torch.device) -> None:
        """Moves the module to the device, each rank its part."""
        module.to(device)

    def rows(self, row_count: int) -> tuple[int, int]:
        """First row of a parameter that is this rank's, and the row after its last."""
        return 0, row_count

    def samples(self, sample_count: int) -> tuple[int, int]:
        """First sample of a batch that is this rank's, and the sample after its last."""
        return 0, sample_count

    def close(self) -> None:
        """Leaves in order."""


class RankGroup(Group):
    """The ranks of one torchrun, sharded by FSDP2 over a mesh of one dimension."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed

        self._distributed = torch.distributed
        backend = torch.distributed.get_default_backend_for_device(device)
        torch.distributed.init_process_group(backend)
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        # Requests have a group of their own: on the CPU whatever the device is, and patient between rounds.
        self._control = torch.distributed.new_group(backend="gloo", timeout=IDLE_LIMIT)

    def share_request(self, request: bytes | None) -> bytes:
        length = torch.tensor([len(request) if request is not None else 0])
        self._distributed.broadcast(length, src=0, group=self._control)
        if int(length) == 0:
            return b""
        payload = bytearray(request if request is not None else int(length))
        self._distributed.broadcast(torch.frombuffer(payload, dtype=torch.uint8), src=0, group=self._control)
        return bytes(payload)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        on_host = tensor.device.type == "cpu"
        self._distributed.all_reduce(tensor, group=self._control if on_host else None)
        return tensor

    def all_well(self, well: bool) -> bool:
        failures = torch.tensor([0 if well else 1])
        self._distributed.all_reduce(failures, group=self._control)
        return int(failures) == 0

    def shard(self, module: torch.nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for layer in _layers(module):
            fully_shard(layer, mesh=mesh)
        # The root too is sharded again after a forward pass: one that is not followed by a backward leaves it clean.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)

    def rows(self, row_count: int) -> tuple[int, int]:
        # FSDP2 shards as torch.chunk does: equal parts, rounded up, the last ones shorter or empty.
        part = -(-row_count // self.size)
        start = min(self.rank * part, row_count)
        return start, min(start + part, row_count)

    def samples(self, sample_count: int) -> tuple[int, int]:
        return sample_count * self.rank // self.size, sample_count * (self.rank + 1) // self.size

    def close(self) -> None:
        self._distributed.destroy_process_group()


def open_group(device: torch.device) -> Group:
    """The group of this process's ranks."""
    return RankGroup(device) if rank_count() > 1 else Group()


def _layers(module: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """The blocks of a model: the members of its outermost lists of modules."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
