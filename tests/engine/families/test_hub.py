"""A model by its id on the hub: from a server with the hub's interface, in a process that was told of it."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tetrion.engine.families.locate import resolve_model

HUB_ID, REVISION = "someone/Small-Shapes", "0123456789abcdef0123456789abcdef01234567"
OTHER, OTHER_REVISION = "refs/pr/1", "76543210fedcba9876543210fedcba9876543210"
"""A revision with another VAE."""
OTHER_VAE = "vae/config.json"
UNWANTED = {"flux1.safetensors": b"one large file", "transformer/code.py": b"raise SystemExit", "vae/w.bin": b"pickle"}
RESOLVE = (
    "import sys; from pathlib import Path; from tetrion.engine.families.served import read_model; "
    "from tetrion.engine.measure.checkpoint_identity import checkpoint_identity as identity; "
    "spec = read_model(sys.argv[1], 'safetensors'); print(spec.path, spec.name, spec.num_steps, spec.max_text_tokens); "
    "print(identity(Path(spec.path), 'safetensors'), file=sys.stderr)"
)


class Hub(http.server.ThreadingHTTPServer):
    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.sent = files, set[str]()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        kind, error = "model", "RepoNotFound"
        asked = path.removeprefix(f"/api/models/{HUB_ID}/revision/")
        known = {None: REVISION, "main": REVISION, REVISION: REVISION, OTHER: OTHER_REVISION}
        commit = OTHER_REVISION if OTHER_REVISION in path or asked == OTHER else REVISION
        revised = {OTHER_VAE: self.server.files[OTHER_VAE] + b" "} if commit == OTHER_REVISION else {}
        files = self.server.files | revised
        if path == f"/api/models/{HUB_ID}" or (asked != path and asked in known):
            body = json.dumps({"id": HUB_ID, "sha": commit, "siblings": []}).encode()
        elif asked != path:
            body, error = b"", "RevisionNotFound"
        elif path == f"/api/models/{HUB_ID}/tree/{commit}":
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": oid(name, body)}
                for name, body in files.items()
            ]
            body = json.dumps(entries).encode()
        elif (name := path.removeprefix(f"/{HUB_ID}/resolve/{commit}/")) in files:
            body, kind = files[name], name
            if self.command == "GET":
                self.server.sent.add(name)
        else:
            body = b""
        if not body:
            self.send_response(404)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{oid(kind, body)}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def oid(name: str, body: bytes) -> str:
    return f"oid-{name}-{len(body)}".replace("/", "-")


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A repository with the embedded model, without its preset, and with files that nobody should want."""
    folder = resolve_model("shapes")
    paths = [path for kind in ("json", "safetensors") for path in folder.rglob(f"*.{kind}")]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != "preset.json"}
    with Hub(files | UNWANTED) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def resolve(hub_id: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    code = [sys.executable, "-P", "-c", RESOLVE, hub_id]
    return subprocess.run(code, env=environment, capture_output=True, text=True, timeout=120)


def test_a_model_comes_from_the_hub_once_and_only_what_is_needed(hub: Hub, tmp_path: Path) -> None:
    done = resolve(HUB_ID, hub.endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    path, *facts = done.stdout.split()
    folder = Path(path)
    assert facts == ["Small-Shapes", "4", "256"]  # it takes no guidance: FLUX.1-schnell's defaults
    wanted = hub.files.keys() - UNWANTED.keys()
    assert hub.sent == wanted
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == wanted
    assert all((folder / name).read_bytes() == hub.files[name] for name in wanted)
    hub.sent.clear()
    again = resolve(HUB_ID, "http://127.0.0.1:9", tmp_path)  # nobody listens there
    assert again.stdout == done.stdout and not hub.sent, again.stderr


def test_weights_that_there_are_in_fp16_alone_come_too(hub: Hub, tmp_path: Path) -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    files = {n.replace("_model.", "_model.fp16.") if n == name else n: body for n, body in hub.files.items()}
    with Hub(files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = resolve(HUB_ID, server.endpoint, tmp_path)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in server.sent


def test_a_revision_is_a_model_of_its_own(hub: Hub, tmp_path: Path) -> None:
    """From the hub, then with nobody there; a commit finds what its branch brought."""
    nobody = "http://127.0.0.1:9"
    main, other = (resolve(f"{HUB_ID}@{revision}", hub.endpoint, tmp_path) for revision in ("main", OTHER))
    assert main.returncode == other.returncode == 0, main.stderr + other.stderr
    assert [done.stdout.split()[1] for done in (main, other)] == ["Small-Shapes@main", f"Small-Shapes@{OTHER}"]
    paths = [Path(done.stdout.split()[0]) for done in (main, other)]
    assert [path.name for path in paths] == [REVISION, OTHER_REVISION]
    assert (paths[1] / OTHER_VAE).read_bytes() == (paths[0] / OTHER_VAE).read_bytes() + b" "
    identities = [done.stderr.splitlines()[-1] for done in (main, other)]
    assert identities[0] != identities[1], "their cost tables are not each other's"
    for revision in (OTHER, OTHER_REVISION):
        again = resolve(f"{HUB_ID}@{revision}", nobody, tmp_path)
        assert again.stdout.split()[0] == str(paths[1]), again.stderr
    assert resolve(f"{HUB_ID}@v2", nobody, tmp_path).returncode == 1


def test_a_revision_that_the_hub_does_not_have_is_an_error(hub: Hub, tmp_path: Path) -> None:
    done = resolve(f"{HUB_ID}@no-such", hub.endpoint, tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert f"CheckpointError: model: '{HUB_ID}@no-such' is neither" in said and "404" in said


def test_what_the_hub_does_not_have_is_an_error(hub: Hub, tmp_path: Path) -> None:
    done = resolve("someone/nothing", hub.endpoint, tmp_path)
    assert done.returncode == 1
    assert "CheckpointError: model: 'someone/nothing' is neither a folder nor an embedded model" in done.stderr
    assert "the Hugging Face hub does not give it" in done.stderr.splitlines()[-1]
