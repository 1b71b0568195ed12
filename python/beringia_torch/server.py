"""What each request of the protocol does: fields are checked, the engine is called, an answer is made.

Every rank handles every request alike, from the same bytes and the same arena, so all come to the same verdict; rank 0
answers when all are done.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from select import poll
from typing import Any

import torch

from . import PROTOCOL_VERSION, __version__, compiler, model, operations
from .arena import Arena
from .devices import Device
from .distributed import Group
from .engine import Engine, StepReport
from .errors import EngineError, check_finite, first_line, is_out_of_memory, request_error, shape_error
from .measure import measure
from .optimizer import TrainSettings
from .protocol import ConnectionEnded, FrameTooLong, Request, parse_request, read_frame, write_frame

#: Longest measurement an agent may ask for: it answers nothing else meanwhile.
MEASURE_SECONDS_MAX = 60.0
#: Between two looks at whether a request has begun that nobody waits for.
LOOK_SECONDS = 0.2
#: Elements of a shape in `operation`.
DIMENSIONS_MAX = 8

Answer = dict[str, Any]


class Handler:
    """The state behind a connection: device, arena, and an engine once there is one."""

    def __init__(self, device: Device, group: Group, precision: str, compiled: bool, *, strict: bool = False) -> None:
        self._device = device
        self._group = group
        self._precision = precision
        self._compiled = compiled
        self._strict = strict
        self._arena: Arena | None = None
        self._engine: Engine | None = None
        self.closed = False
        self._handlers: dict[str, Callable[[Request], Answer]] = {
            "arena": self._map_arena,
            "init": self._init,
            "inner_step": self._inner_step,
            "gradient": self._gradient,
            "evaluate": self._evaluate,
            "logits": self._logits,
            "read": self._read,
            "write": self._write,
            "save": self._save,
            "restore": self._restore,
            "micro_batch": self._micro_batch,
            "operation": self._operation,
            "measure": self._measure,
            "close": self._close,
        }

    def handle(self, frame: bytes) -> tuple[Answer | None, bool]:
        """The answer, and whether this process is fit to go on.

        No answer: the device refuses everything from now on, or other ranks wait in an exchange that this one left. The
        agent takes the end of the process for what it is, and starts another one from its snapshot.
        """
        answer: Answer | None
        try:
            request = parse_request(frame)
            operation = request.text("op")
            if operation not in self._handlers:
                raise request_error(f"op '{operation[:40]}' is not known")
            return {"ok": True, **self._handlers[operation](request)}, True
        except EngineError as error:
            answer, fit = {"error": error.as_json()}, True
        except Exception as error:  # noqa: BLE001 - whatever a device throws is told, not died of
            answer, fit = self._unexpected(error)
        # Here the exception is gone, and with it the frames that kept its tensors alive.
        if self._engine is not None and fit:
            self._engine.release()
        return answer, fit

    def _unexpected(self, error: Exception) -> tuple[Answer | None, bool]:
        reason, alone = first_line(error), self._group.size == 1
        if is_out_of_memory(error):
            if not alone:
                print(f"rank {self._group.rank}: out of memory: {reason}", file=sys.stderr, flush=True)
            return {"error": EngineError("out_of_memory", self._device.text, reason).as_json()}, alone
        traceback.print_exception(error, file=sys.stderr)
        if not alone or not self._device.computes:
            return None, False
        return {"error": EngineError("internal", type(error).__name__, reason).as_json()}, True

    @property
    def _mapped(self) -> Arena:
        if self._arena is None:
            raise request_error("there is no arena yet")
        return self._arena

    @property
    def _ready(self) -> Engine:
        if self._engine is None:
            raise request_error("there is no model yet: init comes first")
        return self._engine

    def _map_arena(self, request: Request) -> Answer:
        self._arena = Arena(request.text("path"), request.integer("bytes", 1))
        return {}

    def _init(self, request: Request) -> Answer:
        settings = TrainSettings.parse(request.object("train"))
        built = model.build(request.object("model"), request.optional_integer("seed", 0, 2**63 - 1))
        # One that was there goes before the new one comes to the device, which may not hold both.
        self._engine = None
        self._engine = Engine(
            built,
            settings,
            self._device,
            self._group,
            precision=self._precision,
            compiled=self._compiled,
            strict=self._strict,
        )
        return {
            "device": self._device.describe(self._precision),
            "compiled": self._engine.compiled,
            "transformers": built.transformers,
            "parameters": self._engine.layout.named_shapes,
        }

    def _batch(self, request: Request) -> torch.Tensor:
        """Tokens `[samples, sequence_length + 1]`, a copy."""
        samples, positions = request.integer("samples"), request.integer("sequence_length")
        tokens = self._mapped.integers(request.integer("tokens"), samples * (positions + 1))
        return tokens.to(torch.int64).view(samples, positions + 1)

    def _inner_step(self, request: Request) -> Answer:
        learning_rate = request.number("learning_rate")
        batch_share = request.number("batch_share", minimum=sys.float_info.min, maximum=1.0)
        return self._step_answer(self._ready.inner_step(self._batch(request), learning_rate, batch_share))

    def _gradient(self, request: Request) -> Answer:
        engine, tokens = self._ready, self._batch(request)
        values = self._mapped.floats(request.integer("gradient"), engine.layout.elements)
        return self._step_answer(engine.gradient(tokens, values))

    def _step_answer(self, report: StepReport) -> Answer:
        return {
            "loss_nats": report.loss_nats,
            "tokens": report.tokens,
            "gradient_norm": report.gradient_norm,
            "seconds": report.seconds,
            "joules": None,
            "compiled": self._ready.compiled,
        }

    def _evaluate(self, request: Request) -> Answer:
        tokens = self._batch(request)
        nats = self._ready.evaluate(tokens)
        check_finite("loss", nats)
        return {"nats": nats, "tokens": tokens.shape[0] * (tokens.shape[1] - 1)}

    def _logits(self, request: Request) -> Answer:
        engine, length = self._ready, request.integer("length")
        tokens = self._mapped.integers(request.integer("tokens"), length).to(torch.int64)
        values = self._mapped.floats(request.integer("logits"), length * engine.vocabulary)
        logits = engine.logits(tokens)
        if self._group.rank == 0:
            values.copy_(logits.flatten())
        return {}

    def _read(self, request: Request) -> Answer:
        engine, ranges = self._ready, request.ranges("ranges")
        engine.read(ranges, self._mapped.floats(request.integer("values"), engine.layout.check(ranges)))
        return {}

    def _write(self, request: Request) -> Answer:
        engine, ranges = self._ready, request.ranges("ranges")
        engine.write(ranges, self._mapped.floats(request.integer("values"), engine.layout.check(ranges)))
        return {}

    def _whole(self, request: Request, key: str) -> torch.Tensor:
        return self._mapped.floats(request.integer(key), self._ready.layout.elements)

    def _save(self, request: Request) -> Answer:
        parameters = self._whole(request, "parameters") if request.has("parameters") else None
        self._ready.save(parameters, self._whole(request, "first"), self._whole(request, "second"))
        optimizer = self._ready.optimizer
        return {"optimizer_steps": optimizer.steps, "has_moments": optimizer.has_moments}

    def _restore(self, request: Request) -> Answer:
        if request.has("first") != request.has("second"):
            raise shape_error("optimiser state", "one of first and second moments is missing")
        moments = (self._whole(request, "first"), self._whole(request, "second")) if request.has("first") else None
        steps = request.integer("optimizer_steps")
        self._ready.restore(self._whole(request, "parameters"), moments, steps)
        return {}

    def _micro_batch(self, request: Request) -> Answer:
        self._ready.micro_batch_samples = request.integer("samples", 1)
        return {}

    def _operation(self, request: Request) -> Answer:
        inputs = [self._operand(operand) for operand in request.objects("inputs")]
        result = operations.compute(request.text("name"), inputs, self._device.torch_device)
        output = self._mapped.floats(request.integer("output"), result.numel())
        if self._group.rank == 0:
            output.copy_(result)
        return {"elements": result.numel()}

    def _operand(self, request: Request) -> torch.Tensor:
        shape, elements = request.integers("shape"), 1
        if len(shape) > DIMENSIONS_MAX:
            raise request_error(f"a shape of {len(shape)} dimensions, at most {DIMENSIONS_MAX}")
        for size in shape:
            elements *= size
        return self._mapped.floats(request.integer("offset"), elements).view(shape).clone()

    def _measure(self, request: Request) -> Answer:
        return dict(measure(self._device, request.number("seconds", 0.0, MEASURE_SECONDS_MAX)))

    def _close(self, _request: Request) -> Answer:
        self.closed = True
        return {}


def hello() -> Answer:
    """What this side is, before anything is asked."""
    return {
        "protocol": PROTOCOL_VERSION,
        "package": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": str(torch.__version__),
        "pid": os.getpid(),
        "rank_count": int(os.environ.get("WORLD_SIZE", "1")),
    }


def serve(connection: socket.socket, handler: Handler, group: Group) -> int:
    """Rank 0: answers requests until the connection ends or closes; gives the exit status."""
    watcher = Watcher(connection, exit_status=0 if group.size == 1 else 1)
    try:
        while not handler.closed:
            frame = read_frame(connection)
            watcher.busy = True
            answer, fit = handler.handle(group.share_request(frame))
            if fit and not group.all_well(fit):
                answer, fit = None, False
            watcher.busy = False
            if answer is not None:
                write_frame(connection, answer)
            if not fit:
                return 1
    except ConnectionEnded:
        _dismiss(group)
    except FrameTooLong as error:
        _dismiss(group)
        write_frame(connection, {"error": request_error(str(error)).as_json()})
        return 1
    return 0


def _dismiss(group: Group) -> None:
    """Sends the other ranks home."""
    group.share_request(b'{"op":"close"}')
    group.all_well(True)


def follow(handler: Handler, group: Group) -> int:
    """Other ranks: do what rank 0 does, and say nothing."""
    while not handler.closed:
        try:
            _, fit = handler.handle(group.share_request(None))
            if not fit or not group.all_well(fit):
                return 1
        except RuntimeError as error:
            print(f"rank {group.rank}: another rank is gone: {first_line(error)}", file=sys.stderr)
            return 1
    return 0


class Watcher(threading.Thread):
    """Ends the process as soon as the agent is gone, also in the middle of a request, where nobody reads the socket."""

    def __init__(self, connection: socket.socket, exit_status: int) -> None:
        super().__init__(daemon=True)
        self.busy = False
        self._exit_status = exit_status
        self._poll = poll()
        # No event is asked for: a hang-up is reported always, and only a hang-up wakes this thread.
        self._poll.register(connection, 0)
        self.start()

    def run(self) -> None:
        """Waits for the other side's end, and goes on looking: a request that was read just then may begin later."""
        self._poll.poll()
        while not self.busy:
            time.sleep(LOOK_SECONDS)
        compiler.remove_folder()
        os._exit(self._exit_status)
