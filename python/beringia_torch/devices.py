"""Device strings, and everything that is asked of a device without naming its maker.

PyTorch gives every kind of device a module of the same shape (`torch.get_device_module`); plug-ins of makers register
one under their own name. Makers' names appear in the table below and nowhere else in this package.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .distributed import rank_count
from .errors import EngineError, first_line

#: The oldest torch that has `torch.accelerator` and FSDP2 under its public name.
TORCH_MINIMUM = (2, 6)


@dataclass(frozen=True)
class Kind:
    """What is known of one kind of device before it is asked."""

    maker: str
    #: Attribute of `torch.version` that names the software stack, and what to call that.
    stack: tuple[str, str] | None = None
    #: Module that brings the device into torch, and the command that installs it.
    plug_in: str | None = None
    install: str | None = None


def _pip(package: str) -> str:
    return f"{sys.executable or 'python3'} -m pip install {package}"


_ROCM = getattr(torch.version, "hip", None) is not None

KINDS: dict[str, Kind] = {
    "cpu": Kind(maker=""),
    "cuda": Kind(maker="AMD", stack=("hip", "ROCm")) if _ROCM else Kind(maker="NVIDIA", stack=("cuda", "CUDA")),
    "npu": Kind(maker="Huawei", plug_in="torch_npu", install=_pip("torch_npu")),
    "musa": Kind(maker="Moore Threads", plug_in="torch_musa", install=_pip("torch_musa")),
    "mlu": Kind(maker="Cambricon", plug_in="torch_mlu", install=_pip("torch_mlu")),
    "xpu": Kind(maker="Intel", stack=("xpu", "oneAPI")),
    "mps": Kind(maker="Apple"),
}


def check_torch_version(version: str | None = None) -> None:
    """Refuses a torch that lacks what this package calls."""
    found = version or torch.__version__
    match = re.match(r"(\d+)\.(\d+)", found)
    minimum = ".".join(map(str, TORCH_MINIMUM))
    if match is None or (int(match[1]), int(match[2])) < TORCH_MINIMUM:
        reason = f"torch {found} is installed, {minimum} or newer is needed"
        raise EngineError("missing", f"torch >= {minimum}", reason, install=_pip(f"--upgrade 'torch>={minimum}'"))


@dataclass(frozen=True)
class Device:
    """One device that exists, and its module."""

    text: str
    torch_device: torch.device
    module: ModuleType

    @property
    def type(self) -> str:
        """`cpu` or the kind of accelerator."""
        return self.torch_device.type

    @property
    def is_accelerator(self) -> bool:
        """Whether the device is something else than the host's processor."""
        return self.type != "cpu"

    def _ask(self, name: str, *arguments: Any, default: Any = None) -> Any:
        """Calls a function that a device's module may lack or refuse; nothing depends on its answer but a report."""
        function = getattr(self.module, name, None)
        if not callable(function):
            return default
        try:
            return function(*arguments)
        except Exception:  # noqa: BLE001 - a plug-in may raise anything; the default is the honest answer
            return default

    def synchronize(self) -> None:
        """Waits for everything that was started."""
        if self.is_accelerator:
            self.module.synchronize()

    def empty_cache(self) -> None:
        """Gives cached memory back to the device, so that a smaller attempt finds it in one piece."""
        if self.is_accelerator:
            self._ask("empty_cache")

    @property
    def computes(self) -> bool:
        """Whether it still does: after some errors a device refuses everything until its process is started anew."""
        try:
            self.synchronize()
            return (torch.ones(2, device=self.torch_device) + 1).sum().item() == 4.0
        except Exception:  # noqa: BLE001 - a device that fails does so in its maker's way
            return False

    @property
    def name(self) -> str:
        """What the maker calls it."""
        if not self.is_accelerator:
            return processor_name()
        return str(self._ask("get_device_name", self.torch_device.index or 0, default=self.type))

    @property
    def maker(self) -> str:
        """Who made it; empty where that is not known."""
        return KINDS[self.type].maker if self.type in KINDS else ""

    @property
    def driver(self) -> str:
        """Software stack with its version."""
        parts = [f"PyTorch {torch.__version__}"]
        kind = KINDS.get(self.type)
        if kind is not None and kind.stack is not None:
            version = getattr(torch.version, kind.stack[0], None)
            parts.insert(0, f"{kind.stack[1]} {version}" if version else kind.stack[1])
        if kind is not None and kind.plug_in is not None:
            version = getattr(sys.modules.get(kind.plug_in), "__version__", None)
            parts.insert(0, f"{kind.plug_in} {version}" if version else kind.plug_in)
        return ", ".join(parts)

    @property
    def memory_bytes(self) -> int | None:
        """Memory of the device, None where it does not tell."""
        if not self.is_accelerator:
            return host_memory_bytes()
        properties = self._ask("get_device_properties", self.torch_device.index or 0)
        total = getattr(properties, "total_memory", None) or self._ask("recommended_max_memory")
        return int(total) if total else None

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the device's own units multiply bf16: emulation would be slower than f32."""
        if not self.is_accelerator:
            return False
        supported = getattr(self.module, "is_bf16_supported", None)
        if callable(supported):
            with contextlib.suppress(Exception):
                try:
                    return bool(supported(including_emulation=False))
                except TypeError:
                    return bool(supported())
        return self.computes_bf16

    @property
    def computes_bf16(self) -> bool:
        """Whether a product in bf16 comes out right, by whatever means: tried."""
        try:
            with torch.autocast(self.type, dtype=torch.bfloat16):
                ones = torch.ones(16, 16, device=self.torch_device)
                product = ones @ ones
            return product.dtype == torch.bfloat16 and product[0, 0].item() == 16.0
        except (RuntimeError, TypeError, NotImplementedError):
            return False

    def describe(self, precision: str) -> dict[str, Any]:
        """The `device` of the answer to `init`."""
        return {
            "name": self.name,
            "maker": self.maker,
            "driver": self.driver,
            "memory_bytes": self.memory_bytes,
            "threads": torch.get_num_threads(),
            "precision": precision,
        }


