"""A model is found by its name, or the command ends within seconds."""

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from setenc_hf.errors import InputError
from setenc_hf.hub import find_model

ROOT = Path(__file__).parents[1]
CODE = "import sys; from setenc_hf.hub import find_model; print(find_model(sys.argv[1], seconds=2))"


def find(name, cache, endpoint, **more):
    """Return what a fresh process prints: the cache and the hub are read once, when the client is imported."""
    here = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    here |= {"HF_HOME": str(cache), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"} | more
    code = f"from setenc_hf.command import run_command; import sys\ndef main(_):\n exec({CODE!r})\nrun_command(main)"
    return subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, env=here, text=True, capture_output=True)


def put_in_cache(cache, name):
    folder = cache / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    return snapshot


class Hub(http.server.BaseHTTPRequestHandler):
    """Knows one model, is too busy for another, and has no others."""

    def do_GET(self):
        code = {"/api/models/some/model": 200, "/api/models/some/busy": 503}.get(self.path.split("?")[0], 404)
        body = json.dumps({"id": "some/model", "_id": "1"}).encode()
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_folders_need_no_hub(tmp_path):
    assert find_model(str(tmp_path)) == str(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file"):
        find_model(str(tmp_path / "file"))
    with pytest.raises(InputError, match="no such folder, nor can it be a model's id"):
        find_model(str(tmp_path / "none"))


def test_the_hub_is_asked_once(hub, tmp_path):
    assert find("some/model", tmp_path, hub).stdout == "some/model\n"
    assert find("some/busy", tmp_path, hub).stdout == "some/busy\n"
    result = find("some/other", tmp_path, hub)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: some/other: neither a folder nor a model that the hub at {hub} shows")


def test_an_unreachable_hub_costs_seconds_and_one_line(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        silent_hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = find("some/model", tmp_path, silent_hub)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "did not answer within 2 s" in result.stderr or "cannot be reached" in result.stderr
    gone = find("some/model", tmp_path, silent_hub)
    assert (gone.returncode, gone.stderr.count("\n")) == (2, 1)
    assert "cannot be reached" in gone.stderr
    cached = put_in_cache(tmp_path, "some/model")
    assert find("some/model", tmp_path, silent_hub).stdout == f"{cached}\n"


def test_offline_the_cache_alone_counts(tmp_path):
    result = find("some/model", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    off = "the hub is switched off (HF_HUB_OFFLINE)"
    assert result.stderr == f"error: some/model: no such folder, {off}, and no copy of it is in the cache\n"
    cached = put_in_cache(tmp_path, "some/model")
    assert find("some/model", tmp_path, "http://127.0.0.1:9", HF_HUB_OFFLINE="1").stdout == f"{cached}\n"
