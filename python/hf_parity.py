#!/usr/bin/env python3
"""Holds Beringia's Llama to that of `transformers`, in both directions.

Out:  a run is trained for a few steps and exported with `beringia export --to hf`; `transformers` loads the folder,
      and its f32 logits must equal those that Beringia computes from the run's own checkpoint.
In:   `transformers` writes folders with random weights (grouped-query attention; output projection of its own, tied,
      and cut into several files); `beringia logits` and `beringia eval` load them, and logits, loss and bits per byte
      must equal those of `transformers`.

How a text is cut, the same in `beringia eval FOLDER --text FILE` and here: the whole file is encoded by the
folder's tokenizer.json, without beginning- or end-of-text tokens; a special token that it spells out is text. With
T = max_position_embeddings, window k holds the tokens [kT, kT + T], so that T + 1 tokens predict T, windows share one
token, and every token but the first is predicted once. The last window may be shorter. The loss is the mean over all
predicted tokens, in nats; bits per byte divide the summed loss by ln 2 and by the UTF-8 bytes of the predicted
tokens.

Not a test of speed or of training: `cargo test` and `cargo xtask bench engine` are.

    python/hf_parity.py --beringia target/release/beringia
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # every folder is local: a look-up would only hide a mistake in one

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

# Both compute in f32 but add in different orders: about 1e-6 of logits near 1 to 10 is seen, and a wrong rotary
# convention, a transposed weight or a missing epsilon gives 1e-2 and more.
LOGIT_DIFFERENCE_MAX = 1e-4
LOSS_DIFFERENCE_MAX = 1e-4
# Logits nearer to each other than this would let a dead model pass.
LOGIT_SPREAD_MIN = 0.1

VOCABULARY_SIZE = 400
MAX_POSITIONS = 64
LOGIT_TOKENS = 48
# Keys of the run that is exported: small enough to train in seconds, with all that can go wrong in it.
RUN_SETTINGS = {
    "data": {"sequence_length": MAX_POSITIONS},
    "model": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
    },
    "train": {
        "steps": 20,
        "batch_samples": 4,
        "micro_batch_samples": 4,
        "learning_rate": 0.003,
        "warmup_steps": 5,
    },
}


class ParityError(Exception):
    """The two implementations differ, or one of them could not be asked."""


def call(command):
    """Standard output of a command; its error output goes to ours."""
    command = [str(part) for part in command]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise ParityError(f"`{' '.join(command)}` failed with status {done.returncode}")
    return done.stdout


def beringia_json(beringia, *arguments):
    """The object that a command prints with --json, on its last line."""
    lines = call([beringia, *arguments, "--json"]).strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise ParityError(f"`beringia {arguments[0]} --json` did not print an object: {error}") from error


def beringia_logits(beringia, place, tokens):
    """Logits (T x V) that Beringia computes from a run or a Hugging Face folder."""
    answer = beringia_json(beringia, "logits", place, "--tokens", ",".join(map(str, tokens)))
    return torch.tensor(answer["logits"], dtype=torch.float32).reshape(answer["shape"])


@torch.no_grad()
def transformers_logits(model, tokens):
    """Logits (T x V) of the other side."""
    return model(torch.tensor([tokens])).logits[0]


def windows(tokens, positions):
    """Windows of `positions` + 1 tokens with stride `positions`; the last may be shorter."""
    starts = range(0, len(tokens) - 1, positions)
    return [tokens[start : start + positions + 1] for start in starts]


@torch.no_grad()
def transformers_nats(model, tokens, positions):
    """Summed cross-entropy of all tokens but the first."""
    nats = 0.0
    for window in windows(tokens, positions):
        ids = torch.tensor([window])
        nats += model(ids, labels=ids).loss.double().item() * (len(window) - 1)
    return nats


def load(folder):
    """The model of a folder as `transformers` sees it, in f32."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {name: keys for name, keys in info.items() if keys}
    if problems:
        raise ParityError(f"transformers does not take {folder} as it is: {problems}")
    return model.eval()


def hold(what, difference, difference_max):
    """Reports a measured difference; refuses one that is too large or not a number."""
    print(f"{what}: largest difference {difference:.2e} (allowed {difference_max:.0e})", flush=True)
    if not difference <= difference_max:
        raise ParityError(f"{what}: {difference:.6g} is above {difference_max:.0e}")


def compare_logits(what, ours, theirs):
    """Holds two tables of logits to each other."""
    if ours.shape != theirs.shape:
        raise ParityError(f"{what}: shape {list(ours.shape)} instead of {list(theirs.shape)}")
    spread = theirs.std(dim=-1).min().item()
    if not spread >= LOGIT_SPREAD_MIN:
        raise ParityError(f"{what}: logits spread by {spread:.2g} only, too little to show a mistake")
    hold(what, (ours - theirs).abs().max().item(), LOGIT_DIFFERENCE_MAX)


def compare_eval(what, beringia, folder, model, text_file):
    """Holds `beringia eval` on a folder to the loss of `transformers` on the same windows."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # as in Beringia: a text that spells out a special token is still text
    text = text_file.read_bytes().decode("utf-8")
    encoding = tokenizer.encode(text, add_special_tokens=False)
    positions = model.config.max_position_embeddings
    nats, predicted = transformers_nats(model, encoding.ids, positions), len(encoding.ids) - 1
    # In a byte-level vocabulary each character of a token's name stands for one byte.
    predicted_bytes = len(text.encode("utf-8")) - len(encoding.tokens[0])
    ours = beringia_json(beringia, "eval", folder, "--text", text_file)
    if ours["tokens"] != predicted:
        raise ParityError(f"{what}: {ours['tokens']} predicted tokens instead of {predicted}")
    if len(encoding.ids) <= positions + 1 or predicted % positions == 0:
        raise ParityError(f"{what}: the text shows neither a whole window nor a partial one")
    hold(f"{what}, nats per token", abs(ours["nats_per_token"] - nats / predicted), LOSS_DIFFERENCE_MAX)
    bits_per_byte = nats / math.log(2) / predicted_bytes
    hold(f"{what}, bits per byte", abs(ours["bits_per_byte"] - bits_per_byte), LOSS_DIFFERENCE_MAX)


def sample_text():
    """Text that is on every machine: this file, and letters beyond ASCII."""
    return Path(__file__).read_text(encoding="utf-8") + "\nBering-Landbrücke, Берингия, 白令陸橋 🌉\n"


def write_corpus(folder):
    """Documents to train on: the Python sources that lie beside this interpreter's own library."""
    folder.mkdir()
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    for source in sources:
        (folder / f"{source.stem}.txt").write_bytes(source.read_bytes())


def set_keys(run_toml, settings):
    """Changes values in a run.toml; a key that is not there is an error, not an addition."""
    text = run_toml.read_text(encoding="utf-8")
    for section, keys in settings.items():
        for key, value in keys.items():
            pattern = rf"(?ms)^(\[{section}\](?:(?!^\[).)*?^{key}\s*=\s*)[^\s#]+"
            text, count = re.subn(pattern, rf"\g<1>{value}", text)
            if count != 1:
                raise ParityError(f"{run_toml} has no {key} under [{section}]")
    run_toml.write_text(text, encoding="utf-8")


def check_export(beringia, work):
    """Out: what Beringia trained and exported, `transformers` computes alike."""
    corpus, run, folder = work / "texts", work / "run", work / "exported"
    write_corpus(corpus)
    call([beringia, "init", run, "--data", corpus])
    set_keys(run / "run.toml", RUN_SETTINGS)
    call([beringia, "train", run])
    call([beringia, "export", run, "--to", "hf", "--output", folder])
    check_exported(beringia, run, folder, work)


def check_exported(beringia, run, folder, work):
    """Out, for a folder that is there already; `run` is what it was exported from."""
    model, text_file = load(folder), work / "exported.txt"
    text_file.write_text(sample_text(), encoding="utf-8")
    tokens = AutoTokenizer.from_pretrained(folder).encode(sample_text(), add_special_tokens=False)
    if tokens != Tokenizer.from_file(str(folder / "tokenizer.json")).encode(sample_text(), add_special_tokens=False).ids:
        raise ParityError("AutoTokenizer cuts text in another way than the tokenizer.json that it was given")
    tokens = tokens[: min(LOGIT_TOKENS, model.config.max_position_embeddings)]
    theirs = transformers_logits(model, tokens)
    compare_logits("export, logits from the run's checkpoint", beringia_logits(beringia, run, tokens), theirs)
    compare_logits("export, logits from the exported folder", beringia_logits(beringia, folder, tokens), theirs)
    compare_eval("export", beringia, folder, model, text_file)


def byte_level_tokenizer(text):
    """A tokenizer with an end-of-text token, trained on a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[AddedToken("<|endoftext|>", special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def random_llama(tied, seed):
    """A Llama with random weights that no two parts of the model can exchange unseen."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # they begin as ones, which would hide norms that were swapped
                parameter.uniform_(0.5, 1.5)
    return model


def check_import(beringia, work):
    """In: what `transformers` wrote, Beringia loads and computes alike."""
    text_file = work / "text.txt"
    text_file.write_text(sample_text(), encoding="utf-8")
    tokenizer = byte_level_tokenizer(sample_text())
    variants = [("untied", False, "1GB"), ("tied", True, "1GB"), ("in several files", False, "100KB")]
    for seed, (name, tied, shard_size) in enumerate(variants):
        folder = work / f"transformers-{seed}"
        random_llama(tied, seed).save_pretrained(folder, max_shard_size=shard_size)
        if (shard_size != "1GB") != (folder / "model.safetensors.index.json").exists():
            raise ParityError(f"{folder}: transformers cut the weights in an unexpected way")
        tokenizer.save(str(folder / "tokenizer.json"))
        model = load(folder)
        tokens = tokenizer.encode(sample_text(), add_special_tokens=False).ids[:LOGIT_TOKENS]
        ours, theirs = beringia_logits(beringia, folder, tokens), transformers_logits(model, tokens)
        compare_logits(f"import {name}, logits", ours, theirs)
        compare_eval(f"import {name}", beringia, folder, model, text_file)


def arguments():
    """What the user asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beringia", required=True, type=Path, help="the binary to check")
    parser.add_argument("--run", type=Path, help="a trained run to check instead of a new one; needs --exported")
    parser.add_argument("--exported", type=Path, help="the folder that `beringia export RUN --to hf` wrote of it")
    options = parser.parse_args()
    if (options.run is None) != (options.exported is None):
        parser.error("--run and --exported belong together")
    if not options.beringia.is_file():
        parser.error(f"{options.beringia} is not there: build it with `cargo build --release`")
    return options


def main():
    """Both directions; 0 where they hold."""
    options = arguments()
    disable_progress_bar()
    beringia = options.beringia.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix="hf-parity-") as folder:
            work = Path(folder)
            check_import(beringia, work)
            if options.run:
                check_exported(beringia, options.run, options.exported, work)
            else:
                check_export(beringia, work)
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("parity with transformers holds in both directions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
