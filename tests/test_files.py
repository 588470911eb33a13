"""Files: whole or not at all, and one writer at a time."""

import os
import subprocess
import sys

import pytest

from lion_fast import files
from lion_fast.errors import OptionError

HOLD = """
import sys
from lion_fast.files import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_a_write_replaces_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomically(path, b"one")
    files.write_atomically(path, "zw\u00f6lf")
    assert path.read_bytes() == "zw\u00f6lf".encode()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, b"three")
    assert path.read_bytes() == "zw\u00f6lf".encode() and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(files.fcntl is None, reason="this system has no locks")
@pytest.mark.parametrize("name", ["", "rows.jsonl"])
def test_two_processes_do_not_hold_one_lock(tmp_path, name):
    path = tmp_path / name
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OptionError, match="another run"), files.lock(path):
            pass
        other.kill()
    with files.lock(path):  # it went with the process
        with pytest.raises(OptionError, match="another run"), files.lock(path):
            pass
    with files.lock(path):
        assert os.listdir(tmp_path) == [name] * bool(name)
