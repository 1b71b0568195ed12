"""Rules of the package's text. No pickle: a file or peer that could make one run code would own the site."""

from __future__ import annotations

import ast
import unittest

from agent import PACKAGE_FOLDER

FORBIDDEN_CALLS = {
    "torch.save": "writes a pickle",
    "torch.load": "reads a pickle",
    "broadcast_object_list": "sends pickles",
    "all_gather_object": "sends pickles",
    "gather_object": "sends pickles",
    "scatter_object_list": "sends pickles",
    "send_object_list": "sends pickles",
}
FORBIDDEN_MODULES = {"pickle", "multiprocessing", "shelve", "marshal", "dill", "cloudpickle"}


def violations(text: str) -> list[str]:
    """What a source file does that it may not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [f"{name} runs text"] if name in ("eval", "exec") else []
            found += [f"{name} {why}" for call, why in FORBIDDEN_CALLS.items() if f".{name}".endswith(f".{call}")]
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"imports {module}" for module in modules if FORBIDDEN_MODULES & set(module.split("."))]
    return found


class Source(unittest.TestCase):
    def test_no_pickle(self) -> None:
        paths = sorted((PACKAGE_FOLDER / "beringia_torch").glob("*.py"))
        self.assertGreater(len(paths), 8)
        for path in paths:
            self.assertEqual(violations(path.read_text(encoding="utf-8")), [], path.name)

    def test_the_rule_finds_what_it_forbids(self) -> None:
        text = "import torch.multiprocessing\nfrom pickle import loads\ntorch.load(x)\ndist.broadcast_object_list(y)\n"
        self.assertEqual(len(violations(text)), 4)

    def test_lines_are_short_and_files_say_why_they_exist(self) -> None:
        for path in [*PACKAGE_FOLDER.glob("beringia_torch/*.py"), *PACKAGE_FOLDER.glob("tests/*.py")]:
            text = path.read_text(encoding="utf-8")
            self.assertTrue(text.startswith('"""'), path.name)
            for number, line in enumerate(text.splitlines(), 1):
                self.assertLessEqual(len(line), 120, f"{path.name}:{number}")


if __name__ == "__main__":
    unittest.main()
