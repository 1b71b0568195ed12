"""Devices of any maker, by the same path: no maker's own call, plug-ins imported when asked for, missing ones named."""

from __future__ import annotations

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
import unittest
from unittest import mock

import torch
from agent import PACKAGE_FOLDER, Agent, Refused, environment

from beringia_torch import devices
from beringia_torch.errors import EngineError

SOURCES = sorted((PACKAGE_FOLDER / "beringia_torch").glob("*.py"))
MAKERS = ("cuda", "npu", "musa", "mlu", "xpu", "mps", "hip", "rocm")

#: A plug-in as makers ship it: its import names the PrivateUse1 backend and registers the device's module. The module
#: writes down what is asked of it, and computes on the CPU.
PLUG_IN = """
    import pathlib, sys, types
    import torch

    log = pathlib.Path(__file__).with_name("asked")
    module = types.ModuleType("torch.npu")

    def answer(name, value):
        def asked(*arguments):
            with log.open("a") as file:
                file.write(f"{name}{arguments}\\n")
            return value
        setattr(module, name, asked)

    answer("is_available", AVAILABLE)
    answer("device_count", 2)
    answer("current_device", 0)
    answer("set_device", None)
    answer("synchronize", None)
    answer("empty_cache", None)
    answer("get_device_name", "Stub 910")
    answer("get_device_properties", types.SimpleNamespace(total_memory=1 << 36))
    answer("is_bf16_supported", False)
    answer("get_amp_supported_dtype", [torch.bfloat16])
    torch.utils.rename_privateuse1_backend("npu")
    torch._register_device_module("npu", module)
    __version__ = "9.9"
"""

OPEN = """
    import sys
    from beringia_torch import devices
    device = devices.open_device(sys.argv[1])
    print(device.torch_device, "|", device.name, "|", device.maker, "|", device.driver, "|", device.memory_bytes, "|",
          devices.choose_precision("auto", device))
    device.synchronize()
    device.empty_cache()
"""


def names_in(path: pathlib.Path) -> list[tuple[int, str]]:
    """Every attribute path and every string of a source file, documentation left out, with its line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            found.append((node.lineno, ast.unparse(node)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            found.append((node.lineno, node.value))
    return found


def makers_in(name: str) -> set[str]:
    """Makers' words in an attribute path or a string."""
    return set(MAKERS) & set(re.findall(r"[a-z]+", name.lower()))


#: Each of these is a call that only one maker's devices take.
PLANTED = (
    "torch.cuda.synchronize()",
    "place = 'cuda'",
    "model.cuda()",
    "on_device = x.is_cuda",
    "x.to('cuda:0')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "place = f'npu:{index}'",
)


