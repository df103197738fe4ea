"""A task for other processes, which import this file and little else."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

from cradle_pyro.evaluation.processes import Failure


class FakeTask(NamedTuple):
    """A task that leaves a file, or dies."""

    path: Path
    dies: bool = False

    @property
    def names(self):
        return [self.path.name]

    def run(self):
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        self.path.write_text(str(os.getpid()))

    def forget(self):
        pass

    def failures(self):
        if not self.path.exists():
            yield Failure(self.path.name, "it ended without a reason")
