"""Where `torch.compile` may write, and what it may not read.

PyTorch's compiler keeps pickles in a folder of a name that anybody can guess, and hands pickles to its workers. Here it
compiles in this process, with its caches off, and what it writes lies in a folder that only this user can open.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

#: Read by torch when it is imported. Caches are what would be unpickled; one thread means no workers.
SETTINGS = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
FOLDER_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

_folders: list[str] = []


def prepare() -> None:
    """Before torch is imported."""
    os.environ.update(SETTINGS)


def make_folder() -> str:
    """Before anything is compiled. The folder goes with the process, unless that is killed."""
    folder = tempfile.mkdtemp(prefix="beringia-compile-")  # mode 0700
    os.environ[FOLDER_VARIABLE] = folder
    # Precompiled headers go to the guessable folder whatever the variable says: that, too, must lie in here.
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    _folders.append(folder)
    atexit.register(remove_folder)
    return folder


def remove_folder() -> None:
    """Does nothing where there is none."""
    while _folders:
        shutil.rmtree(_folders.pop(), ignore_errors=True)
        tempfile.tempdir = None
