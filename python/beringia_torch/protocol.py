"""Frames on the socket, and typed access to the fields of a request.

A frame is a little-endian u32 length and that many bytes of UTF-8 JSON, one object. Nothing that the other side says
is believed before it is checked: a length is compared with its bound before a byte is read, a field with its type and
range. This file does not import torch, so that a missing or old torch can be reported over the same socket.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from typing import Any

from .errors import EngineError, request_error

#: Longest frame. A request's largest part is a model's config or a fragment's ranges: some 10 bytes a number.
FRAME_BYTES_MAX = 16 * 1024 * 1024

#: Most elements a request may name: 2^48 f32 are 1 PiB, beyond any arena, and products of two sizes stay exact.
COUNT_MAX = 1 << 48

_LENGTH = struct.Struct("<I")


class ConnectionEnded(Exception):
    """The agent is gone: there is nobody left to answer to."""


class FrameTooLong(Exception):
    """The stream cannot be read on after this: the frame's bytes are not taken."""


def read_frame(connection: socket.socket) -> bytes:
    """The next frame's bytes."""
    (length,) = _LENGTH.unpack(_read_exactly(connection, _LENGTH.size))
    if length > FRAME_BYTES_MAX:
        raise FrameTooLong(f"a frame of {length} bytes, the longest is {FRAME_BYTES_MAX}")
    return _read_exactly(connection, length)


def write_frame(connection: socket.socket, message: dict[str, Any]) -> None:
    """Sends one object. Numbers that are not finite are our own mistake: JSON has none."""
    payload = json.dumps(message, allow_nan=False).encode()
    if len(payload) > FRAME_BYTES_MAX:
        reason = f"an answer of {len(payload)} bytes, the longest is {FRAME_BYTES_MAX}"
        error = EngineError("internal", "answer", reason)
        payload = json.dumps({"error": error.as_json()}).encode()
    try:
        connection.sendall(_LENGTH.pack(len(payload)) + payload)
    except OSError as error:
        raise ConnectionEnded from error


def _read_exactly(connection: socket.socket, length: int) -> bytes:
    received = bytearray(length)
    view, filled = memoryview(received), 0
    while filled < length:
        try:
            count = connection.recv_into(view[filled:])
        except OSError as error:
            raise ConnectionEnded from error
        if count == 0:
            raise ConnectionEnded
        filled += count
    return bytes(received)


def parse_request(frame: bytes) -> Request:
    """A frame's object. RecursionError: JSON may nest deeper than the parser's stack."""
    try:
        value = json.loads(frame.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise request_error(f"a frame is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise request_error(f"a frame holds {type(value).__name__}, not an object")
    return Request(value)


class Request:
    """An object of JSON whose fields are read with their type and range."""

    def __init__(self, fields: dict[str, Any], name: str = "request") -> None:
        self._fields = fields
        self._name = name

    def _take(self, key: str) -> Any:
        if key not in self._fields:
            raise request_error(f"{self._name} has no '{key}'")
        return self._fields[key]

    def _refuse(self, key: str, wanted: str) -> EngineError:
        text = repr(self._fields.get(key))
        return request_error(f"'{key}' of {self._name} is {text[:80]}, not {wanted}")

    def has(self, key: str) -> bool:
        """Whether the field is there and not null."""
        return self._fields.get(key) is not None

    def text(self, key: str) -> str:
        """A string."""
        value = self._take(key)
        if not isinstance(value, str):
            raise self._refuse(key, "a string")
        return value

    def integer(self, key: str, minimum: int = 0, maximum: int = COUNT_MAX) -> int:
        """A whole number within bounds; true and false are none."""
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
            raise self._refuse(key, f"a whole number in {minimum} to {maximum}")
        return value

    def optional_integer(self, key: str, minimum: int = 0, maximum: int = COUNT_MAX) -> int | None:
        """As `integer`, or None where the field is null or absent."""
        return self.integer(key, minimum, maximum) if self.has(key) else None

    def number(self, key: str, minimum: float = -math.inf, maximum: float = math.inf) -> float:
        """A finite number within bounds."""
        value = self._take(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._refuse(key, "a number")
        if not (abs(value) <= 1.8e308 and math.isfinite(value) and minimum <= value <= maximum):
            raise self._refuse(key, f"a number in {minimum} to {maximum}")
        return float(value)

    def object(self, key: str) -> Request:
        """An object within this one."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise self._refuse(key, "an object")
        return Request(value, key)

    def objects(self, key: str) -> list[Request]:
        """A list of objects."""
        value = self._take(key)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise self._refuse(key, "a list of objects")
        return [Request(entry, f"{key}[{index}]") for index, entry in enumerate(value)]

    def integers(self, key: str, maximum: int = COUNT_MAX) -> list[int]:
        """A list of whole numbers from 0."""
        value = self._take(key)
        if not isinstance(value, list) or not all(_is_count(entry, maximum) for entry in value):
            raise self._refuse(key, f"a list of whole numbers in 0 to {maximum}")
        return value

    def ranges(self, key: str) -> list[tuple[int, int]]:
        """A list of pairs [start, end], end excluded."""
        value = self._take(key)
        if not isinstance(value, list):
            raise self._refuse(key, "a list of [start, end]")
        for entry in value:
            whole = isinstance(entry, list) and len(entry) == 2 and all(_is_count(end, COUNT_MAX) for end in entry)
            if not whole or entry[0] > entry[1]:
                raise self._refuse(key, "a list of [start, end]")
        return [(start, end) for start, end in value]

    def as_dict(self) -> dict[str, Any]:
        """A copy of the fields as they came: the caller checks them."""
        return dict(self._fields)


def _is_count(value: Any, maximum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= maximum
