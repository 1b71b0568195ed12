"""Whatever comes over the socket: an error of the right kind, nothing changed, never a crash."""

from __future__ import annotations

import json
import math
import os
import pathlib
import resource
import struct
import subprocess
import sys
import tempfile
import unittest
from typing import Any

import torch
from agent import ADAMW, TINY_LLAMA, Agent, Refused, environment, random_tokens

from beringia_torch.protocol import FRAME_BYTES_MAX

BATCH = {"samples": 2, "sequence_length": 8, "tokens": 0}


class Abuse(unittest.TestCase):
    """One engine takes it all, and computes on."""

    agent: Agent

    @classmethod
    def setUpClass(cls) -> None:
        cls.agent = cls.enterClassContext(Agent("--threads", "1"))
        cls.agent.init()

    def refused(self, kind: str, op: str, **fields: Any) -> Refused:
        """The error that a request is answered with, of that kind."""
        with self.assertRaises(Refused, msg=f"{op} {fields}") as caught:
            self.agent.call(op, **fields)
        self.assertEqual(caught.exception.kind, kind, f"{op} {fields}: {caught.exception}")
        return caught.exception

    def setUp(self) -> None:
        self.agent.step(random_tokens(2, 8, 61, 1), 1e-3)
        self.before = self.agent.save()
        self.addCleanup(self.check_nothing_changed)

    def check_nothing_changed(self) -> None:
        after = self.agent.save()
        self.assertEqual(after["steps"], self.before["steps"])
        for name in ("parameters", "first", "second"):
            self.assertTrue(torch.equal(after[name], self.before[name]), name)
        self.agent.step(random_tokens(2, 8, 61, 1), 1e-3)

    def test_frames_that_are_no_requests(self) -> None:
        deep = b"[" * 200_000
        digits = b'{"op":' + b"1" * 10_000 + b"}"
        frames = [b"", b"\xff\xfe", b"{", b"[]", b"null", b'"op"', b"{}", b'{"op":1}', b'{"op":"sing"}', deep, digits]
        for frame in frames:
            self.agent.send_bytes(frame)
            with self.subTest(frame[:20]), self.assertRaises(Refused) as caught:
                self.agent.receive()
            self.assertEqual((caught.exception.kind, caught.exception.what), ("internal", "request"))

    def test_fields_of_wrong_types(self) -> None:
        for samples in (None, "2", 2.0, True, [2], -1, 2**64, 10**400):
            self.refused("internal", "evaluate", **{**BATCH, "samples": samples})
        self.refused("internal", "evaluate", samples=2, tokens=0)
        for learning_rate in (None, "1", True, math.nan, math.inf, 10**400, [1]):
            self.refused("internal", "inner_step", learning_rate=learning_rate, batch_share=1.0, **BATCH)
        for batch_share in (None, "1", True, math.nan, math.inf, 0.0, -0.5, 1.5):
            self.refused("internal", "inner_step", learning_rate=1e-3, batch_share=batch_share, **BATCH)
        for ranges in (None, 3, [3], [[1]], [[1, 2, 3]], [[2, 1]], [[-1, 1]], [[0, 1.0]], [[0, True]], [{"0": 1}]):
            self.refused("internal", "read", ranges=ranges, values=0)
            self.refused("internal", "write", ranges=ranges, values=0)
        for samples in (0, -1, None, "8"):
            self.refused("internal", "micro_batch", samples=samples)
        self.refused("internal", "measure", seconds=1e9)

    def test_places_outside_the_arena(self) -> None:
        end = 4 * self.agent.stride + (1 << 20)
        for offset in (end, end + 64, 2**47, 4, 63):
            self.refused("internal", "evaluate", **{**BATCH, "tokens": offset})
            self.refused("internal", "gradient", gradient=offset, **BATCH)
            self.refused("internal", "logits", length=4, tokens=0, logits=offset)
            self.refused("internal", "read", ranges=[[0, 100]], values=offset)
            self.refused("internal", "write", ranges=[[0, 100]], values=offset)
            self.refused("internal", "save", parameters=0, first=0, second=offset)
            self.refused("internal", "restore", parameters=offset, optimizer_steps=0)
            self.refused("internal", "restore", parameters=0, first=0, second=offset, optimizer_steps=9)
        self.refused("internal", "evaluate", samples=2**40, sequence_length=2**40, tokens=0)

    def test_batches_that_do_not_fit_the_model(self) -> None:
        tokens = random_tokens(2, 8, 61, 1)
        for wrong in (-1, 61, 2**31 - 1, -(2**31)):
            changed = tokens.clone()
            changed[1, 3] = wrong
            fields = self.agent.put_tokens(changed)
            for op in ("inner_step", "gradient", "evaluate"):
                error = self.refused("shape", op, learning_rate=1e-3, batch_share=1.0, gradient=0, **fields)
                self.assertEqual(error.reason, f"token {wrong} at 12, the vocabulary has 61")
            self.refused("shape", "logits", length=18, tokens=fields["tokens"], logits=0)
        for samples, positions in ((2, 17), (0, 8), (2, 0), (0, 0)):
            fields = self.agent.put_tokens(random_tokens(samples, positions, 61, 1))
            self.refused("shape", "inner_step", learning_rate=1e-3, batch_share=1.0, **fields)
            self.refused("shape", "evaluate", **fields)
        for length in (0, 17):
            self.agent.put_tokens(random_tokens(1, 17, 61, 1))
            self.refused("shape", "logits", length=length, tokens=self.agent.tokens_offset, logits=0)
        self.refused("shape", "read", ranges=[[0, self.agent.elements + 1]], values=0)
        self.refused("shape", "write", ranges=[[0, 1], [self.agent.elements, self.agent.elements + 1]], values=0)
        self.refused("shape", "restore", parameters=0, first=0, second=None, optimizer_steps=0)

    def test_models_that_cannot_be(self) -> None:
        changes: list[dict[str, Any]] = [
            {"vocab_size": 0},
            {"vocab_size": 2**40},
            {"hidden_size": "32"},
            {"num_hidden_layers": 1.5},
            {"num_attention_heads": 5},
            {"num_key_value_heads": 3},
            {"hidden_act": "relu"},
            {"rms_norm_eps": -1},
            {"rope_theta": math.nan},
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            {"rope_scaling": {"rope_type": ["llama3"]}},
            {"rope_scaling": 4},
            {"tie_word_embeddings": 1},
            {"hidden_size": 2**20, "num_hidden_layers": 4096},
            {"model_type": "no-such-family"},
        ]
        for change in changes:
            self.refused("shape", "init", model={**TINY_LLAMA, **change}, train=ADAMW)
        self.refused("internal", "init", model=[], train=ADAMW)
        self.refused("internal", "init", model={}, train=ADAMW)
        for change in ({"optimizer": "lion"}, {"optimizer": "ADAMW"}):
            self.refused("shape", "init", model=TINY_LLAMA, train={**ADAMW, **change})
        for change in ({"beta1": 1.0}, {"epsilon": -1.0}, {"micro_batch_samples": 0}, {"weight_decay": "0"}):
            self.refused("internal", "init", model=TINY_LLAMA, train={**ADAMW, **change})

    def test_arenas_that_cannot_be_mapped(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            short, pipe, link = (os.path.join(folder, name) for name in ("short", "pipe", "link"))
            pathlib.Path(short).write_bytes(bytes(64))
            os.mkfifo(pipe)
            os.symlink(short, link)
            for path in (short, pipe, link, folder, os.path.join(folder, "absent"), "", "\0"):
                self.refused("internal", "arena", path=path, bytes=128)
            self.refused("internal", "arena", path=short, bytes=0)


class Endings(unittest.TestCase):
    """How an engine's process ends."""

    def test_requests_before_there_is_a_model(self) -> None:
        with Agent() as agent:
            steps = ("inner_step", "gradient", "evaluate", "logits", "micro_batch")
            for op in (*steps, "read", "write", "save", "restore"):
                with self.subTest(op), self.assertRaises(Refused) as caught:
                    agent.call(op, learning_rate=0.1, batch_share=1.0, length=1, ranges=[], optimizer_steps=0, **BATCH)
                self.assertEqual(caught.exception.kind, "internal")
            hello = agent.hello
            self.assertEqual((hello["protocol"], hello["rank_count"]), (1, 1))
            self.assertEqual((hello["torch"], hello["pid"]), (torch.__version__, agent.process.pid))
            agent.call("close")
            agent.process.wait(60)
            self.assertEqual((agent.process.returncode, agent.stderr()), (0, ""))
        self.assertEqual(agent.output, b"", "standard output is not for engines")

    def test_a_frame_that_is_too_long_ends_the_connection(self) -> None:
        with Agent() as agent:
            agent.connection.sendall(struct.pack("<I", FRAME_BYTES_MAX + 1))
            with self.assertRaises(Refused) as caught:
                agent.receive()
            self.assertEqual(caught.exception.kind, "internal")
            with self.assertRaises(EOFError):
                agent.receive()
            agent.process.wait(60)
            self.assertEqual(agent.process.returncode, 1)

    def check_quiet_end(self, agent: Agent) -> None:
        agent.connection.close()
        agent.process.wait(60)
        self.assertEqual((agent.process.returncode, agent.stderr()), (0, ""))

    def test_the_end_of_the_connection_is_the_end(self) -> None:
        with Agent() as idle:
            self.check_quiet_end(idle)
        with Agent() as reading:
            reading.connection.sendall(struct.pack("<I", 1000) + b'{"op":')
            self.check_quiet_end(reading)
        with Agent() as computing:
            computing.send_bytes(json.dumps({"op": "measure", "seconds": 60}).encode())
            self.check_quiet_end(computing)

    def test_nobody_listens(self) -> None:
        command = [sys.executable, "-m", "beringia_torch", "--socket", "/nowhere/engine.sock"]
        ended = subprocess.run(command, capture_output=True, env=environment(), timeout=60, check=False)
        self.assertEqual((ended.returncode, ended.stdout), (1, b""))
        self.assertIn(b"/nowhere/engine.sock", ended.stderr)


@unittest.skipUnless(sys.platform == "linux", "memory of another process is limited by prlimit")
class OutOfMemory(unittest.TestCase):
    """A batch that does not fit changes nothing, and a smaller micro-batch fits."""

    def test_a_smaller_micro_batch_fits(self) -> None:
        with Agent("--threads", "1") as agent:
            agent.init(micro_batch_samples=4096)
            agent.step(random_tokens(4, 16, 61, 1), 1e-3)
            state = agent.save()
            lines = pathlib.Path(f"/proc/{agent.process.pid}/status").read_text().splitlines()
            used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmSize:"))
            resource.prlimit(agent.process.pid, resource.RLIMIT_AS, (used + (200 << 20), used + (200 << 20)))
            tokens = random_tokens(4096, 16, 61, 2)
            with self.assertRaises(Refused) as caught:
                agent.step(tokens, 1e-3)
            self.assertEqual((caught.exception.kind, caught.exception.what), ("out_of_memory", "cpu"))
            after = agent.save()
            self.assertEqual(after["steps"], 1)
            for name in ("parameters", "first", "second"):
                self.assertTrue(torch.equal(after[name], state[name]), name)
            agent.call("micro_batch", samples=64)
            self.assertGreater(agent.step(tokens, 1e-3)["loss_nats"], 0)


if __name__ == "__main__":
    unittest.main()
