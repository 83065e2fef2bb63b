"""What the engine asks of a family of models: the `Family` protocol. The worker's side is `models/`."""

from pathlib import Path
from typing import Protocol

from tetrion.engine.config import LoadFormat
from tetrion.engine.model_spec import ModelSpec
from tetrion.engine.request import ImageRequest
from tetrion.engine.shape import StepShape


class Family(Protocol):
    def read(self, folder: Path, load_format: LoadFormat) -> ModelSpec:
        """The model in a checkpoint folder, whose pipeline is known to be of this family.

        Raises CheckpointError naming the first thing that is missing or not supported.
        """

    def check(self, spec: ModelSpec, request: ImageRequest) -> None:
        """Raises RequestError for values that do not go together, or that this family bounds more narrowly. Each by
        itself is settled and within the bounds that hold for all, and is among the spec's `inputs`."""

    def shape(self, spec: ModelSpec, request: ImageRequest) -> StepShape:
        """Of a request that was checked, with its size settled."""
