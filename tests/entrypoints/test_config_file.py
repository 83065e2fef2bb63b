"""Options from a file and the environment, as the real command takes them."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.entrypoints.conftest import FakeEngine
from tetrion.entrypoints import cli
from tetrion.entrypoints.config_file import OWN, key_of, template, variable_of
from tetrion.entrypoints.http import server
from tetrion.entrypoints.http.server import ServeOptions

Serve = Callable[..., tuple[ServeOptions, FakeEngine]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Serve:
    """Runs `tetrion serve --config` with such a file and such options; what the server would have been started with."""

    def serve(text: str, *options: str) -> tuple[ServeOptions, FakeEngine]:
        file, started = tmp_path / "server.yaml", []
        file.write_text(text)

        async def start(options: ServeOptions, engine: FakeEngine) -> int:
            started.append((options, engine))
            return 0

        monkeypatch.setattr(server, "serve", start)
        assert cli.run(["serve", "--config", str(file), *options], FakeEngine) == 0  # type: ignore[arg-type]
        return started[0]

    return serve


def test_every_kind_of_value(serve: Serve) -> None:
    options, engine = serve(
        """
        port: 8123
        keep-alive-s: 7.5
        access_log: true
        public_url: https://pictures.example
        allow_origin: [http://a, http://b]
        allowed_host: one.example
        api_key: ["team:secret"]
        ssl_certfile:
        model: shapes
        devices: cpu:3
        queue_timeout_s: 30
        admission: all
        model_alias: {painter: shapes}
        planner:
          lead_s: 0.01
          tenant_weights: {team: 2}
          energy: balanced
        """
    )
    assert (options.port, options.keep_alive_s, options.access_log) == (8123, 7.5, True)
    assert options.public_url == "https://pictures.example" and options.ssl_certfile is None
    assert options.allow_origins == ("http://a", "http://b") and options.allowed_hosts == ("one.example",)
    assert options.api_keys == ("team:secret",)
    config = engine.config
    assert config.devices == "cpu:3" and config.queue_timeout_s == 30 and config.model_aliases == {"painter": "shapes"}
    assert config.planner.lead_s == 0.01 and config.planner.tenant_weights == {"team": 2}
    assert config.planner.admission == "all" and config.planner.options.energy == "balanced"


def test_the_command_line_counts_more_than_the_environment_and_that_more_than_the_file(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TETRION_MAX_N", "3")
    monkeypatch.setenv("TETRION_MAX_STEPS", "30")
    monkeypatch.setenv("TETRION_API_KEY", "one two:2")
    monkeypatch.setenv("TETRION_DEVICES", "cpu:4")
    monkeypatch.setenv("TETRION_ACCESS_LOG", "1")
    options, engine = serve("max_n: 2\nmax_steps: 20\nstore_mb: 10\ndevices: cpu:1\n", "--max-n", "4")
    assert (options.max_n, options.max_steps, options.store_mb) == (4, 30, 10)
    assert options.api_keys == ("one", "two:2") and options.access_log and engine.config.devices == "cpu:4"


def test_an_empty_file_changes_nothing(serve: Serve) -> None:
    assert serve("")[0] == serve("# nothing\n")[0] == ServeOptions()


def test_the_file_may_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text("port: 5")
    monkeypatch.setenv("TETRION_CONFIG", str(tmp_path / "a.yaml"))
    assert cli.run(["serve", "--print-config"]) == 0
    assert "port: 5  # file" in capsys.readouterr().out.replace('"', "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key 'prot'; there are: access_log, admission, allow_origin"),
        ("3: 1", "unknown key 3; there are: "),
        ("config: other.yaml", "unknown key 'config'"),
        ("port: 70000", "port: 70000 is not in the range 0<=x<=65535"),
        ("port: many", "port: 'many' is not a valid integer"),
        ("port: [1, 2]", "port: expected a text or number, got [1, 2]"),
        ("port: true", "port: expected a text or number, got True (quote what YAML does not read as text)"),
        ("admission: some", "admission: 'some' is not one of 'reject-hopeless', 'all'"),
        ("access_log: 1", "access_log: expected true or false, got 1"),
        ("api_key: {team: 1}", "api_key: expected a value or a list of them, got"),
        ("allow_origin: [[http://a]]", "allow_origin: expected a text or number"),
        ("max_n: 1\nmax-n: 2", "max-n: given twice"),
        ("- port", "expected a mapping of options, got ['port']"),
        ("port: [", "is not YAML: "),
        ("port: !!python/object/apply:os.getcwd []", "is not YAML: "),
        ("port: \x00", "is not YAML: "),
        ("#" * (1 << 20) + "\n", "is larger than 1 MiB"),
    ],
)
def test_what_a_file_cannot_say(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    assert cli.run(["serve", "--config", str(file), "--print-config"]) == 2
    said = capsys.readouterr().err
    assert f"config: {file}" in said and message in said


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        assert cli.run(["serve", "--config", str(path), "--print-config"]) == 2
        assert f"config: cannot read {path}: {reason}" in capsys.readouterr().err


def test_what_is_printed_gives_the_same_again_and_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--port", "9", "--planner", 'tenant_weights={"a": 2}', "--allow-origin", "http://a", "--access-log"]
    assert cli.run(["serve", "--print-config", "--api-key", "sk-secret", *given]) == 0
    printed = capsys.readouterr().out
    assert "sk-secret" not in printed and "port: 9  # command line" in printed
    (tmp_path / "again.yaml").write_text(printed)
    assert cli.run(["serve", "--print-config", "--config", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out.replace("# file", "# command line").replace('"9"', "9") == printed


def test_wrong_values_are_said_before_anything_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--print-config", "--planner", "nonsense=1"]) == 2
    told = capsys.readouterr()
    assert not told.out and "nonsense" in told.err


def test_a_variable_of_no_option_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TETRION_PROT", "1")
    assert cli.run(["serve", "--print-config"]) == 0
    assert "TETRION_PROT is set and is no option's" in capsys.readouterr().err


def test_the_template_has_every_option_and_can_be_used(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config"]) == 0
    printed = capsys.readouterr().out
    assert msgspec.yaml.decode(printed) is None, "all of it is commented out"
    lines = [match[1] for line in printed.splitlines() if (match := re.match(r"#([a-z_]+: ?.*)$", line))]
    options = [option for option in cli.serve.params if option.name not in OWN]
    assert [line.partition(":")[0] for line in lines] == [key_of(option) for option in options]  # type: ignore[arg-type]
    assert all(f"# {variable_of(option)}\n" in printed for option in options)  # type: ignore[arg-type]
    assert serve("\n".join(lines))[0] == ServeOptions(), "the values that it shows are the defaults"
    assert template(cli.serve) + "\n" == printed
