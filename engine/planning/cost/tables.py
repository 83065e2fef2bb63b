"""The measured cost tables of all models that share the devices (`CostTables`). A value."""

import msgspec

from tetrion.engine.planning.cost.profile import Profile, SizeCost


class CostTables(msgspec.Struct, frozen=True, kw_only=True):
    """`profiles`: model -> its table."""

    profiles: dict[str, Profile]

    def cost(self, model: str, key: str) -> SizeCost:
        """Everything about one model and the text of one `CostKey`. Raises KeyError for a model without a table,
        ValueError for another text."""
        return self.profiles[model].cost(key)


def only_table(profile: Profile) -> CostTables:
    """Of the only model, whose name is empty."""
    return CostTables(profiles={"": profile})
