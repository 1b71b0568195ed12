"""Failures of a device: which of them are told, which end the process, and what memory's refusals look like."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import struct
import unittest
from unittest import mock

import torch
from agent import Agent, Refused

from beringia_torch import devices, distributed, errors, server


class Memory(unittest.TestCase):
    def test_refusals_of_memory_are_known_by_their_text(self) -> None:
        for text in (
            "CUDA out of memory. Tried to allocate 2.00 GiB",
            "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory",
            "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
            "Memory allocation failure",
            "NPU: Failed to allocate memory",
        ):
            self.assertTrue(errors.is_out_of_memory(RuntimeError(text)), text)
            self.assertFalse(errors.is_out_of_memory(ValueError(text)), text)
        self.assertTrue(errors.is_out_of_memory(MemoryError()))
        self.assertTrue(errors.is_out_of_memory(torch.OutOfMemoryError("")))
        self.assertFalse(errors.is_out_of_memory(RuntimeError("device-side assert triggered")))


class Device(unittest.TestCase):
    """A handler in this process, whose `measure` fails."""

    def served(self, failure: Exception, *, computes: bool) -> tuple[int, bytes, str]:
        """Exit status, what the agent reads, and standard error, after one request and the agent's end."""
        handler = server.Handler(devices.open_device("cpu"), distributed.Group(), "f32", compiled=False)
        handler._handlers["measure"] = mock.Mock(side_effect=failure)
        request = json.dumps({"op": "measure"}).encode()
        said = io.StringIO()
        ours, theirs = socket.socketpair()
        with ours, theirs, contextlib.redirect_stderr(said):
            theirs.sendall(struct.pack("<I", len(request)) + request)
            theirs.shutdown(socket.SHUT_WR)
            still = mock.PropertyMock(return_value=computes)
            with mock.patch.object(devices.Device, "computes", still), mock.patch.object(server, "Watcher"):
                status = server.serve(ours, handler, distributed.Group())
            ours.shutdown(socket.SHUT_WR)
            return status, theirs.recv(1 << 16), said.getvalue()

    def test_a_device_that_computes_on_is_told_about(self) -> None:
        status, answer, said = self.served(RuntimeError("no such kernel"), computes=True)
        self.assertEqual(status, 0)
        self.assertEqual(json.loads(answer[4:])["error"]["reason"], "no such kernel")
        self.assertIn("RuntimeError: no such kernel", said)

    def test_a_device_that_refuses_everything_ends_the_process_without_an_answer(self) -> None:
        status, answer, said = self.served(RuntimeError("device-side assert triggered"), computes=False)
        self.assertEqual((status, answer), (1, b""))
        self.assertIn("RuntimeError: device-side assert triggered", said)

    def test_want_of_memory_is_told(self) -> None:
        status, answer, said = self.served(torch.OutOfMemoryError("out of memory"), computes=False)
        self.assertEqual((status, said), (0, ""))
        self.assertEqual(json.loads(answer[4:])["error"]["kind"], "out_of_memory")

    def test_a_rank_that_runs_out_of_memory_says_so(self) -> None:
        group = distributed.Group()
        group.rank, group.size = 3, 4
        handler = server.Handler(devices.open_device("cpu"), group, "f32", compiled=False)
        handler._handlers["measure"] = mock.Mock(side_effect=MemoryError("32 GiB wanted"))
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            _, fit = handler.handle(b'{"op":"measure"}')
        self.assertEqual((fit, said.getvalue()), (False, "rank 3: out of memory: 32 GiB wanted\n"))
        handler._handlers["measure"] = mock.Mock(side_effect=RuntimeError("connection closed by peer"))
        with contextlib.redirect_stderr(said):
            self.assertEqual(handler.handle(b'{"op":"measure"}'), (None, False))

    def test_a_request_that_begins_after_the_agents_end_is_not_carried_out(self) -> None:
        ours, theirs = socket.socketpair()
        looks: list[float] = []

        def begin(seconds: float) -> None:
            looks.append(seconds)
            watcher.busy = True

        leaving, waiting = mock.patch.object(server.os, "_exit"), mock.patch.object(server.time, "sleep", begin)
        with ours, leaving as leave, waiting:
            watcher = server.Watcher(ours, exit_status=1)
            theirs.close()
            watcher.join(60)
        self.assertFalse(watcher.is_alive())
        self.assertEqual(looks, [server.LOOK_SECONDS], "it was idle when the agent went")
        leave.assert_called_once_with(1)

    def test_whether_a_device_computes_is_tried(self) -> None:
        device = devices.open_device("cpu")
        self.assertTrue(device.computes)
        with mock.patch.object(torch, "ones", side_effect=RuntimeError("unspecified launch failure")):
            self.assertFalse(device.computes)

    def test_compilation_with_several_ranks_is_refused(self) -> None:
        with self.assertRaises(Refused) as caught, Agent("--compile", "on", "--threads", "1", ranks=2):
            pass
        self.assertEqual(caught.exception.kind, "device")
        self.assertEqual(caught.exception.reason, "compile is off with several ranks")


if __name__ == "__main__":
    unittest.main()
