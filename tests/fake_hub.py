"""A hub on this machine: takes a repository's creation and commits, and keeps the files it was sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """`url` is where it listens; `commits` are the (message, {path: bytes}) it was sent."""

    def __init__(self) -> None:
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.created: list[dict[str, Any]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def answer(self, body: Any, status: int = 200) -> None:
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self.answer({"name": "tester", "type": "user", "siblings": [], "sha": "0" * 40, "id": "tester/ranker"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.path.endswith("/repos/create"):
                    hub.created.append(json.loads(body))
                    self.answer({"url": f"{hub.url}/tester/ranker", "name": "tester/ranker", "id": "tester/ranker"})
                elif "/preupload/" in self.path:  # every file is small enough to come with the commit itself
                    files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                             for file in json.loads(body)["files"]]  # fmt: skip
                    self.answer({"files": files})
                elif "/commit/" in self.path:
                    hub.commit([json.loads(line) for line in body.splitlines()])
                    oid = f"{len(hub.commits):040x}"
                    self.answer(
                        {"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/tester/ranker/commit/{oid}"}
                    )
                else:  # validation of a card's header
                    self.answer({"errors": [], "warnings": []})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, lines: list[dict[str, Any]]) -> None:
        message = lines[0]["value"]["summary"]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        self.commits.append((message, files))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
