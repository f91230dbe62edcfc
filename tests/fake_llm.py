"""A small OpenAI-compatible server on loopback: it ranks passages by the number after "worth", and fails as told."""

import json
import re
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeLlm:
    """`script` holds what the next requests get instead.

    A status, its code and headers; "cut", "hang" or a text; a text and why it ended, as a dictionary.
    """

    def __init__(self, script=(), latency=0.0):
        self.script, self.latency = deque(script), latency
        self.bodies, self.keys, self.in_flight, self.max_in_flight = [], set(), 0, 0
        self.files, self.batches, self.lock = {}, {}, threading.Lock()
        self.lose_batch_reply, self.refuse = False, None  # `refuse`: a query whose requests get no ranking
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def rank(self, body):
        """Return a completion for a chat request."""
        text = "\n".join(message["content"] for message in body["messages"] if message["role"] != "assistant")
        worth = {int(n): int(w) for n, w in re.findall(r"^\[(\d+)\].*?worth (\d+)", text, flags=re.MULTILINE)}
        order = sorted(worth, key=lambda number: -worth[number])
        answer = json.dumps({"ranking": order}) if "response_format" in body else " > ".join(f"[{n}]" for n in order)
        return completion(answer)

    def run_batch(self, batch_id, fail=()):
        """Answer a submitted batch; requests whose place is in `fail` end in its error file."""
        batch = self.batches[batch_id]
        good, bad = [], []
        for place, line in enumerate(self.files[batch["input_file_id"]].splitlines()):
            row = json.loads(line)
            if place in fail:
                error = {"error": {"message": "too many", "code": "rate_limit"}}
                bad.append({"custom_id": row["custom_id"], "response": {"status_code": 429, "body": error}})
            else:
                response = {"status_code": 200, "body": self.rank(row["body"])}
                good.append({"custom_id": row["custom_id"], "response": response, "error": None})
        for name, rows in (("output_file_id", good), ("error_file_id", bad)):
            if rows:
                batch[name] = f"{batch_id}-{name}"
                self.files[batch[name]] = "\n".join(map(json.dumps, reversed(rows))) + "\n"
        total = len(good) + len(bad)
        batch["request_counts"] = {"total": total, "completed": len(good), "failed": len(bad)}
        batch["status"] = "completed"

    def _handler(fake):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status, body, headers=(), cut=False):
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json" if not isinstance(body, str) else "text/plain")
                self.send_header("Content-Length", str(len(data)))
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if cut else data)
                self.close_connection = self.close_connection or cut

            def do_GET(self):
                path = self.path.removeprefix("/v1").partition("?")[0]
                if path == "/batches":
                    self.answer(200, {"object": "list", "data": list(fake.batches.values()), "has_more": False})
                elif path.startswith("/batches/"):
                    self.answer(200, fake.batches[path.split("/")[2]])
                else:
                    self.answer(200, fake.files[path.split("/")[2]])

            def do_POST(self):
                content = self.rfile.read(int(self.headers["Content-Length"])).decode()
                path = self.path.removeprefix("/v1")
                fake.keys.add(self.headers["Authorization"])
                if path == "/files":
                    file_id = f"file-{len(fake.files)}"
                    fake.files[file_id] = "\n".join(re.findall(r'^\{"custom_id".*$', content, flags=re.MULTILINE))
                    self.answer(200, {"id": file_id, "object": "file", "purpose": "batch"})
                elif path == "/batches":
                    batch = json.loads(content) | {"id": f"batch-{len(fake.batches)}", "object": "batch"}
                    batch |= {"status": "in_progress", "created_at": 0}
                    fake.batches[batch["id"]] = batch
                    self.answer(200, batch, cut=fake.lose_batch_reply)
                else:
                    self.chat(json.loads(content))

            def chat(self, body):
                with fake.lock:
                    fake.bodies.append(body)
                    fake.in_flight += 1
                    fake.max_in_flight = max(fake.max_in_flight, fake.in_flight)
                    fault = fake.script.popleft() if fake.script else None
                time.sleep(fake.latency)
                with fake.lock:
                    fake.in_flight -= 1
                if fake.refuse and f"query: {fake.refuse}\n" in body["messages"][-1]["content"].replace(
                    "Query", "query"
                ):
                    fault = "I'm sorry, but I can't rank these passages."
                if isinstance(fault, tuple):
                    status, code, *headers = fault
                    error = {"message": f"told to: {self.headers['Authorization']}", "code": code}
                    return self.answer(status, {"error": error}, *headers)
                if fault == "hang":
                    time.sleep(2)
                    self.close_connection = True
                    return None
                if isinstance(fault, dict):
                    return self.answer(200, completion(**fault))
                if fault not in (None, "cut"):
                    return self.answer(200, completion(fault))
                return self.answer(200, fake.rank(body), cut=fault == "cut")

        return Handler


def completion(answer, prompt_tokens=100, completion_tokens=10, finish_reason="stop"):
    """Return a chat completion that says `answer`."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}
    message = {"role": "assistant", "content": answer}
    choices = [{"index": 0, "finish_reason": finish_reason, "message": message}]
    return {"id": "c", "object": "chat.completion", "created": 0, "model": "fake", "choices": choices, "usage": usage}
