"""`python -m beringia_torch`: serves one agent over its socket, or lists the devices that torch sees."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from typing import NoReturn

from . import __version__, compiler
from .errors import EngineError
from .protocol import ConnectionEnded, write_frame


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="beringia_torch", description=__doc__)
    parser.add_argument("--version", action="version", version=f"beringia_torch {__version__}")
    parser.add_argument("--socket", help="Unix socket on which the agent listens")
    parser.add_argument("--device", default="cpu", help="cpu or a kind of accelerator; KIND:INDEX for one of several")
    parser.add_argument("--precision", choices=("auto", "f32", "bf16"), default="auto")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile")
    parser.add_argument("--threads", type=int, help="host threads; torch's own choice where not given")
    commands = parser.add_subparsers(dest="command", metavar="[devices]")
    devices = commands.add_parser("devices", help="print a JSON list of what torch sees")
    devices.add_argument("--measure", type=float, default=0.0, metavar="SECONDS", help="measure each device's rates")
    parsed = parser.parse_args()
    if parsed.command is None and parsed.socket is None:
        parser.error("--socket is needed, or the command devices")
    return parsed


def _prepare_environment() -> None:
    """What torch and transformers read when they are imported."""
    compiler.prepare()
    # A plug-in is imported when its device is asked for: one that is broken must not break the others.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    # A model's configuration must not make anybody fetch code, or anything else.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")


def main() -> int:
    """Gives the exit status."""
    arguments = _arguments()
    _prepare_environment()
    if arguments.command == "devices":
        return _list_devices(arguments)
    # Ctrl-C in the agent's terminal reaches this process too, but the agent decides when it is done with its engine.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a plug-in prints must not be taken for a result.
    sys.stdout = sys.stderr
    if int(os.environ.get("RANK", "0")) != 0:
        return _run(arguments, None)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(arguments.socket)
        except OSError as error:
            print(f"{arguments.socket}: {error}", file=sys.stderr)
            return 1
        return _run(arguments, connection)


def _run(arguments: argparse.Namespace, connection: socket.socket | None) -> int:
    try:
        _check_torch()
        from . import devices, distributed, server

        if arguments.threads is not None:
            import torch

            torch.set_num_threads(max(1, arguments.threads))
        device = devices.open_device(arguments.device)
        precision = devices.choose_precision(arguments.precision, device)
        group = distributed.open_group(device.torch_device)
        strict = arguments.compile == "on"
        if strict and group.size > 1:
            raise EngineError("device", device.text, "compile is off with several ranks")
        compiled = strict or (arguments.compile == "auto" and device.is_accelerator and group.size == 1)
        if compiled:
            compiler.make_folder()
        handler = server.Handler(device, group, precision, compiled, strict=strict)
        if connection is None:
            status = server.follow(handler, group)
        else:
            write_frame(connection, server.hello())
            status = server.serve(connection, handler, group)
    except ConnectionEnded:
        return 0
    except EngineError as error:
        print(error, file=sys.stderr)
        if connection is not None:
            write_frame(connection, {"error": error.as_json()})
        return 1
    if status == 0:
        group.close()
    if group.size > 1:
        _leave_at_once(status)
    return status


def _leave_at_once(status: int) -> NoReturn:
    """Ends a rank that has left its group.

    Threads of Gloo and autograd may still run when the interpreter takes its modules down, which aborts the process:
    torchrun would take that for a failure of all ranks.
    """
    sys.stderr.flush()
    os._exit(status)


def _check_torch() -> None:
    try:
        import torch  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a library that does not load, or a plug-in that torch brings in itself
        install = f"{sys.executable or 'python3'} -m pip install torch"
        raise EngineError("missing", "torch", f"it cannot be imported: {error}", install=install) from None
    from . import devices

    devices.check_torch_version()


def _list_devices(arguments: argparse.Namespace) -> int:
    try:
        _check_torch()
        from . import devices, measure
    except EngineError as error:
        print(f"{error}\nhint: {error.details.get('install', '')}", file=sys.stderr)
        return 1
    devices.import_installed_plug_ins()
    found = []
    for device in devices.all_devices():
        entry = {"device": device.text, **device.describe("")}
        del entry["precision"]
        entry["bf16"] = device.multiplies_bf16
        if arguments.measure > 0:
            entry.update(measure.measure(device, arguments.measure))
        found.append(entry)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
