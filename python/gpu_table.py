"""Measures the engines on an accelerator and writes the table for docs/benchmarks.md.

One binary (built with `--features cuda,vulkan`), this file and a folder of text are enough: no network, no compiler, no
package beyond the standard library; the PyTorch rows need an interpreter with PyTorch, which `--python` names.

    python3 python/gpu_table.py target/release/beringia --text FOLDER --size 100m --peak-tflops 989

For each engine: training tokens a second of `beringia measure` (median of alternating repeats), model FLOP utilisation, and
the accelerator's memory in use beyond what was in use before. Then one run over several of them with `beringia lab`, and a
profile of the native engine. What cannot be had here is a line that says why, not an omission.

Model FLOP utilisation is tokens/s * (6 N + 6 L h T) / peak: 6 FLOP a parameter and token for forward and backward (N without
the input embedding), and 12 L h T for the products of attention, halved because a causal model needs no future scores
(PaLM, Chowdhery et al. 2022, appendix B, with the causal half).
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ENGINES = ("cuda:bf16", "vulkan:bf16", "wgpu:f32", "torch:cuda:bf16:eager", "torch:cuda:bf16:compiled")
MEMORY_QUERY = ("nvidia-smi", "--query-gpu=memory.used,name,driver_version", "--format=csv,noheader,nounits")
POLL_SECONDS = 0.2


class Row:
    """One engine as it is asked for: `torch:cuda:bf16:compiled` is engine torch:cuda, bf16, with torch.compile."""

    def __init__(self, text):
        words = text.split(":")
        self.text = text
        self.compile = {"compiled": "on", "eager": "off"}.get(words[-1])
        if self.compile:
            words.pop()
        self.precision = words.pop() if words[-1] in ("bf16", "f32") else "auto"
        self.engine = ":".join(words)
        self.speeds = []
        self.memory_mib = None
        self.problem = None

    def arguments(self):
        found = ["--engine", self.engine, "--precision", self.precision]
        return found + (["--torch-compile", self.compile] if self.compile else [])


class Memory:
    """The most memory in use on the first accelerator while a command runs, MiB; None without nvidia-smi."""

    def __enter__(self):
        self.before, self.most = self.used(), None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    @staticmethod
    def used():
        used = (first_line(MEMORY_QUERY) or "").split(",")[0]
        # Some devices answer `[N/A]`.
        return int(used) if used.isdigit() else None

    def watch(self):
        while self.before is not None and not self.done.wait(POLL_SECONDS):
            used = self.used()
            if used is not None:
                self.most = max(self.most or 0, used - self.before)


def first_line(command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def run(command, environment=None, timeout=None):
    """The object that a command prints, or the reason why it did not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"not done after {timeout:.0f} s"
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or done.stderr.splitlines()
        return None, (lines[-1] if lines else f"exit code {done.returncode}").removeprefix("error: ")
    return json.loads(done.stdout), None


def cuda_of_packages(python):
    """Where NVRTC and CUDA's headers lie in the packages that PyTorch installs; nothing where a toolkit is set up."""
    if os.environ.get("CUDA_PATH"):
        return {}
    place = first_line((python, "-c", "import nvidia; print(list(nvidia.__path__)[0])"))
    for root, library in (("cu13", "cu13/lib"), ("cuda_runtime", "cuda_nvrtc/lib")):
        if place and Path(place, root, "include", "cuda_fp16.h").exists():
            paths = [str(Path(place, library)), os.environ.get("LD_LIBRARY_PATH")]
            return {"CUDA_PATH": str(Path(place, root)), "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
    return {}


def measure(options, folder, rows, environment, write):
    for repeat in range(options.repeats):
        for row in rows:
            if row.problem:
                continue
            command = [options.binary, "--json", "measure", folder, "--samples", str(options.samples)]
            with Memory() as memory:
                command += ["--seconds", str(options.seconds), *row.arguments()]
                found, row.problem = run(command, environment, options.timeout)
            if found:
                row.speeds.append(found["tokens_per_second"])
                row.memory_mib = max(filter(None, (row.memory_mib, memory.most)), default=None)
            print(f"{row.text} {repeat + 1}: {found or row.problem}", file=sys.stderr)
            # A machine that is lent for minutes may take itself back: what is known is on the disk.
            write()


def model_flop_per_token(folder):
    """FLOP of one trained token, from the shape in run.toml."""
    shape, section = {}, None
    for line in Path(folder, "run.toml").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif "=" in line:
            key, value = line.split("#")[0].split("=", 1)
            shape[section, key.strip()] = value.strip()
    of = lambda key: int(shape["model", key])  # noqa: E731
    hidden, layers, heads = of("hidden_size"), of("num_hidden_layers"), of("num_attention_heads")
    keys = of("num_key_value_heads") * hidden // heads
    block = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * of("intermediate_size")
    parameters = layers * block + of("vocab_size") * hidden
    return 6 * parameters + 6 * layers * hidden * int(shape["data", "sequence_length"])


def table(rows, flop_per_token, peak_tflops):
    lines = ["| engine | precision | tokens/s | spread | MFU | memory |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        name = f"{row.engine} {'compiled' if row.compile == 'on' else 'eager'}" if row.compile else row.engine
        if not row.speeds:
            lines.append(f"| {name} | {row.precision} | not measured: {row.problem} | | | |")
            continue
        speed = statistics.median(row.speeds)
        spread = f"{min(row.speeds):,.0f} to {max(row.speeds):,.0f}"
        mfu = f"{speed * flop_per_token / (peak_tflops * 1e12):.1%}" if peak_tflops else "-"
        memory = f"{row.memory_mib:,} MiB" if row.memory_mib else "-"
        lines.append(f"| {name} | {row.precision} | {speed:,.0f} | {spread} | {mfu} | {memory} |")
    return "\n".join(lines)


def mixed(options, rows, environment, folder):
    sites = [site for site in options.mixed.split(",") if site]
    working = {row.engine for row in rows if row.speeds} | {"flex"}
    sites = [site for site in sites if site in working]
    if len(sites) < 2:
        return f"Mixed run: not made, of {options.mixed} only {', '.join(sites)} works here."
    command = [options.binary, "--json", "lab", "--data", options.text, "--size", options.size, "--folder", folder]
    command += ["--rounds", str(options.rounds), "--set", f"train.batch_samples={options.samples * 2}"]
    for site in sites:
        command += ["--site", site]
    found, problem = run(command, environment, options.timeout)
    if problem:
        logs = Path(options.out).with_suffix(".lab")
        shutil.copytree(folder, logs, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
        problem += f" (logs: {logs})"
        return f"Mixed run of {' + '.join(sites)}: {problem}"
    lines = [
        f"Mixed run of {' + '.join(sites)}: identical {str(found['identical']).lower()}, {found['rounds']} rounds, "
        f"{found['utilisation']:.1%} of the sum alone (sites that share one device cannot reach the sum).",
        "",
        "| site | tokens/s | alone | share | idle |",
        "|---|---:|---:|---:|---:|",
    ]
    for site in found["sites"]:
        idle = site["idle_seconds"] / max(site["idle_seconds"] + site["compute_seconds"], 1e-9)
        lines.append(
            f"| {site['engine']} | {site['tokens_per_second']:,.0f} | {site['tokens_per_second_alone']:,.0f} | "
            f"{site['share']:.1%} | {idle:.1%} |"
        )
    return "\n".join(lines)


def profile(options, folder, rows, environment):
    """CubeCL's own profile of the native engine, written beside the table for a person to read."""
    native = next((row for row in rows if row.speeds and row.engine.split(":")[0] in ("cuda", "vulkan", "wgpu")), None)
    if native is None:
        return "Profile: no native accelerator engine works here."
    log = Path(options.out).with_suffix(".profile.log")
    settings = {"CUBECL_DEBUG_LOG": str(log), "CUBECL_DEBUG_OPTION": "profile-full"}
    command = [options.binary, "--json", "measure", folder, "--samples", str(options.samples), "--seconds", "1"]
    _, problem = run([*command, *native.arguments()], {**environment, **settings}, options.timeout)
    if problem or not log.exists():
        return f"Profile of {native.engine}: {problem or 'CubeCL wrote none'}."
    return f"Profile of {native.engine}: {log} ({log.stat().st_size:,} bytes)."


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", help="the beringia binary")
    parser.add_argument("--text", required=True, help="folder of text for the tokenizer and the batches")
    parser.add_argument("--size", default="100m", help="size of the model, as beringia init takes it")
    parser.add_argument("--engines", nargs="+", default=ENGINES, metavar="ENGINE[:PRECISION][:eager|compiled]")
    parser.add_argument("--mixed", default="cuda,torch:cuda,flex", help="engines of the mixed run")
    parser.add_argument("--samples", type=int, default=16, help="samples in a step")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=180.0, help="longest time of one measurement or of the mixed run")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the mixed run")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device; an H100 SXM or H200 has 989")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has PyTorch")
    parser.add_argument("--out", default="gpu-table.md", help="where the table goes")
    return parser.parse_args()


def main():
    options = parse()
    environment = {**os.environ, "BERINGIA_PYTHON": options.python, **cuda_of_packages(options.python)}
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place, "run"))
        setting = f"train.micro_batch_samples={options.samples}"
        made, problem = run(
            [options.binary, "--json", "init", folder, "--data", options.text, "--size", options.size]
            + ["--set", f"train.batch_samples={options.samples}", "--set", setting]
        )
        if problem:
            sys.exit(f"init: {problem}")
        rows = [Row(text) for text in options.engines]
        flop_per_token = model_flop_per_token(folder)

        def write(*texts):
            found = "\n\n".join([*texts[:2], table(rows, flop_per_token, options.peak_tflops), *texts[2:]])
            Path(options.out).write_text(found + "\n", encoding="utf-8")
            return found

        measure(options, folder, rows, environment, write)
        devices, problem = run([options.binary, "--json", "devices", "--no-measure"], environment)
        listed = devices["devices"] if devices else []
        named = "; ".join(f"{d['info']['engine']} = {d['info']['name']} ({d['info']['driver']})" for d in listed)
        torch = first_line((options.python, "-c", "import torch; print(torch.__version__)"))
        head = (
            f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} processors; {named or problem}; "
            f"{first_line((options.binary, '--version'))}, PyTorch {torch or 'absent'}, "
            f"{first_line(MEMORY_QUERY) or 'no nvidia-smi'}.",
            f"Model: {made['parameters']:,} parameters, {options.samples} samples a step; median of {options.repeats}.",
        )
        write(*head)
        together = mixed(options, rows, environment, str(Path(place, "lab")))
        write(*head, together)
        print(write(*head, together, profile(options, folder, rows, environment)))


if __name__ == "__main__":
    main()
