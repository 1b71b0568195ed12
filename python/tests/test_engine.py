"""Parts of the engine that no request shows by itself: both ways of an AdamW step, and what compilation may do."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import Callable
from unittest import mock

import torch
from agent import ADAMW, TINY_LLAMA, distance, environment, random_tokens

from beringia_torch import compiler, devices, distributed, engine, model, optimizer
from beringia_torch.errors import EngineError
from beringia_torch.protocol import Request


def new_engine(*, compiled: bool = False, strict: bool = False, precision: str = "f32") -> engine.Engine:
    """An engine in this process, on the CPU."""
    built = model.build(Request(TINY_LLAMA), seed=1)
    settings = optimizer.TrainSettings.parse(Request(ADAMW))
    device, group = devices.open_device("cpu"), distributed.Group()
    return engine.Engine(built, settings, device, group, compiled=compiled, strict=strict, precision=precision)


def parameters_of(tested: engine.Engine) -> torch.Tensor:
    """The flat vector."""
    values = torch.empty(tested.layout.elements)
    tested.read(tested.layout.whole, values)
    return values


def train(tested: engine.Engine, steps: int) -> list[float]:
    """Losses of some steps."""
    return [tested.inner_step(random_tokens(4, 12, 61, step), 1e-2).loss_nats for step in range(steps)]


class Optimizers(unittest.TestCase):
    def test_fused_and_plain_adamw_are_the_same(self) -> None:
        self.assertTrue(optimizer.fused_adamw_works(torch.device("cpu")))
        fused, plain = new_engine(), new_engine()
        train(fused, 10)
        with mock.patch.object(optimizer, "fused_adamw_works", return_value=False):
            train(plain, 10)
        self.assertLess(distance(parameters_of(plain), parameters_of(fused)), 1e-6)

    def test_a_fused_kernel_that_computes_wrongly_is_not_used(self) -> None:
        def wrong(rows: list[tuple[torch.Tensor, ...]], *_: object) -> None:
            rows[0][0].sub_(1.0)

        def absent(*_: object) -> None:
            raise NotImplementedError("no such kernel")

        for kernel in (wrong, absent):
            with mock.patch.object(optimizer, "fused_adamw", kernel):
                self.assertFalse(optimizer.fused_adamw_works(torch.device("cpu")))

    def test_clipping_is_that_of_torch(self) -> None:
        self.assertEqual(optimizer.clip_scale(0.0, 1e9), 1.0)
        self.assertEqual(optimizer.clip_scale(1.0, 0.5), 1.0)
        self.assertEqual(optimizer.clip_scale(1.0, 4.0), 1.0 / (4.0 + 1e-6))


class Compilation(unittest.TestCase):
    """`torch.compile` must give the same numbers, or get out of the way."""

    def test_a_compiled_model_gives_the_same_numbers(self) -> None:
        # The tracer and autograd's graph are what may go wrong; the default backend's C++ compiler takes minutes.
        traced = functools.partial(torch.compile, backend="aot_eager")
        with mock.patch.object(torch, "compile", traced):
            compiled = new_engine(compiled=True)
        eager = new_engine()
        for a, b in zip(train(compiled, 3), train(eager, 3), strict=True):
            self.assertAlmostEqual(a, b, delta=1e-5)
        self.assertLess(distance(parameters_of(compiled), parameters_of(eager)), 1e-5)
        tokens = random_tokens(2, 9, 61, 5)
        self.assertAlmostEqual(compiled.evaluate(tokens), eager.evaluate(tokens), delta=1e-4)
        self.assertTrue(compiled.compiled, "it was compiled to the end")

    def test_a_lone_sample_is_not_compiled_for(self) -> None:
        compiled_for: list[int] = []

        def compiler(forward: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
            def counted(tokens: torch.Tensor) -> torch.Tensor:
                compiled_for.append(len(tokens))
                return forward(tokens)

            return counted

        with mock.patch.object(torch, "compile", compiler):
            tested = new_engine(compiled=True)
        for samples in (1, 9, 3):
            tested.inner_step(random_tokens(samples, 12, 61, samples), 1e-2)
            tested.evaluate(random_tokens(samples, 12, 61, samples))
        self.assertEqual(compiled_for, [8, 8, 3, 3])
        tested.micro_batch_samples = 1
        tested.inner_step(random_tokens(2, 12, 61, 1), 1e-2)
        self.assertEqual(compiled_for[4:], [1, 1], "where all are lone, it is")

    def failing(self, error: Exception, *, strict: bool = False) -> tuple[engine.Engine, io.StringIO]:
        """An engine whose compiled model raises."""

        def compiler(_: object) -> object:
            return mock.Mock(side_effect=error)

        with mock.patch.object(torch, "compile", compiler):
            return new_engine(compiled=True, strict=strict), io.StringIO()

    def test_where_compilation_fails_the_step_is_done_without(self) -> None:
        tested, said = self.failing(RuntimeError("no compiler here\nand much more"))
        with contextlib.redirect_stderr(said):
            losses = train(tested, 2)
        self.assertEqual(said.getvalue(), "torch.compile failed, going on without it: no compiler here\n")
        self.assertFalse(tested.compiled)
        eager = new_engine()
        self.assertEqual(losses, train(eager, 2))
        self.assertTrue(torch.equal(parameters_of(tested), parameters_of(eager)))

    def test_where_it_must_be_used_its_failure_is_an_error(self) -> None:
        tested, said = self.failing(RuntimeError("no compiler here\nand much more"), strict=True)
        before = parameters_of(tested)
        with contextlib.redirect_stderr(said), self.assertRaises(EngineError) as caught:
            train(tested, 1)
        self.assertEqual((caught.exception.kind, said.getvalue()), ("device", ""))
        self.assertIn("torch.compile failed: no compiler here", caught.exception.reason)
        self.assertTrue(tested.compiled)
        self.assertTrue(torch.equal(parameters_of(tested), before))

    def test_a_device_that_is_gone_is_no_failure_of_the_compiler(self) -> None:
        tested, said = self.failing(RuntimeError("device-side assert"))
        gone = mock.patch.object(devices.Device, "computes", mock.PropertyMock(return_value=False))
        with gone, contextlib.redirect_stderr(said), self.assertRaisesRegex(RuntimeError, "device-side assert"):
            train(tested, 1)
        self.assertEqual((said.getvalue(), tested.compiled), ("", True))

    def test_what_the_compiler_writes_is_private_and_nothing_is_unpickled(self) -> None:
        with mock.patch.dict(os.environ):
            compiler.prepare()
            folder = pathlib.Path(compiler.make_folder())
            self.assertEqual(folder.stat().st_mode & 0o777, 0o700)
            asked = (
                "import torch._inductor.config as config\n"
                "from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir\n"
                "print(config.force_disable_caches, config.compile_threads, cache_dir(), default_cache_dir())"
            )
            said = subprocess.run(
                [sys.executable, "-c", asked], capture_output=True, text=True, env=environment(), timeout=60, check=True
            )
            self.assertEqual(tempfile.gettempdir(), str(folder))
        self.assertRegex(said.stdout, rf"^True 1 {re.escape(str(folder))} {re.escape(str(folder))}/\w+\n$")
        compiler.remove_folder()
        self.assertFalse(folder.exists())
        self.assertNotEqual(tempfile.gettempdir(), str(folder))

    def test_lack_of_memory_is_no_failure_of_the_compiler(self) -> None:
        tested, said = self.failing(torch.OutOfMemoryError("out of memory"))
        with contextlib.redirect_stderr(said), self.assertRaises(torch.OutOfMemoryError):
            train(tested, 1)
        self.assertEqual((said.getvalue(), tested.compiled), ("", True))


class Devices(unittest.TestCase):
    def test_precision_is_chosen_by_the_device(self) -> None:
        cpu = devices.open_device("cpu")
        self.assertEqual(devices.choose_precision("auto", cpu), "f32")
        self.assertEqual(devices.choose_precision("bf16", cpu), "bf16")
        with (
            mock.patch.object(devices.Device, "computes_bf16", mock.PropertyMock(return_value=False)),
            self.assertRaises(EngineError) as caught,
        ):
            devices.choose_precision("bf16", cpu)
        self.assertEqual(caught.exception.kind, "device")


if __name__ == "__main__":
    unittest.main()
