"""The inner optimisers: AdamW as `torch.optim.AdamW` computes it, and plain SGD, after global-norm clipping.

A step must happen whole or not at all, so it allocates nothing: moments exist before the gradient is computed, and one
scratch tensor serves all parameters where the device has no fused AdamW. For step t from 1 (Loshchilov and Hutter 2019,
algorithm 2):

    p ← p·(1 − η·λ)                    λ on tensors of 2 or more dimensions only
    m ← m + (g − m)·(1 − β1)
    v ← v·β2 + g²·(1 − β2)
    p ← p − η/(1 − β1^t) · m / (√v / √(1 − β2^t) + ε)

and, where the steps see a share s of the batch of all sites, with m̂ = m / (1 − β1^t) and v̂ = v / (1 − β2^t),

    p ← p − η · m̂ / (√(m̂² + s · max(v̂ − m̂², 0)) + ε)

The fused kernel is called by itself: `torch.optim` imports the compiler first, which takes seconds at every start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import is_out_of_memory, shape_error
from .parameters import local
from .protocol import Request

#: Keeps the quotient of `clip_grad_norm_` finite.
CLIP_NORM_OFFSET = 1e-6

#: Numbers that a step with a `batch_share` works on at once: three scratch tensors of 64 MiB.
PART_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TrainSettings:
    """The part of a run's settings that an optimiser step depends on."""

    optimizer: str
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    #: Gradients are scaled down to this norm; 0 turns clipping off.
    gradient_clip_norm: float
    micro_batch_samples: int

    @staticmethod
    def parse(request: Request) -> TrainSettings:
        """Reads the `train` of an `init`."""
        optimizer = request.text("optimizer")
        if optimizer not in ("adamw", "sgd"):
            raise shape_error("optimizer", f"'{optimizer[:40]}' is not adamw or sgd")
        below_one = math.nextafter(1.0, 0.0)
        return TrainSettings(
            optimizer=optimizer,
            beta1=request.number("beta1", 0.0, below_one),
            beta2=request.number("beta2", 0.0, below_one),
            epsilon=request.number("epsilon", 0.0),
            weight_decay=request.number("weight_decay", 0.0),
            gradient_clip_norm=request.number("gradient_clip_norm", 0.0),
            micro_batch_samples=request.integer("micro_batch_samples", 1),
        )


def clip_scale(clip_norm: float, gradient_norm: float) -> float:
    """Factor of every gradient, as `torch.nn.utils.clip_grad_norm_`."""
    return 1.0 if clip_norm == 0.0 else min(clip_norm / (gradient_norm + CLIP_NORM_OFFSET), 1.0)


