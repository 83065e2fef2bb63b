"""The models that an engine serves, and the names that requests may call them by. Values; reads no weights."""

import msgspec

from tetrion.engine.config import EngineConfig, LoadFormat
from tetrion.engine.families.locate import hub_revision, resolve_model
from tetrion.engine.families.registry import read_model_spec
from tetrion.engine.model_spec import ModelSpec


class ServedModels(msgspec.Struct, frozen=True, kw_only=True):
    """`specs`: by name, the first one for requests that name none. `names`: every other name -> the model's: what the
    configuration calls it (a path, an id on the hub) and its aliases."""

    specs: dict[str, ModelSpec]
    names: dict[str, str] = {}

    @property
    def default(self) -> ModelSpec:
        return next(iter(self.specs.values()))

    def find(self, name: str) -> ModelSpec | None:
        """The model of that name, if there is one."""
        return self.specs.get(self.names.get(name, name))

    def aliases(self, model: str) -> tuple[str, ...]:
        """Other names of a model."""
        return tuple(name for name, named in self.names.items() if named == model)


def read_model(given: str, load_format: LoadFormat) -> ModelSpec:
    """The model that a user calls by its folder, an embedded model's name or an id on the hub. Where a revision is
    asked of the hub it is part of the model's name: two revisions are two models, each with its own cost tables.

    Raises CheckpointError."""
    spec = read_model_spec(resolve_model(given), load_format)
    revision = hub_revision(given)
    return spec if revision is None else msgspec.structs.replace(spec, name=f"{spec.name}@{revision}")


def serving(*specs: ModelSpec) -> ServedModels:
    """Models without other names."""
    return ServedModels(specs={spec.name: spec for spec in specs})


def read_served_models(config: EngineConfig) -> ServedModels:
    """What `config` names, each read from its folder. Raises CheckpointError for one that cannot be read, ValueError
    for two of one name, or an alias or a profile of a model that is not among them."""
    specs: dict[str, ModelSpec] = {}
    served = ServedModels(specs=specs, names={})
    for given in config.models:
        spec = read_model(given, config.load_format)
        if spec.name in specs:
            raise ValueError(
                f"models: {given!r} and {specs[spec.name].path!r} are both called {spec.name!r}; give one of them"
                ' another name in its preset.json ({"name": …})'
            )
        specs[spec.name] = spec
        if given != spec.name:
            served.names[given] = spec.name
    for alias, model in config.model_aliases.items():
        spec = _named(served, model, f"model_aliases.{alias}")
        if not alias or served.find(alias) not in (None, spec):
            raise ValueError(f"model_aliases: {alias!r} cannot be a name of {model!r}: it is another model's, or empty")
        if alias != spec.name:
            served.names[alias] = spec.name
    for model in config.profiles:
        _named(served, model, f"profiles.{model}")
    return served


def _named(served: ServedModels, name: str, field: str) -> ModelSpec:
    spec = served.find(name)
    if spec is None:
        raise ValueError(f"{field}: {name!r} is not among the models: {', '.join(served.specs)}")
    return spec
