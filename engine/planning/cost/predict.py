"""How long a command is predicted to take, and how many joules."""

from collections.abc import Mapping

from tetrion.engine.messages import Denoise, StageCommand
from tetrion.engine.planning.cost.tables import CostTables
from tetrion.engine.stages import Stage


def predict_s(command: StageCommand, costs: CostTables) -> float:
    """Seconds the command will take once its devices are free."""
    cost = costs.cost(command.params.model, command.params.shape.cost_key)
    if isinstance(command, Denoise):
        return command.chunk_steps * cost.step_s(len(command.members))
    return cost.aux_s[command.stage]


def predict_j(command: StageCommand, costs: CostTables) -> float:
    """Joules the command will take over all of its members, as far as the profile knows or estimates them."""
    cost = costs.cost(command.params.model, command.params.shape.cost_key)
    return _joules(command, cost.step_by_degree_j, cost.aux_j) or 0.0


def measured_j(command: StageCommand, costs: CostTables) -> float | None:
    """The same as far as they were measured at this size; None: they were not."""
    cost = costs.profiles[command.params.model].measured(command.params.shape.cost_key)
    return None if cost is None else _joules(command, cost.step_j, cost.aux_j)


def _joules(command: StageCommand, step_j: Mapping[int, float], aux_j: Mapping[Stage, float]) -> float | None:
    if not isinstance(command, Denoise):
        return aux_j.get(command.stage)
    of_step_j = step_j.get(len(command.members))
    return None if of_step_j is None else command.chunk_steps * of_step_j
