"""Starts a script of the peers' folder with the bench's validation text, and with initial weights where they are named.

    peer.py PEERS VALIDATION WEIGHTS SCRIPT ARGUMENTS...
    peer.py PEERS VALIDATION WEIGHTS check SIZE

WEIGHTS is a folder as `beringia export --to hf` writes it, or `-` for the peers' own. `check` prints the number of
parameters and the loss of the initial weights. The peers' files stay as they are: only `model.build` and
`model.evaluate` are replaced. Their rotary embedding turns neighbouring pairs (2i, 2i + 1), that of Hugging Face's Llama the
pairs (i, i + half): rows of query and key are put in the other order, which changes no logit.
"""
import json
import os
import runpy
import sys
import time

import torch

PEERS, VALIDATION, WEIGHTS, SCRIPT = sys.argv[1:5]
sys.path.insert(0, PEERS)
import model  # noqa: E402


def neighbouring(rows, heads):
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def load(net):
    from safetensors.torch import load_file

    found = load_file(os.path.join(WEIGHTS, "model.safetensors"))
    state = {"e.weight": found["model.embed_tokens.weight"], "n.w": found["model.norm.weight"]}
    state["hd.weight"] = found["lm_head.weight"]
    for number, block in enumerate(net.b):
        old = {name.split(".", 3)[3]: found[name] for name in found if name.startswith(f"model.layers.{number}.")}
        query, key = (neighbouring(old[f"self_attn.{name}_proj.weight"], block.h) for name in "qk")
        new = {"qkv.weight": torch.cat([query, key, old["self_attn.v_proj.weight"]])}
        new["o.weight"] = old["self_attn.o_proj.weight"]
        new.update({f"{name}.weight": old[f"mlp.{name}_proj.weight"] for name in ("up", "gate", "down")})
        new["n1.w"], new["n2.w"] = old["input_layernorm.weight"], old["post_attention_layernorm.weight"]
        state.update({f"b.{number}.{name}": tensor for name, tensor in new.items()})
    net.load_state_dict(state)
    return net


build, evaluate = model.build, model.evaluate
if WEIGHTS != "-":
    model.build = lambda size: load(build(size))
with open(VALIDATION, "rb") as file:
    text = torch.tensor(list(file.read()), dtype=torch.int64)
windows = (len(text) - 1) // model.T
model.evaluate = lambda net, _held_out, n=None: evaluate(net, text, n=windows)

if SCRIPT == "check":
    torch.set_num_threads(1)
    net = model.build(sys.argv[5])
    count = sum(parameter.numel() for parameter in net.parameters())
    print(json.dumps({"parameters": count, "nats": model.evaluate(net, None)}))
else:
    if "--secs" in sys.argv:
        # The scripts count from their own start: what has passed since the sites were started is taken off.
        place = sys.argv.index("--secs") + 1
        sys.argv[place] = str(float(sys.argv[place]) - (time.time() - float(os.environ["WAN_STARTED"])))
    sys.argv = [os.path.join(PEERS, SCRIPT), *sys.argv[5:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
