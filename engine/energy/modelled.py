"""Joules as the profile has them: what a stage takes, and what the fastest plan of a request would have taken.

Pure arithmetic on cost tables. What a table does not say is None: nothing is guessed from neighbouring sizes.
"""

from collections.abc import Iterable

from tetrion.engine.messages import CopyLatents, Decode, Denoise, EncodePrompt, GroupCommand
from tetrion.engine.planning.cost.tables import CostTables


def command_j(command: GroupCommand, costs: CostTables) -> float | None:
    """Joules of a command over all of its members."""
    if isinstance(command, CopyLatents):
        return None
    cost = costs.profiles[command.params.model].measured(command.params.shape.cost_key)
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


def steps_j(costs: CostTables, model: str, key: str, degrees: Iterable[int]) -> float | None:
    """Joules of denoising steps at these degrees."""
    cost = costs.profiles[model].measured(key)
    table = {} if cost is None else cost.step_j
    known = [table.get(degree) for degree in degrees]
    return None if None in known else sum(joules for joules in known if joules is not None)


def fastest_degree(costs: CostTables, model: str, key: str, num_devices: int) -> int:
    """The degree with the shortest step that so many devices can form; of equals the smallest."""
    cost = costs.cost(model, key)
    degrees = [degree for degree in cost.degrees if degree <= num_devices] or cost.degrees[:1]
    return min(degrees, key=lambda degree: (cost.step_by_degree_s[degree], degree))
