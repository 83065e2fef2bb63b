"""Which cost table an engine starts with."""

from pathlib import Path

import msgspec
import pytest

from tests.engine.specs import make_spec
from tetrion.engine import config
from tetrion.engine.config import EngineConfig, parse_devices
from tetrion.engine.families.locate import resolve_model
from tetrion.engine.families.served import serving
from tetrion.engine.measure import profile_files
from tetrion.engine.measure.profile_files import cache_folder, chosen_profiles, profile_file_name
from tetrion.engine.planning.cost.profile import Profile

H100 = "NVIDIA H100 80GB HBM3"
SPEC = make_spec(name="flux1-dev", num_heads=24)


def write_profile(folder: Path, *degrees: int, heads: int = 24, ms: float = 10.0) -> Path:
    step_ms = {degree: ms / degree for degree in degrees}
    table = {"heads": heads, "classes": {"512x512": {"step_ms": step_ms, "encode_ms": 1, "decode_ms": 1}}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / profile_file_name(H100, "flux1-dev")
    path.write_bytes(msgspec.json.encode(msgspec.convert(table, Profile)))
    return path


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with four H100, an empty cache, and a folder in the place of the installed one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (profile_files, config):
        monkeypatch.setattr(module, "visible_gpus", lambda: (H100,) * 4)
    monkeypatch.setattr(profile_files, "committed_folder", lambda: tmp_path / "committed")
    return tmp_path / "committed"


def choose(devices: str, settings: EngineConfig | None = None) -> Profile | None:
    return chosen_profiles(parse_devices(devices), serving(SPEC), settings or EngineConfig()).get(SPEC.name)


def test_file_names() -> None:
    assert profile_file_name(H100, "flux1-dev") == "nvidia-h100-80gb-hbm3-flux1-dev.json"


def test_the_committed_table_of_these_gpus(committed: Path) -> None:
    assert choose("cuda:0,1") is None
    write_profile(committed, 1, 2)
    chosen = choose("cuda:0,1")
    assert chosen is not None and chosen.step_s("512x512", 2) == 0.005


def test_a_table_that_lacks_a_degree_is_not_taken(committed: Path) -> None:
    write_profile(committed, 1, 2)
    assert choose("cuda:0,1,2") is None


def test_two_workers_on_one_gpu_have_other_costs(committed: Path) -> None:
    write_profile(committed, 1, 2)
    assert choose("cuda:0,0") is None and choose("cpu:2") is None


def test_the_users_own_table_comes_first_unless_caches_are_off(committed: Path) -> None:
    write_profile(committed, 1, 2)
    write_profile(profile_files.cache_folder(), 1, 2, ms=30.0)
    own, installed = choose("cuda:0,1"), choose("cuda:0,1", EngineConfig(profile_cache=False))
    assert own is not None and own.step_s("512x512", 1) == 0.030
    assert installed is not None and installed.step_s("512x512", 1) == 0.010


def test_a_named_table_holds_everywhere(committed: Path, tmp_path: Path) -> None:
    path = write_profile(tmp_path / "mine", 1)
    chosen = choose("cpu:2", EngineConfig(profiles={SPEC.name: str(path)}))
    assert chosen is not None and chosen.degrees("512x512") == (1,)


def test_a_named_table_that_cannot_be_used(committed: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profiles: cannot read .*nothing\.json"):
        choose("cpu:2", EngineConfig(profiles={SPEC.name: str(tmp_path / "nothing.json")}))
    path = write_profile(tmp_path / "other", 1, heads=12)
    with pytest.raises(ValueError, match="model with 12 heads, 'flux1-dev' has 24"):
        choose("cpu:2", EngineConfig(profiles={SPEC.name: str(path)}))


def _no_user(*_: object) -> None:
    raise KeyError("getpwuid(): uid not found: 12345")


def test_a_user_without_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that is run under a number of its own: no line in /etc/passwd, no HOME."""
    monkeypatch.setattr("pwd.getpwuid", _no_user)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "tetrion" / "profiles"
    with pytest.raises(ValueError, match="model: '~/flux' is in a home that does not exist"):
        resolve_model("~/flux")
    with pytest.raises(ValueError, match="model: '~nobody-here/flux' is in a home that does not exist"):
        resolve_model("~nobody-here/flux")
