"""Joules as the profile has them: what a stage takes, and what the fastest plan of a request would have taken.

Pure arithmetic on a cost table. What the table does not say is None: nothing is guessed from neighbouring sizes.
"""

from collections.abc import Iterable

from tetrion.engine.messages import CopyLatents, Decode, Denoise, EncodePrompt, GroupCommand
from tetrion.engine.planning.profile import ClassCost, Profile


def command_j(command: GroupCommand, profile: Profile) -> float | None:
    """Joules of a command over all of its members."""
    if isinstance(command, CopyLatents):
        return None
    cost = _known(profile, command.params.shape.width, command.params.shape.height)
    if cost is None:
        return None
    match command:
        case EncodePrompt():
            return cost.encode_j
        case Denoise():
            step_j = cost.step_j.get(len(command.members))
            return None if step_j is None else step_j * command.chunk_steps
        case Decode():
            return cost.decode_j


def steps_j(profile: Profile, size: tuple[int, int], degrees: Iterable[int]) -> float | None:
    """Joules of denoising steps at these degrees."""
    cost = _known(profile, *size)
    table = {} if cost is None else cost.step_j
    known = [table.get(degree) for degree in degrees]
    return None if None in known else sum(joules for joules in known if joules is not None)


def fastest_degree(profile: Profile, size: tuple[int, int], num_devices: int) -> int:
    """The degree with the shortest step that so many devices can form; of equals the smallest."""
    cost = profile.cost(*size)
    degrees = [degree for degree in cost.degrees if degree <= num_devices] or cost.degrees[:1]
    return min(degrees, key=lambda degree: (cost.step_by_degree_s[degree], degree))


def _known(profile: Profile, width: int, height: int) -> ClassCost | None:
    return profile.classes.get(f"{width}x{height}") or profile.classes.get(f"{height}x{width}")
