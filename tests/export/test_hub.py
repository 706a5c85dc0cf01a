"""Publishing through huggingface_hub, against a local server with the Hub's interface."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparsify.cli.main import app
from sparsify.errors import ExportError

PUBLISH = """
import sys
from pathlib import Path
from huggingface_hub import HfApi
from sparsify.errors import ExportError
from sparsify.export.bundle import push_to_hub
api = HfApi(endpoint=sys.argv[1], token="hf_test")
for repository in sys.argv[3:]:
    try:
        print(push_to_hub(Path(sys.argv[2]), repository, private=True, api=api))
    except ExportError as error:
        print("refused:", str(error).replace(chr(10), " "))
"""


class Hub(ThreadingHTTPServer):
    """Records uploads."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.created: list[dict] = []
        self.num_commits = 0
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, body: object, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self.headers["Authorization"] != "Bearer hf_test":
                self._answer({"error": "Invalid token"}, 401)
                return
            self._answer({"name": "owner", "type": "user", "orgs": [{"name": "lab"}]})
            return
        self._answer({"error": "not found"}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["name"] == "forbidden":
                self._answer({"error": "You may not write here"}, 403)
                return
            self.server.created.append(asked)
            self._answer({"url": f"{self.server.address}/owner/{asked['name']}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        elif path.endswith("/commit/main"):
            self.server.num_commits += 1
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            commit = f"{self.server.address}/owner/mine/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": commit})
        else:
            self._answer({"error": path}, 404)


CHECK = """
import sys
from huggingface_hub import HfApi
from sparsify.errors import ExportError
from sparsify.export.bundle import check_repository
for pair in sys.argv[2:]:
    token, repository = pair.split(":")
    try:
        check_repository(repository, HfApi(endpoint=sys.argv[1], token=token))
        print("possible:", repository)
    except ExportError as error:
        print("refused:", str(error).replace(chr(10), " "))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_bundle_is_published_completely_and_a_refusal_is_reported(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n# A card\n")
    (tmp_path / "training" / "recipe.yaml").write_text("name: tiny\n")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    names = ["owner/mine", "owner/forbidden"]
    result = subprocess.run(
        [sys.executable, "-c", PUBLISH, hub.address, str(tmp_path), *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    published, refused = result.stdout.splitlines()
    assert published == f"{hub.address}/owner/mine"
    assert "was not published as owner/forbidden" in refused
    (created,) = hub.created
    assert created["visibility"] == "private"
    assert hub.num_commits == 1
    assert hub.files == {
        path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    }


def test_where_a_bundle_cannot_be_published_is_known_before_it_is_written(hub: Hub, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    pairs = ["hf_test:owner/mine", "hf_test:lab/mine", "hf_test:mine", "hf_test:other/mine", "hf_old:owner/mine"]
    result = subprocess.run(
        [sys.executable, "-c", CHECK, hub.address, *pairs], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    *possible, other, old = result.stdout.splitlines()
    assert possible == ["possible: owner/mine", "possible: lab/mine", "possible: mine"]
    assert "the token is of owner" in other
    assert "hf auth login" in old
    for repository in ("owner/two words", "owner/mine"):  # no name, and no network
        with pytest.raises(ExportError, match="--push-to-hub owner"):
            app(["export", "no_such_run", "--to", str(tmp_path / "out"), "--push-to-hub", repository])
    assert not hub.created
