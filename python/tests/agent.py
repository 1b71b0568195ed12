"""The agent's side of the protocol, as small as it can be: starts an engine, owns the arena, sends frames."""

from __future__ import annotations

import json
import mmap
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from typing import Any

import torch

PACKAGE_FOLDER = pathlib.Path(__file__).resolve().parent.parent
# Every test imports this file before the package, which need not be installed.
sys.path.insert(0, str(PACKAGE_FOLDER))
START_SECONDS_MAX = 120
ANSWER_SECONDS_MAX = 120

TINY_LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

ADAMW = {
    "optimizer": "adamw",
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
    "gradient_clip_norm": 0.5,
    "micro_batch_samples": 8,
}


class Refused(Exception):
    """An answer with an error; its fields are attributes."""

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(str(error))
        self.kind, self.what, self.reason = error["kind"], error["what"], error["reason"]
        self.value, self.install = error.get("value"), error.get("install")


def environment(**more: str) -> dict[str, str]:
    """What an engine's process is started with: two threads, and this package on its path."""
    path = os.pathsep.join(filter(None, [more.pop("PYTHONPATH", ""), str(PACKAGE_FOLDER)]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Agent:
    """One engine process (or one of several ranks) and the connection to it; use as a context."""

    def __init__(self, *options: str, ranks: int = 1, hello: bool = True, **variables: str) -> None:
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix="beringia-test-"))
        path = self._folder / "engine.sock"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        command = [sys.executable, "-u"]
        if ranks > 1:
            # Not --standalone: its rendezvous keeps a pickle where any user of this machine could put another.
            place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
            command += ["-m", "torch.distributed.run", "--nnodes", "1", *place, "--nproc-per-node", str(ranks)]
        command += ["-m", "beringia_torch", "--socket", str(path), *options]
        self._stderr = open(self._folder / "stderr", "w+", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        # torchrun leaves a folder for logs behind: here it goes with the rest.
        variables = environment(TMPDIR=str(self._folder), **variables)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._stderr, env=variables, start_new_session=True
        )
        self._listener.settimeout(START_SECONDS_MAX)
        self._arena: mmap.mmap | None = None
        self._arena_count = 0
        self.parameters: list[tuple[str, list[int]]] = []
        self.hello: dict[str, Any] = {}
        try:
            self.connection = self._listener.accept()[0]
            self.connection.settimeout(ANSWER_SECONDS_MAX)
            if hello:
                self.hello = self.receive()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "connection"):
            self.connection.close()
        self._listener.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            assert self.process.stdout is not None
            self.output = self.process.stdout.read()
            self.process.stdout.close()
            self._stderr.close()
            shutil.rmtree(self._folder)

    def stderr(self) -> str:
        """What the engine has said so far."""
        return (self._folder / "stderr").read_text(encoding="utf-8")

    def send_bytes(self, payload: bytes) -> None:
        """One frame."""
        self.connection.sendall(struct.pack("<I", len(payload)) + payload)

    def receive(self) -> dict[str, Any]:
        """One answer, or the end of the connection as EOFError."""
        (length,) = struct.unpack("<I", self._exactly(4))
        answer = json.loads(self._exactly(length))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def _exactly(self, length: int) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            part = self.connection.recv(length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return bytes(parts)

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """A request and its answer."""
        self.send_bytes(json.dumps({"op": op, **fields}).encode())
        return self.receive()

    def init(self, model: dict[str, Any] | None = None, *, seed: int = 1, **train: Any) -> dict[str, Any]:
        """Builds the model, and an arena that has room for four flat vectors and some tokens."""
        answer = self.call("init", model=model or TINY_LLAMA, train={**ADAMW, **train}, seed=seed)
        self.parameters = [(name, shape) for name, shape in answer["parameters"]]
        self.map_arena(4 * self.stride + (1 << 20))
        return answer

    def map_arena(self, size: int) -> None:
        """Makes a new file and has the engine map it."""
        self._arena_count += 1
        path = self._folder / f"arena{self._arena_count}"
        with open(path, "wb") as file:
            file.truncate(size)
        with open(path, "r+b") as file:
            self._arena = mmap.mmap(file.fileno(), size)
        self.call("arena", path=str(path), bytes=size)

    @property
    def elements(self) -> int:
        """Length of the flat vector."""
        return sum(torch.Size(shape).numel() for _, shape in self.parameters)

    @property
    def stride(self) -> int:
        """Bytes from one flat vector in the arena to the next."""
        return -(-self.elements * 4 // 64) * 64

    @property
    def tokens_offset(self) -> int:
        """After four flat vectors."""
        return 4 * self.stride

    def view(self, offset: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A place of the arena."""
        assert self._arena is not None
        if count == 0:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._arena, dtype=dtype, count=count, offset=offset)

    def put_tokens(self, tokens: torch.Tensor) -> dict[str, int]:
        """Places `[samples, length + 1]` ids; gives the fields that name them."""
        self.view(self.tokens_offset, tokens.numel(), torch.int32).copy_(tokens.flatten())
        return {"samples": tokens.shape[0], "sequence_length": tokens.shape[1] - 1, "tokens": self.tokens_offset}

    def step(self, tokens: torch.Tensor, learning_rate: float) -> dict[str, Any]:
        """One inner step."""
        return self.call("inner_step", learning_rate=learning_rate, batch_share=1.0, **self.put_tokens(tokens))

    def gradient(self, tokens: torch.Tensor) -> tuple[dict[str, Any], torch.Tensor]:
        """Answer and flat gradient."""
        answer = self.call("gradient", gradient=self.stride, **self.put_tokens(tokens))
        return answer, self.view(self.stride, self.elements).clone()

    def evaluate(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Summed loss."""
        return self.call("evaluate", **self.put_tokens(tokens))

    def logits(self, tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
        """`[length, v]`."""
        self.view(self.tokens_offset, tokens.numel(), torch.int32).copy_(tokens)
        offset = self.tokens_offset + (1 << 16)
        self.call("logits", length=tokens.numel(), tokens=self.tokens_offset, logits=offset)
        return self.view(offset, tokens.numel() * vocabulary).clone().view(-1, vocabulary)

    def read(self, *ranges: tuple[int, int]) -> torch.Tensor:
        """Parameters, all where no ranges are given."""
        chosen = list(ranges) or [(0, self.elements)]
        self.call("read", ranges=chosen, values=0)
        return self.view(0, sum(end - start for start, end in chosen)).clone()

    def write(self, values: torch.Tensor, *ranges: tuple[int, int]) -> None:
        """Replaces parameters, all where no ranges are given."""
        self.view(0, values.numel()).copy_(values)
        self.call("write", ranges=list(ranges) or [(0, self.elements)], values=0)

    def save(self) -> dict[str, Any]:
        """State as the agent keeps it."""
        answer = self.call("save", parameters=0, first=self.stride, second=2 * self.stride)
        names = ["parameters", "first", "second"] if answer["has_moments"] else ["parameters"]
        tensors = {name: self.view(index * self.stride, self.elements).clone() for index, name in enumerate(names)}
        return {"steps": answer["optimizer_steps"], **tensors}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        offsets: dict[str, int | None] = {}
        for index, name in enumerate(["parameters", "first", "second"]):
            offsets[name] = index * self.stride if name in state else None
            if name in state:
                self.view(index * self.stride, self.elements).copy_(state[name])
        self.call("restore", optimizer_steps=state["steps"], **offsets)


def random_tokens(samples: int, length: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Ids `[samples, length + 1]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (samples, length + 1), generator=generator)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))
