"""What one step of a request is computed on, as counts. Values only: no torch, no families."""

import msgspec


class StepShape(msgspec.Struct, frozen=True, kw_only=True):
    """Size in pixels, and rows of each segment of the sequence.

    `image`: rows of the segment that is stepped; `text`: of each guidance branch (one entry a branch); `reference`:
    of pictures that are looked at.
    """

    width: int
    height: int
    image: int
    text: tuple[int, ...]
    reference: int = 0
    frames: int = 1

    @property
    def num_branches(self) -> int:
        """Evaluations of the network in a step, each with its own text."""
        return len(self.text)

    def rows(self, kind: str, branch: int = 0) -> int:
        """Rows of a segment, or of a slot's field: `one` has one."""
        match kind:
            case "text":
                return self.text[branch]
            case "image":
                return self.image
            case "reference":
                return self.reference
            case "one":
                return 1
        raise ValueError(f"no segment is called {kind!r}")

    def counts(self, segments: tuple[str, ...], branch: int = 0) -> tuple[int, ...]:
        """Rows of each of a family's segments, in its canonical order."""
        return tuple(self.rows(segment, branch) for segment in segments)


class Params(msgspec.Struct, frozen=True, kw_only=True):
    """All of a resolved request that its computation depends on but its texts."""

    model: str
    shape: StepShape
    num_steps: int
    guidance: float
    seed: int
    true_cfg_scale: float = 1.0
