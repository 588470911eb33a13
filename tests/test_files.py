"""Files: whole or not at all, one writer at a time, and out of wheels."""

import os
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from lion_fast import files
from lion_fast.errors import OptionError, WeightsError, WriteError

HOLD = """
import sys
import zipfile
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
        holder = f"process {other.pid}" if os.path.exists("/proc/locks") else ""
        for again in (False, True):
            with pytest.raises(OptionError, match=holder), files.lock(path, again=again):
                pass
        other.kill()
    with files.lock(path), files.lock(path, again=True):  # it went with the process
        with pytest.raises(OptionError, match="another run"), files.lock(path):
            pass
    with files.lock(path):
        assert os.listdir(tmp_path) == [name] * bool(name)


def test_a_lock_is_not_shared_by_threads(tmp_path):
    def take():
        with files.output_folder(tmp_path):
            pass

    with files.output_folder(tmp_path), ThreadPoolExecutor(1) as pool:
        take()
        if files.fcntl is not None:
            with pytest.raises(OptionError, match="another run"):
                pool.submit(take).result()
    take()


@pytest.mark.parametrize("name", ["file/a.json", "none/a.json", "folder"])
def test_what_cannot_be_written_is_told_with_its_name(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=name) as told:
        files.write_atomically(tmp_path / name, "y")
    assert isinstance(told.value, OSError) and told.value.errno
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").mkdir()
    with pytest.raises(WriteError):
        files.write_together({tmp_path / "a": "new", tmp_path / "none" / "b": "new"})
    assert (tmp_path / "a").read_text() == "old" and sorted(os.listdir(tmp_path)) == ["a", "b"]
    files.write_together({tmp_path / "a": "new", tmp_path / "b" / "c": b"new"})
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "new"


def test_an_output_is_never_what_is_read(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    photos, config = tmp_path / "photos", tmp_path / "run" / "config.yaml"
    for out, read, writes in [
        (photos, photos, ()), (tmp_path / "link", photos, ()), (photos / "run", photos, ()),
        (tmp_path / "link" / "cat", photos, ()), (tmp_path / "run", config, ("config.yaml",)),
        (config, config, ()), (tmp_path, photos / "cat", ("photos",)),
        (tmp_path / "run" / "..", photos, ("photos",)),
    ]:  # fmt: skip
        with pytest.raises(OptionError):
            files.refuse_overwriting(out, [None, tmp_path / "nothing", read], writes)
    for out, read in [(tmp_path, photos), (tmp_path / "photos-2", photos), (tmp_path / "run", config)]:
        files.refuse_overwriting(out, [read])


# -- wheels


@pytest.fixture
def wheelhouse(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, instead of any index, with one wheel in it."""
    folder, info = tmp_path / "wheels", "lf_sample-1.0.dist-info"
    folder.mkdir()
    with zipfile.ZipFile(folder / "lf_sample-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lf_sample/__init__.py", "raise SystemExit('the package must not be imported')")
        wheel.writestr("lf_sample/data/a.bin", b"alpha")
        wheel.writestr("lf_sample/data/more/b.bin", b"beta")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: lf-sample\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "LION_FAST_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


ALPHA = "8ed3f6ad685b959ead7022518e1af76cd816f8e8ec7ccdda1ed4018e8f2223f8"  # printf alpha | sha256sum
# (printf 'a.bin\0alpha'; printf 'more/b.bin\0beta') | sha256sum
FOLDER = "949d58a449e9f8209e2e7bed11479d30c36d1ebbea821cd0703a0873296ac8cc"


def no_pip(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was started"))


def fetch(target, member="a.bin", sha256=ALPHA, version="1.0", **told):
    return files.fetch_wheel("lf-sample", version, f"lf_sample/data/{member}", sha256, target, **told)


def test_wheel_member_is_fetched_once(wheelhouse, tmp_path, monkeypatch, capsys):
    target = tmp_path / "cache" / "a.bin"
    assert fetch(target, megabytes=368) == target and target.read_bytes() == b"alpha"
    assert "lf-sample==1.0 (368 MB)" in capsys.readouterr().err
    assert [p.name for p in target.parent.iterdir()] == ["a.bin"], "temporary files are left behind"
    no_pip(monkeypatch)
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    assert fetch(target) == target


def test_wheel_folder_is_fetched_whole(wheelhouse, tmp_path):
    target = fetch(tmp_path / "cache" / "data", "", FOLDER)
    assert (target / "a.bin").read_bytes() == b"alpha"
    assert (target / "more" / "b.bin").read_bytes() == b"beta"


def test_installed_package_is_used_without_pip(wheelhouse, tmp_path, monkeypatch):
    with zipfile.ZipFile(next(wheelhouse.iterdir())) as wheel:
        wheel.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    no_pip(monkeypatch)
    assert fetch(tmp_path / "c" / "a.bin").read_bytes() == b"alpha"
    assert "lf_sample" not in sys.modules


def test_wrong_content_is_refused_and_not_kept(wheelhouse, tmp_path):
    target = tmp_path / "cache" / "a.bin"
    with pytest.raises(WeightsError, match=f"sha256 {ALPHA}, expected {'0' * 64}") as caught:
        fetch(target, sha256="0" * 64)
    assert not isinstance(caught.value, files.FetchError), "a wrong content must not look like being offline"
    assert not target.exists()
    with pytest.raises(WeightsError, match="holds no lf_sample/data/zzz"):
        fetch(target, "zzz")


def test_fetch_errors_say_what_to_do(wheelhouse, tmp_path, monkeypatch):
    target = tmp_path / "cache" / "a.bin"
    with pytest.raises(files.FetchError, match=r"lf-sample==9\.9 could not be downloaded.*PIP_FIND_LINKS"):
        fetch(target, version="9.9")
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    with pytest.raises(files.FetchError, match=r"LION_FAST_OFFLINE.*install --no-deps lf-sample==1\.0"):
        fetch(target)
    monkeypatch.delenv("LION_FAST_OFFLINE")
    monkeypatch.setattr(files.sys, "executable", "/nonexistent/python")
    monkeypatch.setattr(files.shutil, "which", lambda name: None)
    with pytest.raises(files.FetchError, match="nonexistent/python.*PIP_FIND_LINKS"):
        fetch(target)


def test_a_cache_that_cannot_be_is_told(tmp_path, monkeypatch, wheelhouse):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "x"):
        monkeypatch.setenv("LION_FAST_CACHE", str(place))
        with pytest.raises(WriteError):
            files.cache_dir()
        with pytest.raises(WriteError):
            fetch(place / "a.bin")
    monkeypatch.setenv("LION_FAST_CACHE", "~nobody-of-this-name/x")
    with pytest.raises(OptionError, match="LION_FAST_CACHE"):
        files.cache_dir()


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LION_FAST_CACHE", str(tmp_path / "x" / "y"))
    assert files.cache_dir() == tmp_path / "x" / "y" and files.cache_dir().is_dir()
