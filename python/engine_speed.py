"""PyTorch's side of `cargo xtask bench engine`: the same Llama, trained by the same rule, on the CPU.

Reads a number of steps per line from standard input, runs them, and answers with one line of JSON, until the input
ends: so that two engines can take turns in one run. The model is written with PyTorch's fused functions
(scaled_dot_product_attention, rms_norm, cross_entropy; AdamW with fused=True) and one matrix for queries, keys and
values and one for gate and up, which is faster than what `transformers` does.

    python3 engine_speed.py --threads 2 [--compile]
"""

import argparse
import json
import sys
import time

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("engine_speed.py: PyTorch is not installed\nhint: pip install torch")

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, POSITIONS, SAMPLES = 512, 256, 704, 6, 8, 256, 8


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()

        def linear(inputs, outputs):
            return torch.nn.Linear(inputs, outputs, bias=False)

        self.attention_norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)
        self.query_key_value = linear(HIDDEN, 3 * HIDDEN)
        self.output = linear(HIDDEN, HIDDEN)
        self.feed_forward_norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)
        self.gate_up = linear(HIDDEN, 2 * INNER)
        self.down = linear(INNER, HIDDEN)

    def forward(self, x, cosine, sine):
        samples, positions, _ = x.shape
        projected = self.query_key_value(self.attention_norm(x)).view(samples, positions, 3, HEADS, HIDDEN // HEADS)
        q, k, v = projected.permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).reshape(samples, positions, HIDDEN))
        gate, up = self.gate_up(self.feed_forward_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def rotate(x, cosine, sine):
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class Llama(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        size = HIDDEN // HEADS
        angles = torch.outer(torch.arange(POSITIONS).float(), 10_000.0 ** -(torch.arange(0, size, 2).float() / size))
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def memory_peak_bytes():
    try:
        lines = open("/proc/self/status", encoding="ascii").readlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    model = Llama()
    forward = torch.compile(model) if arguments.compile else model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for line in sys.stdin:
        batches = [torch.randint(0, VOCABULARY, (SAMPLES, POSITIONS + 1)) for _ in range(int(line))]
        start = time.perf_counter()
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = forward(batch[:, :-1], batch[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss_nats = loss.item()
        seconds = time.perf_counter() - start
        answer = {
            "tokens_per_second": round(len(batches) * SAMPLES * POSITIONS / seconds, 1),
            "loss_nats": round(loss_nats, 4),
            "memory_peak_bytes": memory_peak_bytes(),
            "threads": torch.get_num_threads(),
            "version": torch.__version__,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