class Source(unittest.TestCase):
    """What the package's text may not contain."""

    def test_no_maker_is_named_outside_the_table(self) -> None:
        text = (PACKAGE_FOLDER / "beringia_torch" / "devices.py").read_text(encoding="utf-8")
        assignments = [node for node in ast.parse(text).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
        table = next(node for node in assignments if ast.unparse(node).startswith("KINDS"))
        rocm = next(node for node in assignments if ast.unparse(node).startswith("_ROCM"))
        allowed = {*range(table.lineno, (table.end_lineno or 0) + 1), rocm.lineno}
        self.assertGreater(len(SOURCES), 8)
        for path in SOURCES:
            for line, name in names_in(path):
                if path.name == "devices.py" and line in allowed:
                    continue
                with self.subTest(path=path.name, line=line):
                    self.assertEqual(makers_in(name), set(), name)

    def test_the_scan_finds_what_it_looks_for(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "wrong.py")
            path.write_text('"""cuda"""\n' + "\n".join(PLANTED))
            found = {line for line, name in names_in(path) if makers_in(name)}
        self.assertEqual(found, set(range(2, 2 + len(PLANTED))))
        for harmless in ("barracuda", "maps", "xpuzzle"):
            self.assertEqual(makers_in(harmless), set())


class PlugIns(unittest.TestCase):
    """The path a maker's plug-in takes, with a stand-in for one."""

    def setUp(self) -> None:
        self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

    def install(self, text: str) -> None:
        """Puts a module `torch_npu` on the path."""
        (self.folder / "torch_npu.py").write_text(textwrap.dedent(text))

    def open(self, device: str) -> subprocess.CompletedProcess[str]:
        """A process of its own: a backend can be renamed once."""
        command = [sys.executable, "-c", textwrap.dedent(OPEN), device]
        variables = environment(PYTHONPATH=str(self.folder))
        return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=60, check=False)

    def test_a_plug_in_brings_its_device(self) -> None:
        self.install(PLUG_IN.replace("AVAILABLE", "True"))
        opened = self.open("npu:1")
        self.assertEqual(opened.returncode, 0, opened.stderr)
        expected = f"npu:1 | Stub 910 | Huawei | torch_npu 9.9, PyTorch {torch.__version__} | {1 << 36} | f32\n"
        self.assertEqual(opened.stdout, expected)
        asked = (self.folder / "asked").read_text()
        for call in ("is_available()", "set_device(1,)", "get_device_name(1,)", "synchronize()", "empty_cache()"):
            self.assertIn(call, asked)

    def test_a_plug_in_is_not_imported_for_another_device(self) -> None:
        self.install("raise SystemExit('imported')")
        opened = self.open("cpu")
        self.assertEqual(opened.returncode, 0, opened.stderr)
        self.assertIn("imported", self.open("npu").stderr)

    def test_a_device_that_is_not_there(self) -> None:
        self.install(PLUG_IN.replace("AVAILABLE", "False"))
        opened = self.open("npu")
        self.assertIn("finds none of this kind; torch sees cpu", opened.stderr)
        self.install(PLUG_IN.replace("AVAILABLE", "True"))
        self.assertIn("there are 2 of this kind, counted from 0", self.open("npu:2").stderr)

    def test_plug_ins_that_do_not_load(self) -> None:
        self.install("import no_such_driver_module")
        self.assertIn("torch_npu is installed, but needs the module no_such_driver_module", self.open("npu").stderr)
        self.install("raise OSError('libascend.so: cannot open')")
        self.assertIn("cannot be loaded: libascend.so: cannot open", self.open("npu").stderr)


    def test_a_broken_plug_in_that_torch_would_import_by_itself(self) -> None:
        (self.folder / "broken_plug_in.py").write_text("raise RuntimeError('no driver')")
        record = self.folder / "broken_plug_in-1.0.dist-info"
        record.mkdir()
        (record / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plug-in\nVersion: 1.0\n")
        (record / "entry_points.txt").write_text("[torch.backends]\nbroken = broken_plug_in:load\n")
        listing = [sys.executable, "-m", "beringia_torch", "devices"]

        def listed(**more: str) -> subprocess.CompletedProcess[str]:
            variables = environment(PYTHONPATH=str(self.folder), **more)
            return subprocess.run(listing, capture_output=True, text=True, env=variables, timeout=60, check=False)

        found = listed()
        self.assertEqual((found.returncode, found.stderr), (0, ""))
        self.assertEqual(json.loads(found.stdout)[0]["device"], "cpu")
        wanted = listed(TORCH_DEVICE_BACKEND_AUTOLOAD="1")
        self.assertEqual(wanted.returncode, 1)
        self.assertRegex(wanted.stderr, r"(?s)^torch: it cannot be imported: .*\nhint: .* install torch\n$")


class Missing(unittest.TestCase):
    """What is told where something is absent."""

    def test_absent_plug_ins_are_named_with_the_command(self) -> None:
        for text, module in (("npu", "torch_npu"), ("musa:3", "torch_musa"), ("mlu", "torch_mlu")):
            with self.subTest(text), self.assertRaises(EngineError) as caught:
                devices.open_device(text)
            error = caught.exception.as_json()
            self.assertEqual((error["kind"], error["what"]), ("missing", module))
            self.assertEqual(error["install"], f"{sys.executable} -m pip install {module}")
        with self.assertRaises(Refused) as refused, Agent("--device", "npu"):
            pass
        self.assertEqual((refused.exception.kind, refused.exception.what), ("missing", "torch_npu"))
        self.assertEqual(refused.exception.install, f"{sys.executable} -m pip install torch_npu")

    def test_absent_devices_say_what_is_there(self) -> None:
        absent = [text for text in ("cuda", "xpu", "mps") if not torch.get_device_module(text).is_available()]
        for text in absent:
            with self.subTest(text), self.assertRaises(EngineError) as caught:
                devices.open_device(text)
            self.assertEqual(caught.exception.kind, "device")
            self.assertIn("torch sees cpu", caught.exception.reason)
        for text in ("quantum", "", "CPU", "cpu:x", "cuda:-1", "cuda:99999", "a b", "import os"):
            with self.subTest(text), self.assertRaises(EngineError) as caught:
                devices.open_device(text)
            self.assertEqual(caught.exception.kind, "device")

    def test_ranks_do_not_share_one_device(self) -> None:
        with mock.patch.dict(os.environ, WORLD_SIZE="2"), self.assertRaises(EngineError) as caught:
            devices.open_device("npu:1")
        self.assertEqual(caught.exception.kind, "device")
        self.assertIn("leave out the index", caught.exception.reason)

    def test_an_old_torch_is_named_with_both_versions(self) -> None:
        for old in ("2.5.1", "1.13.0+cu117", "nightly"):
            with self.assertRaises(EngineError) as caught:
                devices.check_torch_version(old)
            error = caught.exception.as_json()
            self.assertEqual((error["kind"], error["what"]), ("missing", "torch >= 2.6"))
            self.assertIn(old, error["reason"])
            self.assertIn("2.6", error["reason"])
            self.assertEqual(error["install"], f"{sys.executable} -m pip install --upgrade 'torch>=2.6'")
        for good in ("2.6.0", "2.15.0+cu132", "3.0.0a0+git"):
            devices.check_torch_version(good)

    def test_an_absent_or_old_torch_is_told_over_the_socket(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            stub = pathlib.Path(folder, "torch.py")
            stub.write_text("raise ImportError('No module named torch')")
            with self.assertRaises(Refused) as caught, Agent(PYTHONPATH=folder):
                pass
            self.assertEqual((caught.exception.kind, caught.exception.what), ("missing", "torch"))
            stub.write_text("__version__ = '2.4.1'\nversion = None\n")
            with self.assertRaises(Refused) as caught, Agent(PYTHONPATH=folder):
                pass
            self.assertEqual((caught.exception.kind, caught.exception.what), ("missing", "torch >= 2.6"))
            self.assertIn("2.4.1", caught.exception.reason)


class Listing(unittest.TestCase):
    """`python -m beringia_torch devices`, and what is printed besides."""

    def printed(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "beringia_torch", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=True).stdout

    def test_devices_are_listed_and_measured(self) -> None:
        listed = json.loads(self.printed("devices", "--measure", "0.3"))
        cpu = listed[0]
        self.assertEqual(cpu["device"], "cpu")
        self.assertGreater(cpu["memory_bytes"], 1 << 28)
        self.assertGreater(cpu["matrix_f32_tflops"], 0)
        self.assertGreater(cpu["copy_gigabytes_per_second"], 0)
        self.assertEqual((cpu["bf16"], cpu["maker"], cpu["threads"]), (False, "", 1))
        self.assertEqual(len(listed), 1 + torch.accelerator.device_count())

    def test_version(self) -> None:
        self.assertRegex(self.printed("--version"), r"^beringia_torch \d+\.\d+\.\d+\n$")


if __name__ == "__main__":
    unittest.main()
