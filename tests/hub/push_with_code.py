"""Publishes folders that carry their code. Run by `test_carried_code.py` in a process of its own."""

import sys
from pathlib import Path

from huggingface_hub import HfApi


def main(folder: str) -> None:
    api = HfApi()
    for path in sorted(Path(folder).iterdir()):
        api.create_repo(f"me/{path.name}")
        api.upload_folder(repo_id=f"me/{path.name}", folder_path=path)


if __name__ == "__main__":
    main(*sys.argv[1:])
