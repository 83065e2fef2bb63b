"""Joules as the profile has them: what steps take, and at which degree they would be fastest.

Pure arithmetic on cost tables. What a table does not say is None: nothing is guessed from neighbouring sizes.
"""

from collections.abc import Iterable

from tetrion.engine.planning.cost.tables import CostTables


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
