"""The engine: an inner step is forward and backward over micro-batches, the gradient's norm, one optimiser step.

A micro-batch's loss is its summed cross-entropy over the tokens of the WHOLE batch, so that gradients of micro-batches,
and of ranks, add up to the gradient of the mean loss. Loss and norm are known to be finite before a parameter is
touched. bf16 is for matrix products (autocast): weights, norms, softmax, loss and optimiser are f32.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from .devices import Device
from .distributed import Group
from .errors import EngineError, check_finite, first_line, is_out_of_memory, shape_error
from .model import CausalModel
from .optimizer import Optimizer, TrainSettings, clip_scale
from .parameters import FlatLayout, Range, local

Result = TypeVar("Result")


@dataclass(frozen=True)
class StepReport:
    """What one forward and backward pass over a batch gave."""

    loss_nats: float
    tokens: int
    gradient_norm: float
    seconds: float


class Engine:
    """One model with its optimiser on one device, or on the devices of a group of ranks."""

    def __init__(
        self,
        model: CausalModel,
        settings: TrainSettings,
        device: Device,
        group: Group,
        *,
        precision: str = "f32",
        compiled: bool = False,
        strict: bool = False,
    ) -> None:
        self._model = model
        self._settings = settings
        self._device = device
        self._group = group
        self._precision = precision
        self.micro_batch_samples = settings.micro_batch_samples
        group.shard(model.module, device.torch_device)
        named = model.named_parameters()
        self._parameters = [parameter for _, parameter in named]
        self.layout = FlatLayout(named, group)
        self.optimizer = Optimizer(settings, self._parameters)
        self.compiled = compiled
        self._strict = strict
        self._forward: Callable[[torch.Tensor], torch.Tensor] = self._loss_sum
        if compiled:
            self._forward = torch.compile(self._loss_sum)

    @property
    def vocabulary(self) -> int:
        """Number of tokens the model knows."""
        return self._model.vocabulary

    def inner_step(self, tokens: torch.Tensor, learning_rate: float, batch_share: float = 1.0) -> StepReport:
        """One optimiser step on the mean loss of `tokens` `[samples, sequence_length + 1]`.

        `batch_share` is the part of the batch of all sites that `tokens` is: see `Optimizer.step`.
        """
        start = time.perf_counter()
        self._check_batch(tokens)
        self.optimizer.reserve(batch_share)
        loss, norm = self._or_eager(lambda: self._backpropagate(tokens))
        gradients = self._gradients()
        scale = clip_scale(self._settings.gradient_clip_norm, norm)
        if scale < 1.0:
            torch._foreach_mul_(gradients, scale)
        self.optimizer.step(gradients, learning_rate, batch_share)
        self._clear_gradients()
        self._device.synchronize()
        return StepReport(loss, _predicted(tokens), norm, time.perf_counter() - start)

    def gradient(self, tokens: torch.Tensor, values: torch.Tensor) -> StepReport:
        """Gradient of the mean loss, unclipped, to the flat `values`; parameters and optimiser stay as they are."""
        start = time.perf_counter()
        self._check_batch(tokens)
        loss, norm = self._or_eager(lambda: self._backpropagate(tokens))
        self.layout.read(self._gradients(), self.layout.whole, values)
        self._clear_gradients()
        return StepReport(loss, _predicted(tokens), norm, time.perf_counter() - start)

    def evaluate(self, tokens: torch.Tensor) -> float:
        """Summed loss, nats."""
        self._check_batch(tokens)

        def summed() -> float:
            total = torch.zeros((), dtype=torch.float64)
            with torch.no_grad():
                for micro_batch, weight in self._micro_batches(tokens):
                    with self._autocast():
                        nats = self._forward_of(micro_batch)(micro_batch)
                    total += weight * nats.cpu().double()
            return float(self._group.sum(total))

        return self._or_eager(summed)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[length, v]` of one sequence, f32, on the host."""
        positions_max = self._model.positions_max
        length = tokens.numel()
        if length == 0 or (positions_max is not None and length > positions_max):
            raise shape_error("sequence", f"{length} tokens, the model takes 1 to {positions_max}")
        self._check_tokens("sequence", tokens)
        with torch.no_grad(), self._autocast():
            return self._model.module(tokens.view(1, -1).to(self._device.torch_device))[0].float().cpu()

    def read(self, ranges: list[Range], values: torch.Tensor) -> None:
        """Copies parameters to `values`."""
        self.layout.read(self._parameters, ranges, values)

    def write(self, ranges: list[Range], values: torch.Tensor) -> None:
        """Replaces parameters by `values`."""
        self.layout.write(self._parameters, ranges, values)

    def save(self, parameters: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor) -> None:
        """Copies parameters, where they are asked for, and moments, where there are any."""
        if parameters is not None:
            self.read(self.layout.whole, parameters)
        if self.optimizer.has_moments:
            self.layout.read(self.optimizer.first_moments, self.layout.whole, first)
            self.layout.read(self.optimizer.second_moments, self.layout.whole, second)

    def restore(self, parameters: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor] | None, steps: int) -> None:
        """Continues from a saved state; without moments they begin at zero."""
        has_moments = moments is not None and self._settings.optimizer == "adamw"
        if has_moments:
            self.optimizer.reserve()
        self.write(self.layout.whole, parameters)
        if moments is not None and has_moments:
            self.layout.write(self.optimizer.first_moments, self.layout.whole, moments[0])
            self.layout.write(self.optimizer.second_moments, self.layout.whole, moments[1])
        self.optimizer.restore_counters(steps, has_moments)

    def release(self) -> None:
        """After a failure: forgets what the failed request left, so that a smaller one finds room."""
        self._clear_gradients()
        self._device.empty_cache()

    def _loss_sum(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        """Summed cross-entropy, nats, of `[b, t + 1]` ids."""
        logits_btv = self._model.module(tokens_bt[:, :-1])
        return F.cross_entropy(logits_btv.flatten(0, 1).float(), tokens_bt[:, 1:].flatten(), reduction="sum")

    def _backpropagate(self, tokens: torch.Tensor) -> tuple[float, float]:
        """Loss and gradient norm of the whole batch; gradients are left with the parameters."""
        self._clear_gradients()
        loss = torch.zeros((), device=self._device.torch_device)
        for micro_batch, weight in self._micro_batches(tokens):
            with self._autocast():
                share = self._forward_of(micro_batch)(micro_batch) * (weight / _predicted(tokens))
            # FSDP2 takes the mean over ranks of what is to be a sum.
            (share * self._group.size if self._group.size > 1 else share).backward()
            loss += share.detach()
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norms = torch.stack(torch._foreach_norm(self._gradients()))
        return self._finite(loss, torch.linalg.vector_norm(norms))

    def _finite(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, float]:
        """Both over all ranks, by one exchange and one wait for the device."""
        sums = torch.stack([loss, norm.square() if self._group.size > 1 else norm])
        loss_nats, norm_value = self._group.sum(sums).tolist()
        check_finite("loss", loss_nats)
        norm_value = norm_value**0.5 if self._group.size > 1 else norm_value
        check_finite("gradient norm", norm_value)
        return loss_nats, norm_value

    def _micro_batches(self, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, float]]:
        """This rank's samples in parts on the device, each with its weight.

        Every rank must come to as many forward passes as the others: one whose samples are used up repeats a sample
        with weight 0.
        """
        first, last = self._group.samples(tokens.shape[0])
        most = -(-tokens.shape[0] // self._group.size)
        for start in range(first, first + most, self.micro_batch_samples):
            part = tokens[start : min(start + self.micro_batch_samples, last)]
            weight = 1.0 if len(part) > 0 else 0.0
            yield (part if len(part) > 0 else tokens[:1]).to(self._device.torch_device), weight

    def _forward_of(self, micro_batch: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """What computes this micro-batch's loss.

        A lone sample among larger micro-batches is done eagerly: the compiler takes a size of 1 for a constant, so it
        would compile for it alone, and then once more, with sizes left open, for all the others.
        """
        is_lone = len(micro_batch) == 1 and self.micro_batch_samples > 1
        return self._loss_sum if is_lone else self._forward

    def _or_eager(self, attempt: Callable[[], Result]) -> Result:
        """What `torch.compile` cannot do on this device is done without it, from here on, unless it must be used."""
        failure: str | None = None
        if self.compiled:
            try:
                return attempt()
            except EngineError:
                raise
            except Exception as error:  # noqa: BLE001 - compilers fail in any way they like
                if is_out_of_memory(error) or not self._device.computes:
                    raise
                failure = first_line(error)
        if failure is not None and self._strict:
            reason = f"torch.compile failed: {failure}; --torch-compile auto goes on without it"
            raise EngineError("device", self._device.text, reason)
        if failure is not None:
            print(f"torch.compile failed, going on without it: {failure}", file=sys.stderr, flush=True)
            self.compiled, self._forward = False, self._loss_sum
        return attempt()

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self._precision == "bf16":
            return torch.autocast(self._device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def _gradients(self) -> list[torch.Tensor]:
        return [local(parameter.grad) for parameter in self._parameters if parameter.grad is not None]

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _check_batch(self, tokens: torch.Tensor) -> None:
        samples, positions = tokens.shape[0], tokens.shape[1] - 1
        if samples == 0 or positions == 0:
            raise shape_error("batch", f"{samples} samples of {positions} tokens hold nothing to predict")
        positions_max = self._model.positions_max
        if positions_max is not None and positions > positions_max:
            raise shape_error("batch", f"{positions} positions, the model has {positions_max}")
        self._check_tokens("batch", tokens)

    def _check_tokens(self, what: str, tokens: torch.Tensor) -> None:
        lowest, highest = (int(value) for value in tokens.aminmax())
        if lowest < 0 or highest >= self._model.vocabulary:
            wrong = lowest if lowest < 0 else highest
            index = int((tokens.flatten() == wrong).nonzero()[0])
            raise shape_error(what, f"token {wrong} at {index}, the vocabulary has {self._model.vocabulary}")


def _predicted(tokens: torch.Tensor) -> int:
    return tokens.shape[0] * (tokens.shape[1] - 1)
