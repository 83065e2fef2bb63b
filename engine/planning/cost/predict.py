"""How long a command is predicted to take, and how many joules."""

from tetrion.engine.messages import CopyLatents, Decode, Denoise, EncodePrompt, GroupCommand
from tetrion.engine.planning.cost.tables import CostTables


def predict_s(command: GroupCommand, costs: CostTables) -> float:
    """Seconds the command will take once its devices are free."""
    cost = costs.cost(command.params.model, command.params.shape.cost_key)
    match command:
        case EncodePrompt():
            return cost.encode_s
        case Denoise():
            return command.chunk_steps * cost.step_s(len(command.members))
        case Decode():
            return cost.decode_s
        case CopyLatents():
            return 0.0


def predict_j(command: GroupCommand, costs: CostTables) -> float:
    """Joules the command will take over all of its members, as far as the profile knows or estimates them."""
    cost = costs.cost(command.params.model, command.params.shape.cost_key)
    match command:
        case EncodePrompt():
            return cost.encode_j or 0.0
        case Denoise():
            return command.chunk_steps * cost.step_by_degree_j.get(len(command.members), 0.0)
        case Decode():
            return cost.decode_j or 0.0
        case CopyLatents():
            return 0.0
