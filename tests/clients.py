"""tools/serving, as where `python tools/...` runs: the clients that exported files are held against."""

from __future__ import annotations

import sys
from pathlib import Path

_TOOLS = str(Path(__file__).resolve().parent.parent / "tools")
if _TOOLS not in sys.path:
    sys.path.insert(0, _TOOLS)

import serve_check as serve_check  # noqa: E402
from serving import checks as checks  # noqa: E402
from serving import llama_cpp as llama_cpp  # noqa: E402
from serving import vllm_server as vllm_server  # noqa: E402