class Optimizer:
    """Steps on this rank's parts of the parameters; every operation is element by element."""

    def __init__(self, settings: TrainSettings, parameters: Sequence[torch.Tensor]) -> None:
        self._settings = settings
        # Sharded or not, these are plain tensors that share the parameters' memory.
        self._parameters = [local(parameter.detach()) for parameter in parameters]
        self._decayed = [parameter.ndim > 1 for parameter in parameters]
        #: Steps taken, where the fused kernel reads it; None without that kernel.
        self._fused_step_count: torch.Tensor | None = None
        self._scratch: torch.Tensor | None = None
        #: Three rows, for steps with a `batch_share` below 1.
        self._part_scratch: torch.Tensor | None = None
        self.first_moments: list[torch.Tensor] = []
        self.second_moments: list[torch.Tensor] = []
        #: Whether the moments say anything yet: zeros of a run that has not begun are not saved.
        self.has_moments = False
        self.steps = 0

    def reserve(self, batch_share: float = 1.0) -> None:
        """Allocates what a step needs, before anything changes."""
        if self._settings.optimizer != "adamw":
            return
        if batch_share < 1.0 and self._part_scratch is None:
            elements = min(max(parameter.numel() for parameter in self._parameters), PART_ELEMENTS)
            self._part_scratch = torch.empty((3, elements), device=self._parameters[0].device)
        if self.first_moments:
            return
        first = [torch.zeros_like(parameter) for parameter in self._parameters]
        second = [torch.zeros_like(parameter) for parameter in self._parameters]
        device = self._parameters[0].device
        if fused_adamw_works(device):
            self._fused_step_count = torch.zeros((), device=device)
        else:
            self._scratch = torch.empty(max(parameter.numel() for parameter in self._parameters), device=device)
        self.first_moments, self.second_moments = first, second

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], learning_rate: float, batch_share: float = 1.0) -> None:
        """One step on gradients that are already clipped.

        With a `batch_share` s below 1, AdamW divides by the root of what the second moment of the joint batch's
        gradient would be, m̂² + s max(v̂ - m̂², 0): noise goes with 1 / samples.
        """
        if self._settings.optimizer == "sgd":
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.add_(gradient, alpha=-learning_rate)
        elif batch_share < 1.0:
            self._part_step(gradients, learning_rate, batch_share)
        elif self._fused_step_count is not None:
            self._fused_step(gradients, learning_rate)
        else:
            self._plain_step(gradients, learning_rate)
        self.steps += 1
        self.has_moments = self._settings.optimizer == "adamw"

    def restore_counters(self, steps: int, has_moments: bool) -> None:
        """After the moments were replaced, or are to be forgotten."""
        self.steps = steps
        self.has_moments = has_moments
        if not has_moments:
            for moment in [*self.first_moments, *self.second_moments]:
                moment.zero_()

    def _fused_step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        assert self._fused_step_count is not None
        settings = self._settings
        self._fused_step_count.fill_(self.steps + 1)
        rows = list(zip(self._parameters, gradients, self.first_moments, self.second_moments, strict=True))
        for decayed in (True, False):
            # A rank's part of a short tensor may be empty, which kernels need not expect.
            chosen = [row for row, flag in zip(rows, self._decayed, strict=True) if flag == decayed and row[0].numel()]
            if chosen:
                weight_decay = settings.weight_decay if decayed else 0.0
                fused_adamw(chosen, self._fused_step_count, settings, learning_rate, weight_decay)

    def _part_step(self, gradients: Sequence[torch.Tensor], learning_rate: float, batch_share: float) -> None:
        settings, step = self._settings, self.steps + 1
        assert self._part_scratch is not None
        first_scale, second_scale = (1 / (1 - beta**step) for beta in (settings.beta1, settings.beta2))
        flat_gradients = [gradient.reshape(-1) for gradient in gradients]
        moments = zip(self.first_moments, self.second_moments)
        rows = zip(self._parameters, flat_gradients, self._decayed, moments, strict=True)
        for whole, whole_gradient, decayed, wholes in rows:
            tensors = [tensor.view(-1).split(PART_ELEMENTS) for tensor in (whole, whole_gradient, *wholes)]
            for parameter, gradient, first, second in zip(*tensors, strict=True):
                if decayed:
                    parameter.mul_(1 - learning_rate * settings.weight_decay)
                first.lerp_(gradient, 1 - settings.beta1)
                second.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
                mean, signal, noise = (row[: parameter.numel()] for row in self._part_scratch)
                torch.mul(first, first_scale, out=mean)
                torch.mul(mean, mean, out=signal)
                torch.mul(second, second_scale, out=noise)
                noise.sub_(signal).clamp_min_(0.0)
                denominator = signal.add_(noise, alpha=batch_share).sqrt_().add_(settings.epsilon)
                parameter.addcdiv_(mean, denominator, value=-learning_rate)

    def _plain_step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        assert self._scratch is not None
        settings, step = self._settings, self.steps + 1
        step_size = learning_rate / (1 - settings.beta1**step)
        correction = math.sqrt(1 - settings.beta2**step)
        moments = zip(self.first_moments, self.second_moments)
        rows = zip(self._parameters, gradients, self._decayed, moments, strict=True)
        for parameter, gradient, decayed, (first, second) in rows:
            if decayed:
                parameter.mul_(1 - learning_rate * settings.weight_decay)
            first.lerp_(gradient, 1 - settings.beta1)
            second.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
            denominator = self._scratch[: parameter.numel()].view(parameter.shape)
            torch.sqrt(second, out=denominator)
            denominator.div_(correction).add_(settings.epsilon)
            parameter.addcdiv_(first, denominator, value=-step_size)


Row = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def fused_adamw(
    rows: Sequence[Row], step: torch.Tensor, settings: TrainSettings, learning_rate: float, weight_decay: float
) -> None:
    """One kernel over rows of (parameter, gradient, first moment, second moment); `step` counts from 1."""
    parameters, gradients, first, second = (list(column) for column in zip(*rows, strict=True))
    torch._fused_adamw_(
        parameters,
        gradients,
        first,
        second,
        [],
        [step] * len(parameters),
        lr=learning_rate,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=weight_decay,
        eps=settings.epsilon,
        amsgrad=False,
        maximize=False,
    )


def fused_adamw_works(device: torch.device) -> bool:
    """Whether the device has a fused AdamW that computes what it should: one step, tried on four numbers."""
    start, gradient, signs = [0.5, -1.0, 2.0, 0.0], [1.0, -2.0, 0.5, 0.25], [1, -1, 1, 1]
    settings = TrainSettings("adamw", 0.9, 0.95, 1e-12, 0.5, 0.0, 1)
    try:
        parameter, slope = torch.tensor(start, device=device), torch.tensor(gradient, device=device)
        row = (parameter, slope, torch.zeros_like(slope), torch.zeros_like(slope))
        fused_adamw([row], torch.ones((), device=device), settings, 0.1, settings.weight_decay)
        # The first step is η times the gradient's sign, after a decay by η·λ.
        expected = [value * (1 - 0.1 * 0.5) - 0.1 * sign for value, sign in zip(start, signs, strict=True)]
        return all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(parameter.tolist(), expected, strict=True))
    except Exception as error:  # noqa: BLE001 - a plug-in says no in its own words
        if is_out_of_memory(error):
            raise
        return False
