"""git in a folder of a test's own."""

import subprocess
from pathlib import Path


def git(folder: Path, *words: str) -> str:
    """What a command of git says there."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