def open_device(text: str, importer: Callable[[str], ModuleType] = importlib.import_module) -> Device:
    """The device of a string such as `cpu`, `npu` or `xpu:1`; its plug-in is imported now, and only its own."""
    type_name, _, index_text = text.partition(":")
    if index_text and type_name != "cpu" and rank_count() > 1:
        reason = f"names one device for {rank_count()} ranks, which take a device each: leave out the index"
        raise EngineError("device", text, reason)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", type_name) or not re.fullmatch(r"\d{0,4}", index_text):
        raise EngineError("device", text, f"is not a device string such as {', '.join(KINDS)}, or KIND:INDEX")
    kind = KINDS.get(type_name)
    if kind is not None and kind.plug_in is not None:
        _import_plug_in(text, kind, importer)
    try:
        torch_device = torch.device(type_name, int(index_text)) if index_text else torch.device(type_name)
        module = torch.get_device_module(torch_device)
    except (RuntimeError, AttributeError) as error:
        reason = f"torch {torch.__version__} does not know it ({first_line(error)}); {seen()}"
        raise EngineError("device", text, reason) from None
    return _opened(text, torch_device, module)


def _import_plug_in(text: str, kind: Kind, importer: Callable[[str], ModuleType]) -> None:
    assert kind.plug_in is not None and kind.install is not None
    try:
        importer(kind.plug_in)
    except ModuleNotFoundError as error:
        if error.name == kind.plug_in:
            reason = f"device {text} comes with the module {kind.plug_in}, which is not installed"
        else:
            reason = f"{kind.plug_in} is installed, but needs the module {error.name}"
        raise EngineError("missing", kind.plug_in, reason, install=kind.install) from None
    except Exception as error:  # noqa: BLE001 - a plug-in without its driver raises whatever its loader does
        reason = f"{kind.plug_in} is installed, but cannot be loaded: {first_line(error)}"
        raise EngineError("device", text, reason) from None


def _opened(text: str, torch_device: torch.device, module: ModuleType) -> Device:
    device = Device(text, torch_device, module)
    if not device.is_accelerator:
        return device
    if not device._ask("is_available", default=device._ask("device_count", default=0) > 0):
        raise EngineError("device", text, f"torch {torch.__version__} finds none of this kind; {seen()}")
    count = int(device._ask("device_count", default=1))
    index = torch_device.index
    if index is None:
        # Ranks of one machine take a device each.
        index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise EngineError("device", text, f"there are {count} of this kind, counted from 0; {seen()}")
    if callable(getattr(module, "set_device", None)):
        module.set_device(index)
    return Device(text, torch.device(torch_device.type, index), module)


def seen() -> str:
    """What torch sees, for an error's reason."""
    return "torch sees " + ", ".join(str(device.torch_device) for device in all_devices())


def all_devices() -> list[Device]:
    """The processor, then each accelerator of the kind that this torch was built for or a loaded plug-in brought."""
    devices = [Device("cpu", torch.device("cpu"), torch.get_device_module("cpu"))]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            device = torch.device(accelerator.type, index)
            devices.append(Device(str(device), device, module))
    return devices


def import_installed_plug_ins() -> None:
    """For listing devices: brings in every plug-in that is installed, and leaves out what does not load."""
    for kind in KINDS.values():
        if kind.plug_in is not None:
            try:
                importlib.import_module(kind.plug_in)
            except ModuleNotFoundError:
                continue
            except Exception as error:  # noqa: BLE001 - see `_import_plug_in`
                print(f"{kind.plug_in} cannot be loaded: {first_line(error)}", file=sys.stderr)


def choose_precision(choice: str, device: Device) -> str:
    """`f32` or `bf16` for `auto`, `f32` or `bf16`."""
    if choice == "auto":
        return "bf16" if device.multiplies_bf16 else "f32"
    if choice == "bf16" and not device.computes_bf16:
        raise EngineError("device", device.text, "it does not compute in bf16; use --precision f32")
    return choice


def processor_name() -> str:
    """What the maker calls the processor, where the system tells; otherwise its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def host_memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or its control group's where that is less."""
    try:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine
