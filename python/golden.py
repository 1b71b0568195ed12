"""Writes the golden values that the conformance suite holds every engine to.

The model is `transformers.LlamaForCausalLM`, the optimiser `torch.optim.AdamW`, both in f32 on the CPU. Weights and tokens
come from a multiplicative hash that the Rust test repeats exactly, and of each tensor its norm and some elements spread
evenly are kept, so that the files stay small.

    python3 python/golden.py crates/engine/golden
"""

import json
import pathlib
import sys

import numpy
import torch
import transformers

SAMPLES, POSITIONS, STEPS = 3, 12, 20
KEPT_ELEMENTS = 16
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON, CLIP_NORM = 2e-3, 0.1, (0.9, 0.95), 1e-8, 0.5


def uniform(stream, length):
    """Numbers in [0, 1) with 32 bits: the top half of index · odd constant modulo 2^64."""
    index = numpy.arange(1, length + 1, dtype=numpy.uint64) + numpy.uint64(stream << 32)
    return ((index * numpy.uint64(0x9E3779B97F4A7C15)) >> numpy.uint64(32)).astype(numpy.float64) / 2.0**32


def build(tied):
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=tied,
        attention_bias=False,
        mlp_bias=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for stream, (_, parameter) in enumerate(model.named_parameters()):
            values = uniform(stream, parameter.numel()) - 0.5
            values = 1.0 + 0.5 * values if parameter.ndim == 1 else 0.6 * values
            parameter.copy_(torch.from_numpy(values.astype(numpy.float32)).view(parameter.shape))
    return model


def summary(tensor):
    """Norm, and the elements at i·length/KEPT_ELEMENTS."""
    flat = tensor.detach().flatten()
    kept = [flat[index * flat.numel() // KEPT_ELEMENTS].item() for index in range(KEPT_ELEMENTS)]
    return {"norm": flat.double().norm().item(), "kept": kept}


def golden(tied):
    model = build(tied)
    ids = (uniform(1000, SAMPLES * (POSITIONS + 1)) * 61).astype(numpy.int64)
    ids = torch.from_numpy(ids).view(SAMPLES, POSITIONS + 1)

    def loss_of():
        logits = model(ids[:, :-1]).logits
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    logits, loss = loss_of()
    loss.backward()
    named = list(model.named_parameters())
    gradients = {name: summary(parameter.grad) for name, parameter in named}
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for _, p in named if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON)
    steps, after_one_step = [], {}
    for index in range(STEPS):
        optimizer.zero_grad()
        step_loss = loss_of()[1]
        step_loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if index == 0:
            after_one_step = {name: summary(parameter) for name, parameter in named}
        steps.append({"loss_nats": step_loss.item(), "gradient_norm": norm.item()})
    return {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tie_word_embeddings": tied,
        "samples": SAMPLES,
        "positions": POSITIONS,
        "logits_of_first_sample": logits[0].flatten().tolist(),
        "loss_nats": loss.item(),
        "gradients": gradients,
        "train": {
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "beta1": BETAS[0],
            "beta2": BETAS[1],
            "epsilon": EPSILON,
            "gradient_clip_norm": CLIP_NORM,
        },
        "steps": steps,
        "parameters_after_one_step": after_one_step,
        "parameters_after_all_steps": {name: summary(parameter) for name, parameter in named},
    }


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for tied in (False, True):
        path = folder / ("tied.json" if tied else "untied.json")
        path.write_text(json.dumps(golden(tied), indent=1) + "\n")
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
