"""The engine computes what `transformers` and `torch.optim` compute, and its parts agree with each other."""

from __future__ import annotations

import math
import unittest
from typing import Any

import torch
import transformers
from agent import ADAMW, TINY_LLAMA, Agent, Refused, distance, random_tokens

LLAMAS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "tied": {"tie_word_embeddings": True},
    "biases and a head size of its own": {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
    "new rope key": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }
    },
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 2.0}},
}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "qwen2": {key: value for key, value in TINY_LLAMA.items() if key != "model_type"},
    "mistral": {
        **{key: value for key, value in TINY_LLAMA.items() if key != "model_type"},
        "sliding_window": 8,
        "torch_dtype": "bfloat16",
    },
}


def reference_of(config: dict[str, Any]) -> torch.nn.Module:
    """The model of `transformers`, without dropout, in f32."""
    left_out = ("model_type", "torch_dtype")
    chosen = {key: value for key, value in config.items() if key not in left_out and value is not None}
    built = transformers.AutoConfig.for_model(config["model_type"], **chosen)
    return transformers.AutoModelForCausalLM.from_config(built).float().eval()


def lively(agent: Agent, seed: int) -> torch.Tensor:
    """Parameters far from their start: attention is not uniform, norms are uneven, and a wrong derivative shows."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for name, shape in agent.parameters:
        noise = torch.randn(torch.Size(shape).numel(), generator=generator)
        is_scale = len(shape) == 1 and "norm" in name.replace("ln_", "norm") and name.endswith("weight")
        parts.append(1 + 0.2 * noise if is_scale else 0.2 * noise)
    return torch.cat(parts)


def load(reference: torch.nn.Module, values: torch.Tensor) -> None:
    """Sets all parameters from the flat vector."""
    torch.nn.utils.vector_to_parameters(values, reference.parameters())


def loss_of(reference: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy."""
    logits = reference(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def adamw_of(reference: torch.nn.Module, epsilon: float) -> torch.optim.AdamW:
    """PyTorch's optimiser with the settings of `ADAMW`."""
    parameters = list(reference.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(ADAMW["beta1"], ADAMW["beta2"]), eps=epsilon)


class Numerics(unittest.TestCase):
    """One engine for all tests: each begins with a new model."""

    agent: Agent

    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        cls.agent = cls.enterClassContext(Agent("--threads", "1"))

    def start(self, config: dict[str, Any], **train: Any) -> tuple[torch.nn.Module, torch.Tensor]:
        """Engine and reference with equal parameters."""
        self.agent.init(config, **train)
        reference = reference_of(config)
        names = [(name, list(parameter.shape)) for name, parameter in reference.named_parameters()]
        self.assertEqual(names, self.agent.parameters)
        values = lively(self.agent, 3)
        self.agent.write(values)
        load(reference, values)
        return reference, values

    def check_parity(self, config: dict[str, Any]) -> None:
        """Logits, loss and every gradient."""
        reference, values = self.start(config)
        tokens = random_tokens(3, 16, 61, 5)
        logits = reference(tokens[:1, :-1]).logits[0].detach()
        self.assertLess((self.agent.logits(tokens[0, :-1], 61) - logits).abs().max().item(), 1e-5 * logits.abs().max())
        loss = loss_of(reference, tokens)
        loss.backward()
        answer, gradient = self.agent.gradient(tokens)
        self.assertAlmostEqual(answer["loss_nats"], loss.item(), delta=1e-5)
        self.assertAlmostEqual(self.agent.evaluate(tokens)["nats"] / 48, loss.item(), delta=1e-5)
        start = 0
        for name, parameter in reference.named_parameters():
            found = gradient[start : start + parameter.numel()].view(parameter.shape)
            self.assertLess(distance(found, parameter.grad), 2e-5, name)
            start += parameter.numel()
        self.assertAlmostEqual(answer["gradient_norm"], gradient.norm().item(), delta=1e-4)
        self.assertTrue(torch.equal(self.agent.read(), values), "a gradient changes nothing")

    def test_llama_is_that_of_transformers(self) -> None:
        for name, change in LLAMAS.items():
            with self.subTest(name):
                self.check_parity({**TINY_LLAMA, **change})

    def test_other_families_come_from_transformers(self) -> None:
        for model_type, config in FAMILIES.items():
            with self.subTest(model_type):
                self.check_parity({"model_type": model_type, **config})
        answer = self.agent.init({"model_type": "gpt2", **FAMILIES["gpt2"]})
        self.assertEqual(answer["transformers"], transformers.__version__)
        self.assertIsNone(self.agent.init()["transformers"])

    def check_steps(self, config: dict[str, Any], steps: int, epsilon: float = ADAMW["epsilon"]) -> None:
        """AdamW with clipping, a learning rate of its own for each step."""
        reference, _ = self.start(config, micro_batch_samples=2, epsilon=epsilon)
        optimizer = adamw_of(reference, epsilon)
        for step in range(steps):
            tokens, learning_rate = random_tokens(5, 12, 61, step), 1e-2 * (1 + step) / steps
            answer = self.agent.step(tokens, learning_rate)
            optimizer.zero_grad()
            loss = loss_of(reference, tokens)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), ADAMW["gradient_clip_norm"])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            self.assertAlmostEqual(answer["loss_nats"], loss.item(), delta=1e-4)
            self.assertAlmostEqual(answer["gradient_norm"], norm.item(), delta=1e-3)
            self.assertEqual(answer["tokens"], 60)
        expected = torch.nn.utils.parameters_to_vector(reference.parameters()).detach()
        self.assertLess(distance(self.agent.read(), expected), 2e-5)

    def test_twenty_steps_are_those_of_torch_optim(self) -> None:
        self.check_steps(TINY_LLAMA, 20)
        self.check_steps({**TINY_LLAMA, "tie_word_embeddings": True}, 20)
        # The gradient of a key's bias is zero but for rounding; AdamW with a small ε would make steps of that noise.
        self.check_steps({"model_type": "gpt2", **FAMILIES["gpt2"]}, 5, epsilon=1e-3)

    def test_sgd_follows_the_gradient(self) -> None:
        _, values = self.start(TINY_LLAMA, optimizer="sgd", gradient_clip_norm=0.0)
        tokens = random_tokens(3, 12, 61, 5)
        _, gradient = self.agent.gradient(tokens)
        self.agent.step(tokens, 0.25)
        self.assertLess(distance(self.agent.read(), values - 0.25 * gradient), 1e-7)
        state = self.agent.save()
        self.assertEqual((state["steps"], set(state)), (1, {"steps", "parameters"}))

    def test_clipping_bounds_the_step(self) -> None:
        _, values = self.start(TINY_LLAMA, optimizer="sgd", gradient_clip_norm=0.125)
        norm = self.agent.step(random_tokens(3, 12, 61, 5), 1.0)["gradient_norm"]
        self.assertGreater(norm, 0.125)
        self.assertAlmostEqual((self.agent.read() - values).norm().item(), 0.125, delta=1e-5)

    def test_accumulation_equals_the_full_batch(self) -> None:
        self.start(TINY_LLAMA, micro_batch_samples=7)
        tokens = random_tokens(7, 12, 61, 5)
        whole, gradient = self.agent.gradient(tokens)
        evaluated = self.agent.evaluate(tokens)["nats"]
        for samples in (1, 3, 6):
            self.agent.call("micro_batch", samples=samples)
            answer, accumulated = self.agent.gradient(tokens)
            self.assertLess(distance(accumulated, gradient), 1e-6)
            self.assertAlmostEqual(answer["loss_nats"], whole["loss_nats"], delta=1e-6)
            self.assertAlmostEqual(self.agent.evaluate(tokens)["nats"], evaluated, delta=1e-4)

    def test_future_tokens_change_nothing(self) -> None:
        self.start(TINY_LLAMA)
        tokens = random_tokens(1, 15, 61, 5)[0]
        changed = torch.cat((tokens[:9], (tokens[9:] + 1) % 61))
        before, after = self.agent.logits(tokens, 61), self.agent.logits(changed, 61)
        self.assertTrue(torch.equal(before[:9], after[:9]))
        self.assertFalse(torch.equal(before[9:], after[9:]))

    def test_ranges_are_read_and_written(self) -> None:
        _, values = self.start(TINY_LLAMA)
        last = self.agent.elements
        ranges = [(last - 3, last), (0, 5), (1000, 1000), (61 * 32 - 2, 61 * 32 + 2)]
        expected = torch.cat([values[start:end] for start, end in ranges])
        self.assertTrue(torch.equal(self.agent.read(*ranges), expected))
        replacement = torch.arange(12.0)
        self.agent.write(replacement, *ranges)
        self.assertTrue(torch.equal(self.agent.read(*ranges), replacement))
        rest = torch.ones(last, dtype=torch.bool)
        for start, end in ranges:
            rest[start:end] = False
        self.assertTrue(torch.equal(self.agent.read()[rest], values[rest]))

    def test_restored_engine_continues_with_the_same_bits(self) -> None:
        self.start(TINY_LLAMA)
        for step in range(3):
            self.agent.step(random_tokens(3, 12, 61, step), 1e-2)
        state = self.agent.save()
        self.assertEqual(state["steps"], 3)
        self.agent.step(random_tokens(3, 12, 61, 3), 1e-2)
        expected = self.agent.save()
        self.agent.init()
        self.agent.restore(state)
        self.agent.step(random_tokens(3, 12, 61, 3), 1e-2)
        found = self.agent.save()
        for name in ("parameters", "first", "second"):
            self.assertTrue(torch.equal(found[name], expected[name]), name)
        self.agent.restore({"steps": 0, "parameters": state["parameters"]})
        self.assertNotIn("first", self.agent.save(), "moments are forgotten with a state that has none")

    def test_seeds_make_initial_weights(self) -> None:
        self.agent.init(seed=7)
        values = self.agent.read()
        self.agent.init(seed=8)
        self.assertFalse(torch.equal(self.agent.read(), values))
        self.agent.init(seed=7)
        self.assertTrue(torch.equal(self.agent.read(), values))
        embedding = values[: 61 * 32]
        self.assertAlmostEqual(embedding.std().item(), 0.02, delta=0.002)
        loss = self.agent.evaluate(random_tokens(8, 16, 61, 2))["nats"] / 128
        self.assertAlmostEqual(loss, math.log(61), delta=0.05, msg="small weights guess")

    def test_numbers_that_are_not_finite_change_nothing(self) -> None:
        _, values = self.start(TINY_LLAMA)
        tokens = random_tokens(3, 12, 61, 5)
        self.agent.step(tokens, 1e-2)
        state = self.agent.save()
        self.agent.write(torch.tensor([math.nan]), (3 * 32, 3 * 32 + 1))
        tokens[0, 0] = 3
        for call in (lambda: self.agent.step(tokens, 1e-2), lambda: self.agent.gradient(tokens)):
            with self.assertRaises(Refused) as caught:
                call()
            self.assertEqual(
                (caught.exception.kind, caught.exception.what, caught.exception.value), ("not_finite", "loss", "NaN")
            )
        after = self.agent.save()
        self.assertEqual(after["steps"], 1)
        self.assertTrue(torch.equal(after["first"], state["first"]))
        self.assertEqual(int((after["parameters"] != state["parameters"]).sum()), 1)
        # A loss that is finite while its gradient is not: a norm's square leaves the range of f32.
        self.agent.write(values * 1e12)
        with self.assertRaises(Refused) as caught:
            self.agent.step(tokens, 1e-2)
        self.assertEqual(caught.exception.kind, "not_finite")
        self.agent.restore(state)
        self.agent.step(tokens, 1e-2)


