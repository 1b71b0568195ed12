"""Several ranks are one engine: the same numbers, one state whatever their number, one end."""

from __future__ import annotations

import os
import pathlib
import signal
import tempfile
import unittest

import torch
from agent import TINY_LLAMA, Agent, Refused, distance, random_tokens

#: Run by every Python process, torchrun's included, before anything else: a pickle that is read is an error.
NO_PICKLE = """
import pickle, _pickle

class Refusing(pickle.Unpickler):
    def load(self):
        raise AssertionError("a pickle was read")

def refuse(*arguments, **options):
    raise AssertionError("a pickle was read")

pickle.load = pickle.loads = _pickle.load = _pickle.loads = refuse
pickle.Unpickler = _pickle.Unpickler = Refusing
"""


class Ranks(unittest.TestCase):
    """Two and three ranks of Gloo on the CPU against one."""

    def trained(self, agent: Agent, tied: bool) -> list[torch.Tensor]:
        """Gradient, loss and parameters of three AdamW steps with uneven batches, one smaller than the ranks."""
        agent.init({**TINY_LLAMA, "tie_word_embeddings": tied}, seed=3, micro_batch_samples=2)
        answer, gradient = agent.gradient(random_tokens(5, 12, 61, 9))
        found = [gradient, torch.tensor([answer["loss_nats"], answer["gradient_norm"]])]
        for step, samples in enumerate((5, 1, 8)):
            answer = agent.step(random_tokens(samples, 12, 61, step), 1e-2)
            self.assertEqual(answer["tokens"], 12 * samples)
            found += [torch.tensor([answer["loss_nats"], answer["gradient_norm"]]), agent.read()]
        found.append(torch.tensor([agent.evaluate(random_tokens(3, 12, 61, 7))["nats"]]))
        found.append(agent.logits(random_tokens(1, 12, 61, 7)[0], 61))
        found.append(agent.read((5, 9), (61 * 32 - 7, 61 * 32 + 999)))
        return found

    def test_ranks_compute_what_one_does(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            pathlib.Path(folder, "sitecustomize.py").write_text(NO_PICKLE)
            alone = Agent("--threads", "1", PYTHONPATH=folder)
            pair = Agent("--threads", "1", ranks=2, PYTHONPATH=folder)
            with alone, pair:
                self.assertEqual(pair.hello["rank_count"], 2)
                for tied in (False, True):
                    expected, found = self.trained(alone, tied), self.trained(pair, tied)
                    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
                        self.assertLess(distance(a, b), 1e-5, f"item {index}")
                self.check_errors_change_nothing(pair)
                state = pair.save()
                alone.restore(state)
                self.assertTrue(torch.equal(alone.save()["first"], state["first"]))
                self.check_three_resume(state, alone)
                pair.connection.close()
                pair.process.wait(60)
                self.assertEqual(pair.process.returncode, 0, pair.stderr())
        self.assertEqual(pair.output, b"")

    def check_three_resume(self, state: dict[str, torch.Tensor], alone: Agent) -> None:
        """A state of two ranks goes on with one and with three, until one of them dies and takes the others along."""
        tokens = random_tokens(4, 12, 61, 11)
        alone.step(tokens, 1e-2)
        with Agent("--threads", "1", ranks=3) as three:
            three.init({**TINY_LLAMA, "tie_word_embeddings": True})
            three.restore(state)
            resumed = three.save()
            for name in ("parameters", "first", "second"):
                self.assertTrue(torch.equal(resumed[name], state[name]), name)
            three.step(tokens, 1e-2)
            self.assertLess(distance(three.read(), alone.read()), 1e-5)
            ranks = [pid for pid in _descendants(three.process.pid) if _is_rank(pid)]
            self.assertEqual(len(ranks), 3)
            os.kill(next(pid for pid in ranks if pid != three.hello["pid"]), signal.SIGKILL)
            with self.assertRaises((EOFError, Refused, OSError)):
                for _ in range(100):
                    three.step(tokens, 1e-3)
            three.process.wait(60)
            self.assertNotEqual(three.process.returncode, 0)
            self.assertEqual([pid for pid in ranks if pathlib.Path(f"/proc/{pid}").exists()], [])

    def check_errors_change_nothing(self, pair: Agent) -> None:
        """All ranks come to the same verdict, and go on."""
        before = pair.save()
        for tokens in (random_tokens(2, 17, 61, 1), random_tokens(2, 8, 61, 1) + 60):
            with self.assertRaises(Refused) as caught:
                pair.step(tokens, 1e-2)
            self.assertEqual(caught.exception.kind, "shape")
        pair.write(torch.tensor([float("nan")]), (3, 4))
        with self.assertRaises(Refused) as caught:
            pair.step(torch.zeros(2, 9), 1e-2)
        self.assertEqual(caught.exception.kind, "not_finite")
        pair.write(before["parameters"][3:4], (3, 4))
        after = pair.save()
        for name in ("parameters", "first", "second"):
            self.assertTrue(torch.equal(after[name], before[name]), name)


def _descendants(pid: int) -> list[int]:
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parent = int(folder.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        if parent == pid:
            found += [int(folder.name), *_descendants(int(folder.name))]
    return found


def _is_rank(pid: int) -> bool:
    return b"beringia_torch" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()


if __name__ == "__main__":
    unittest.main()
