# SPDX-License-Identifier: Apache-2.0
"""Runs ``vllm`` command lines as a user would, importing vLLM once: each is a fork that calls the command's own main.

Reads a JSON list of {"argv": [...], "environment": {...}} from stdin, writes a list of {"status", "output", "errors"}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any


def run(argv: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """One command line in a child process: exit status, standard output, standard error."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            os.environ.update(environment)
            os._exit(_main(argv))
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return {"status": os.waitstatus_to_exitcode(status), "output": texts[0], "errors": texts[1]}


def _main(argv: list[str]) -> int:
    """What the interpreter does around a console script."""
    from vllm.entrypoints.cli.main import main

    sys.argv = argv
    try:
        status: Any = main()
    except SystemExit as leaving:
        status = leaving.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return 0 if status is None else status if isinstance(status, int) else 1


def main() -> None:
    import vllm.engine.arg_utils
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.cli.serve  # noqa: F401

    cases = json.load(sys.stdin)
    json.dump([run(case["argv"], case.get("environment", {})) for case in cases], sys.stdout)


if __name__ == "__main__":
    main()
