"""The inner optimisers: `torch.optim.AdamW` and plain SGD, after global-norm clipping.

A step must happen whole or not at all, so it allocates nothing: moments exist before the gradient is computed, and one
scratch tensor serves all parameters where the device has no fused AdamW. For step t from 1 (Loshchilov and Hutter 2019,
algorithm 2):

    p ← p·(1 − η·λ)                    λ on tensors of 2 or more dimensions only
    m ← m + (g − m)·(1 − β1)
    v ← v·β2 + g²·(1 − β2)
    p ← p − η/(1 − β1^t) · m / (√v / √(1 − β2^t) + ε)
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
        # Leaves of their own that share the parameters' memory: sharded or not, they are plain tensors.
        self._parameters = [local(parameter.detach()) for parameter in parameters]
        self._decayed = [parameter.ndim > 1 for parameter in parameters]
        self._fused: torch.optim.AdamW | None = None
        self._scratch: torch.Tensor | None = None
        self.first_moments: list[torch.Tensor] = []
        self.second_moments: list[torch.Tensor] = []
        #: Whether the moments say anything yet: zeros of a run that has not begun are not saved.
        self.has_moments = False
        self.steps = 0

    def reserve(self) -> None:
        """Allocates what steps need, before anything changes."""
        if self._settings.optimizer != "adamw" or self.first_moments:
            return
        first = [torch.zeros_like(parameter) for parameter in self._parameters]
        second = [torch.zeros_like(parameter) for parameter in self._parameters]
        device = self._parameters[0].device
        fused = self._fused_adamw(first, second) if fused_adamw_works(device) else None
        if fused is None:
            largest = max(parameter.numel() for parameter in self._parameters)
            self._scratch = torch.empty(largest, device=device)
        self._fused, self.first_moments, self.second_moments = fused, first, second

    def step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        """One step on gradients that are already clipped."""
        if self._settings.optimizer == "sgd":
            with torch.no_grad():
                for parameter, gradient in zip(self._parameters, gradients):
                    parameter.add_(gradient, alpha=-learning_rate)
        elif self._fused is not None:
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
        if self._fused is not None:
            for state in self._fused.state.values():
                state["step"].fill_(steps)

    def _fused_adamw(self, first: list[torch.Tensor], second: list[torch.Tensor]) -> torch.optim.AdamW:
        def chosen(decayed: bool) -> list[torch.Tensor]:
            return [tensor for tensor, is_decayed in zip(self._parameters, self._decayed) if is_decayed == decayed]

        settings = self._settings
        groups = [
            {"params": chosen(True), "weight_decay": settings.weight_decay},
            {"params": chosen(False), "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True)
        for parameter, exp_avg, exp_avg_sq in zip(self._parameters, first, second):
            step = torch.full((), float(self.steps), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return optimizer

    def _fused_step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        assert self._fused is not None
        for group in self._fused.param_groups:
            group["lr"] = learning_rate
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
        self._fused.step()
        self._fused.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _plain_step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        assert self._scratch is not None
        settings, step = self._settings, self.steps + 1
        step_size = learning_rate / (1 - settings.beta1**step)
        correction = math.sqrt(1 - settings.beta2**step)
        moments = zip(self.first_moments, self.second_moments)
        for parameter, gradient, decayed, (first, second) in zip(self._parameters, gradients, self._decayed, moments):
            if decayed:
                parameter.mul_(1 - learning_rate * settings.weight_decay)
            first.lerp_(gradient, 1 - settings.beta1)
            second.mul_(settings.beta2).addcmul_(gradient, gradient, value=1 - settings.beta2)
            denominator = self._scratch[: parameter.numel()].view(parameter.shape)
            torch.sqrt(second, out=denominator)
            denominator.div_(correction).add_(settings.epsilon)
            parameter.addcdiv_(first, denominator, value=-step_size)


def fused_adamw_works(device: torch.device) -> bool:
    """Whether the device has a fused AdamW that computes what it should: one step, tried on four numbers."""
    start = [0.5, -1.0, 2.0, 0.0]
    try:
        parameter = torch.tensor(start, device=device, requires_grad=True)
        parameter.grad = torch.tensor([1.0, -2.0, 0.5, 0.25], device=device)
        torch.optim.AdamW([parameter], lr=0.1, eps=0.0, weight_decay=0.0, fused=True).step()
        # The first step is η times the gradient's sign.
        expected = [value - 0.1 * sign for value, sign in zip(start, [1, -1, 1, 1])]
        return all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(parameter.detach().tolist(), expected))
    except Exception as error:  # noqa: BLE001 - a plug-in says no in its own words
        if is_out_of_memory(error):
            raise
        return False
