"""How far a training has come that may be cut off."""

import json
import time
from pathlib import Path


class Progress:
    """How far a run has come that may be cut off: a file beside its model folder, gone when the run is done.

    `spent_s`: seconds of the run's budget that went into the weights in the folder. `done`: share of the transformer's
    schedule.
    """

    def __init__(self, output: Path) -> None:
        self._file = output.with_name(f"{output.name}-progress.json")
        self.is_resumed = self._file.exists()
        values = json.loads(self._file.read_text()) if self.is_resumed else {"spent_s": 0.0, "done": 0.0}
        self.done: float = values["done"]
        self._began = time.time() - values["spent_s"]

    @property
    def spent_s(self) -> float:
        return time.time() - self._began

    def save(self, done: float) -> None:
        """To be called when the model folder has been written."""
        self._file.write_text(json.dumps({"spent_s": round(self.spent_s, 1), "done": round(done, 4)}) + "\n")

    def finish(self) -> None:
        self._file.unlink(missing_ok=True)
