"""A measure in one file: all that a new one takes, beside its line in the registry and its test."""

import dataclasses
from typing import ClassVar

import numpy as np
import torch

from seerattention.evaluate import Picture, Prompts
from seerattention.evaluate.figures import over_density
from seerattention.evaluate.tables import Table, format_density


@dataclasses.dataclass
class ToyResult:
    setting: str
    density: float
    tokens: np.ndarray

    def to_dict(self):
        return {"setting": self.setting, "density": self.density, "mean": float(self.tokens.mean())}

    def arrays(self):
        return {"tokens": self.tokens}


@dataclasses.dataclass(frozen=True)
class Toy:
    """The mean token id that is predicted at the end of a prompt.

    ``runs`` and ``stop_at`` are for tests: what was run, and names of settings at which the process is interrupted.
    """

    name: ClassVar[str] = "toy"
    title: ClassVar[str] = "Toy"
    together: ClassVar[bool] = False
    runs: ClassVar[list] = []
    stop_at: ClassVar[list] = []

    samples: int = 2

    def lengths(self, asked):
        return asked

    def settings(self, asked):
        return asked

    def prepare(self, subject, length):
        ids = np.stack([subject.books[0][i * length : (i + 1) * length] for i in range(self.samples)])
        return Prompts(ids, {"prompts": ids}, ids.size)

    def run(self, subject, prompts, settings, advance=None):
        results = []
        for setting in settings:
            if setting.name in self.stop_at:
                raise KeyboardInterrupt
            self.runs.append((setting.name, prompts.content.shape[1]))
            with setting.applied(subject.model) as measurement, torch.no_grad():
                logits = subject.model(torch.from_numpy(prompts.content), logits_to_keep=1).logits
            results.append(ToyResult(setting.name, measurement.density, logits[:, 0].argmax(-1).numpy()))
            if advance is not None:
                advance(prompts.tokens)
        return results

    def restore(self, numbers, arrays):
        return ToyResult(numbers["setting"], numbers["density"], arrays["tokens"])

    def table(self, results):
        rows = [[r.setting, format_density(r.density), f"{r.tokens.mean():.1f}"] for r in results]
        return Table(["setting", "density", "mean token"], rows, "A toy.")

    def picture(self, results):
        means = [float(r.tokens.mean()) for r in results]
        return Picture(over_density(results, means, "mean token"), "A toy's picture.", "toy")
