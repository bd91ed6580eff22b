"""Python in a process of its own, with a Hub on loopback."""

import os
import subprocess
import sys
from pathlib import Path

from hub.hub_server import HubServer


def run_python(hub: HubServer, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """
    Run Python in a new process with an empty Hub cache; `folder` is its working directory, `variables` are of its
    environment.
    """
    folder.mkdir()
    environment = {**os.environ, **hub.environment(folder / "hf-home"), **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