class Bf16(unittest.TestCase):
    """Products in bf16, everything else in f32."""

    def test_bf16_is_near_f32_and_learns(self) -> None:
        with Agent("--precision", "bf16", "--threads", "1") as agent:
            answer = agent.init()
            self.assertEqual(answer["device"]["precision"], "bf16")
            values = lively(agent, 3)
            agent.write(values)
            self.assertTrue(torch.equal(agent.read(), values), "master weights are f32")
            reference = reference_of(TINY_LLAMA)
            load(reference, values)
            tokens = random_tokens(3, 16, 61, 5)
            loss = loss_of(reference, tokens)
            loss.backward()
            expected = torch.cat([parameter.grad.flatten() for parameter in reference.parameters()])
            answer, gradient = agent.gradient(tokens)
            # bf16 has 8 bits: each rounding is up to 2^-9 = 0.2 %, a few of them in a row.
            self.assertAlmostEqual(answer["loss_nats"] / loss.item(), 1.0, delta=0.01)
            self.assertLess(distance(gradient, expected), 0.03)
            self.assertGreater(distance(gradient, expected), 1e-4, "f32 would be much nearer")
            losses = [agent.step(tokens, 1e-2)["loss_nats"] for _ in range(20)]
            self.assertLess(losses[-1], 0.5 * losses[0])


if __name__ == "__main__":
    unittest.main()
