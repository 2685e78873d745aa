"""A stand-in for `python -m sglang.launch_server`: the same command line, log lines and routes, up in half a second."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

STUB = """
import argparse, json, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
for flag in ("--model-path", "--host", "--quantization"):
    parser.add_argument(flag)
parser.add_argument("--port", type=int)
parser.add_argument("--sleep-on-idle", action="store_true")
args = parser.parse_args()
if "refused" in args.model_path:
    sys.exit("sglang_amd_quant.errors.SchemeError: scheme x: unknown, use another\\nin other words: no")
print("server_args=...", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, body, kind="application/json"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(json.dumps({"model_path": args.model_path}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/chat/completions":
            message = {"role": "assistant", "content": f"{asked['messages'][0]['content']} Paris."}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply(json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                                   "choices": [choice]}).encode())
            return
        chunk = {"id": "1", "object": "text_completion", "created": 0, "model": "m"}
        chunks = [chunk | {"choices": [{"index": 0, "text": "a", "finish_reason": None}]}] * asked["max_tokens"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for line in [*map(json.dumps, chunks), "[DONE]"]:
            self.wfile.write(f"data: {line}\\n\\n".encode())
            self.wfile.flush()


server = ThreadingHTTPServer((args.host, args.port), Handler)
print("The server is fired up and ready to roll!", flush=True)
server.serve_forever()
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder becomes one whose `sglang` is the stand-in, with a model directory `model`."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(textwrap.dedent(STUB))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path
