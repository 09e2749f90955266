# SPDX-License-Identifier: Apache-2.0
"""Stands in for the ``vllm`` command where a test is about processes, not about vLLM: says what it got, then does as told.

``serve MODEL --do WHAT --host H --port P ...`` with WHAT one of: serve (also after SIGTERM, with a child process), die, hang.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


arguments = sys.argv[1:]
what = arguments[arguments.index("--do") + 1]
print("started with", *arguments, flush=True)
if what == "die":
    print("\n".join(f"line {i}" for i in range(100)), "the last words", sep="\n", file=sys.stderr)
    sys.exit(3)
if what == "hang":
    time.sleep(600)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("processes", os.getpid(), child.pid, "variable", os.environ.get("STUB"), flush=True)
HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Health).serve_forever()
