"""Errors as the agent knows them: a kind it can act on, and what a person reads."""

from __future__ import annotations

import math
from typing import Any

#: How allocators and libraries word it, in small letters: PyTorch's own, the CPU allocator, matrix and convolution
#: libraries with an error code that ends in ALLOC_FAILED, and makers' runtimes.
MEMORY_REFUSALS = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "memory allocation fail",
    "failed to allocate memory",
)


class EngineError(Exception):
    """A request that was refused or failed; parameters, optimiser and counters are as they were before it.

    `kind` is one of `shape` (does not fit the model), `not_finite`, `out_of_memory`, `device`, `missing` (software to
    install) and `internal` (a request that is not of the protocol, or a fault in this package).
    """

    def __init__(self, kind: str, what: str, reason: str, **details: str) -> None:
        super().__init__(f"{what}: {reason}")
        self.kind, self.what, self.reason, self.details = kind, what, reason, details

    def as_json(self) -> dict[str, Any]:
        """The object that follows "error" in an answer."""
        return {"kind": self.kind, "what": self.what, "reason": self.reason, **self.details}


def shape_error(what: str, reason: str) -> EngineError:
    """Something that does not fit the model."""
    return EngineError("shape", what, reason)


def request_error(reason: str) -> EngineError:
    """Something that the protocol does not allow: one of the two programs is wrong, not the user."""
    return EngineError("internal", "request", reason)


def check_finite(what: str, value: float) -> None:
    """A wrong number must stop the run, before it reaches a parameter."""
    if not math.isfinite(value):
        name = "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
        raise EngineError("not_finite", what, f"the {what} is {name}", value=name)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's or the host's refusal of memory.

    Only newer back ends raise `torch.OutOfMemoryError`; the CPU allocator, MPS and older plug-ins raise a RuntimeError
    whose text is all there is to go by.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(refusal in text for refusal in MEMORY_REFUSALS)


def first_line(error: BaseException) -> str:
    """What an exception says, in short: torch's texts go on over many lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
