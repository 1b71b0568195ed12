"""The thirty operations against their definitions in f64."""

from __future__ import annotations

import math
import re
import unittest

import torch
from agent import PACKAGE_FOLDER, Agent, Refused, distance

from beringia_torch.operations import OPERATIONS


def softmax(x: torch.Tensor) -> torch.Tensor:
    shifted = (x - x.amax(-1, keepdim=True)).exp()
    return shifted / shifted.sum(-1, keepdim=True)


def rotary(x: torch.Tensor) -> torch.Tensor:
    positions, half = x.shape[0], x.shape[1] // 2
    angles = torch.arange(positions).double()[:, None] * 10_000.0 ** (-torch.arange(half).double() / half)[None]
    first, second = x[:, :half], x[:, half:]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, 1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    future = torch.ones(q.shape[1], q.shape[1]).triu(1).bool()
    return softmax(scores.masked_fill(future, -math.inf)) @ v


REFERENCES = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": lambda a, b: torch.where(a > b, a, b),
    "divide": lambda a, b: a / b,
    "square": lambda a: a * a,
    "round_to_bf16": lambda a: a.to(torch.bfloat16).double(),
    "exp": lambda a: math.e**a,
    "sigmoid": lambda a: 1 / (1 + (-a).exp()),
    "silu": lambda a: a / (1 + (-a).exp()),
    "tanh": lambda a: (a.exp() - (-a).exp()) / (a.exp() + (-a).exp()),
    "sine": torch.sin,
    "cosine": torch.cos,
    "sum_rows": lambda a: a.sum(1),
    "mean_columns": lambda a: a.sum(0) / a.shape[0],
    "max_rows": lambda a: a.max(1).values,
    "softmax": softmax,
    "log_softmax": lambda a: softmax(a).log(),
    "log": torch.log,
    "sqrt": lambda a: a**0.5,
    "reciprocal_sqrt": lambda a: a**-0.5,
    "cross_entropy": lambda a, ids: -softmax(a).log()[range(len(ids)), ids.long()].sum(),
    "embedding": lambda a, ids: a[ids.long()],
    "rms_norm": lambda a, w: a / ((a * a).mean(1, keepdim=True) + 1e-5) ** 0.5 * w,
    "rotary": rotary,
    "causal_attention": attention,
    "matmul": lambda a, b: torch.einsum("mk,kn->mn", a, b),
    "matmul_transposed": lambda a, b: torch.einsum("mk,nk->mn", a, b),
    "matmul_long": lambda a, b: torch.einsum("mk,kn->mn", a, b),
    "batched_matmul": lambda a, b: torch.einsum("bmk,bkn->bmn", a, b),
}

SHAPES = {
    "rotary": [[48, 32]],
    "causal_attention": [[2, 32, 16]] * 3,
    "matmul": [[64, 128], [128, 96]],
    "matmul_transposed": [[64, 128], [96, 128]],
    "matmul_long": [[8, 4096], [4096, 8]],
    "batched_matmul": [[4, 32, 48], [4, 48, 24]],
    "rms_norm": [[64, 256], [256]],
    "cross_entropy": [[64, 256], [64]],
    "embedding": [[50, 32], [40]],
}
POSITIVE = {"log", "sqrt", "reciprocal_sqrt", "divide"}


class Operations(unittest.TestCase):
    agent: Agent

    @classmethod
    def setUpClass(cls) -> None:
        cls.agent = cls.enterClassContext(Agent("--threads", "1"))
        cls.agent.map_arena(1 << 20)

    def run_operation(self, name: str, inputs: list[torch.Tensor]) -> torch.Tensor:
        operands, offset = [], 0
        for tensor in inputs:
            self.agent.view(offset, tensor.numel()).copy_(tensor.flatten())
            operands.append({"offset": offset, "shape": list(tensor.shape)})
            offset += -(-tensor.numel() * 4 // 64) * 64
        elements = self.agent.call("operation", name=name, inputs=operands, output=offset)["elements"]
        return self.agent.view(offset, elements).clone()

    def inputs_of(self, name: str) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(len(name))
        count = OPERATIONS[name][0]
        inputs = [torch.randn(shape, generator=generator) for shape in SHAPES.get(name, [[64, 256]] * count)]
        if name in POSITIVE or name == "rms_norm":
            inputs[-1] = inputs[-1].abs() + 0.5
        if name in ("cross_entropy", "embedding"):
            below = 256 if name == "cross_entropy" else 50
            inputs[1] = torch.randint(0, below, inputs[1].shape, generator=generator).float()
        return inputs

    def test_each_is_near_its_definition(self) -> None:
        self.assertEqual(set(OPERATIONS), set(REFERENCES))
        for name, reference in REFERENCES.items():
            with self.subTest(name):
                inputs = self.inputs_of(name)
                expected = reference(*(tensor.double() for tensor in inputs)).flatten()
                self.assertLess(distance(self.run_operation(name, inputs), expected), 1e-6)

    def test_the_names_are_those_of_the_other_engines(self) -> None:
        source = PACKAGE_FOLDER.parent / "crates" / "engine" / "src" / "numerics.rs"
        if not source.exists():
            self.skipTest("the package lies outside its repository")
        matched = re.search(r"let result = match operation.name \{(.*?)\n    \};", source.read_text(), re.DOTALL)
        assert matched is not None
        arms = re.findall(r'^        ((?:"\w+" ?\|? ?)+)=>', matched[1], re.MULTILINE)
        names = {name for arm in arms for name in re.findall(r'"(\w+)"', arm)}
        self.assertEqual(names, set(OPERATIONS))

    def test_ties_go_to_even(self) -> None:
        ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
        self.assertEqual(self.run_operation("round_to_bf16", [ties]).tolist(), [1.0, 1 + 2**-6])

    def test_what_does_not_fit_is_refused(self) -> None:
        one = torch.ones(4, 4)
        cases = [("nothing", [one]), ("add", [one]), ("add", [one, torch.ones(3, 3)]), ("embedding", [one, one[0] * 9])]
        for name, inputs in cases:
            with self.subTest(name), self.assertRaises(Refused):
                self.run_operation(name, inputs)
        self.assertEqual(self.run_operation("add", [one, one]).tolist(), [2.0] * 16)


if __name__ == "__main__":
    unittest.main()
