"""Runs the snippets of the job API document as a person would type them: top to bottom, in one process.

``python document.py SNIPPETS`` prints, per statement, one line ``@@ {json}`` after whatever the statement
itself has printed. Imports nothing of ours: only what the document imports.
"""

from __future__ import annotations

import json
import sys
from typing import Any

MARK = "@@ "


def statements(text: str) -> list[str]:
    """The statements of a document, without their prompts, from lines that start with >>> or ... ."""
    found: list[str] = []
    for line in text.splitlines():
        prompt, code = line[:4], line[4:]
        if prompt == ">>> ":
            found.append(code)
        elif prompt == "... ":
            found[-1] += "\n" + code
    return found


def outcome(code: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """What the statement has led to: the request it made, if any, and the answer as far as it was read."""
    answer = namespace.get("rv")
    if answer is None or not code.startswith("rv = "):
        return {"code": code}
    streamed = "text/event-stream" in answer.headers.get("Content-Type", "")
    return {
        "code": code,
        "method": answer.request.method,
        "path": answer.request.path_url,
        "status": answer.status_code,
        "type": answer.headers.get("Content-Type", ""),
        "body": None if streamed else answer.json(),
    }


def main(path: str) -> None:
    """Run all statements; an exception ends the run, as it ends a script."""
    with open(path, encoding="utf-8") as file:
        code = statements(file.read())
    namespace: dict[str, Any] = {}
    for each in code:
        # As the interactive interpreter: the value of an expression is shown.
        exec(compile(each + "\n", "<document>", "single"), namespace)
        print(MARK + json.dumps(outcome(each, namespace)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
