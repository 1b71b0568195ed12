"""Building a model: what a config may not make us do, and weights that nobody asked to draw."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from agent import TINY_LLAMA, random_tokens

from beringia_torch import model
from beringia_torch.protocol import Request

LLAMA_FIELDS = {key: value for key, value in TINY_LLAMA.items() if key != "model_type"}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": TINY_LLAMA,
    "gpt2": {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    "qwen2": {"model_type": "qwen2", **LLAMA_FIELDS},
    "mixtral": {"model_type": "mixtral", **LLAMA_FIELDS, "num_local_experts": 2, "num_experts_per_tok": 1},
}

#: Each of them names a repository whose code `transformers` would fetch.
IMPLEMENTATIONS = {
    "attn_implementation": "someone/attention",
    "_attn_implementation": "someone/attention",
    "_attn_implementation_internal": "someone/attention",
    "experts_implementation": "someone/experts",
    "_experts_implementation": "someone/experts",
    "use_kernels": True,
    "auto_map": {"AutoModelForCausalLM": "someone/code--model.Model"},
}


class Model(unittest.TestCase):
    def test_without_a_seed_nothing_is_drawn(self) -> None:
        for name, config in CONFIGS.items():
            with self.subTest(name):
                state = torch.random.get_rng_state()
                first, drawn = model.build(Request(config), None), model.build(Request(config), 1)
                self.assertTrue(torch.equal(torch.random.get_rng_state(), state))
                for (name_a, a), (name_b, b) in zip(first.named_parameters(), drawn.named_parameters(), strict=True):
                    self.assertEqual((name_a, a.shape), (name_b, b.shape))
                    if a.ndim >= 2:
                        self.assertEqual(int(a.count_nonzero()), 0, name_a)
                        self.assertGreater(b.std().item(), 1e-3, name_b)
                    else:
                        self.assertTrue(torch.equal(a, b), "what the family sets is set")
                # With the same parameters it is the same model: its tables of positions, too, were made.
                with torch.no_grad():
                    for (_, a), (_, b) in zip(first.named_parameters(), drawn.named_parameters(), strict=True):
                        a.copy_(b)
                tokens = random_tokens(2, 12, 61, 3)
                self.assertTrue(torch.equal(first.module(tokens), drawn.module(tokens)))

    def test_code_that_a_config_names_is_neither_fetched_nor_run(self) -> None:
        for name in ("gpt2", "mixtral"):
            with self.subTest(name):
                plain = model.build(Request(CONFIGS[name]), 1)
                built = model.build(Request({**CONFIGS[name], **IMPLEMENTATIONS}), 1)
                for chosen in ("_attn_implementation", "_experts_implementation"):
                    expected = getattr(plain.module.inner.config, chosen)
                    self.assertEqual(getattr(built.module.inner.config, chosen), expected)
                self.assertEqual(built.module.inner.config._attn_implementation, "sdpa")
                tokens = random_tokens(2, 12, 61, 3)
                self.assertTrue(torch.equal(built.module(tokens), plain.module(tokens)))

    def test_such_keys_are_found_at_any_depth(self) -> None:
        config = {"text_config": {**IMPLEMENTATIONS, "model_type": "gpt2"}, "parts": [{"use_kernels": True, "n": 1}]}
        expected = {"text_config": {"model_type": "gpt2"}, "parts": [{"n": 1}]}
        self.assertEqual(model._without(config, model.IGNORED_KEYS), expected)


if __name__ == "__main__":
    unittest.main()
