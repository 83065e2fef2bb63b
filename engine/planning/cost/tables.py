"""The measured cost tables of all models that share the devices (`CostTables`). A value."""

import functools
from typing import Any

import msgspec

from tetrion.engine.planning.cost.profile import Profile, SizeCost


class CostTables(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """`profiles`: model -> its table."""

    profiles: dict[str, Profile]

    @functools.cached_property
    def derived(self) -> dict[Any, Any]:
        """Not part of the value: what others have worked out from it and keep for as long as it lives."""
        return {}

    def cost(self, model: str, key: str) -> SizeCost:
        """Everything about one model and the text of one `CostKey`. Raises KeyError for a model without a table,
        ValueError for another text."""
        return self.profiles[model].cost(key)


def only_table(profile: Profile) -> CostTables:
    """Of the only model, whose name is empty."""
    return CostTables(profiles={"": profile})
