# ruff: noqa: E501
"""Files that somebody edited, or that are none: every command that reads them keeps its promise."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import yaml
from boundary_helpers import (
    MODEL,
    SHORT,
    TEXTS,
    VALUES,
    changed,
    edited,
    keeps_its_promise,
    picture,
    scratch,
    some,
    world,
)
from hypothesis import given
from hypothesis import strategies as st

from lion_fast.training.settings import Settings

DATA = st.data()


def dumped(value) -> bytes:
    return yaml.safe_dump(value, allow_unicode=False).encode("utf-8", "surrogatepass")


def adapter_copy(folder: Path) -> Path:
    return Path(shutil.copytree(world() / "run" / "adapter", folder / "adapter"))


@some(30)
@given(DATA)
def test_config_files(data):
    good = yaml.safe_load((world() / "run/config.yaml").read_text())
    draw = data.draw
    if draw(st.booleans()):
        names = st.sampled_from(Settings.names())
        text = dumped(good | {"data": "nowhere"} | draw(st.dictionaries(names, VALUES, max_size=3)))
    else:
        text = edited(dumped(good | {"data": "nowhere"}), draw)
    with scratch() as folder:
        (folder / "c.yaml").write_bytes(text)
        code, *_ = keeps_its_promise(
            "finetune", "nowhere", "--config", folder / "c.yaml", "--out", folder / "out"
        )
        assert code in (1, 2) and (folder / "c.yaml").read_bytes() == text


@some(8)
@given(DATA)
def test_the_config_beside_an_adapter(data):
    good = yaml.safe_load((world() / "run/config.yaml").read_text())
    with scratch() as folder:
        adapter_copy(folder)
        text = (
            dumped(changed(good, data.draw)) if data.draw(st.booleans()) else edited(dumped(good), data.draw)
        )
        (folder / "config.yaml").write_bytes(text)
        keeps_its_promise("info", folder, "--json")


@some(30)
@given(DATA)
def test_the_description_of_an_adapter(data):
    with scratch() as folder:
        path = adapter_copy(folder) / "adapter.json"
        good = json.loads(path.read_text())
        if data.draw(st.booleans()):
            for _ in range(data.draw(st.integers(1, 2))):
                good = changed(good, data.draw) if isinstance(good, dict) else good
            path.write_text(json.dumps(good))
        else:
            path.write_bytes(edited(path.read_bytes(), data.draw))
        before = picture(folder)
        keeps_its_promise("info", folder, "--json", codes={0, 1})
        assert picture(folder) == before


@some(20)
@given(DATA)
def test_the_tensors_of_an_adapter(data):
    with scratch() as folder:
        adapter = adapter_copy(folder)
        tensors, path = adapter / "adapter.safetensors", adapter / "adapter.json"
        raw = tensors.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        if data.draw(st.booleans()):
            header = json.dumps(changed(json.loads(raw[8 : 8 + size]), data.draw)).encode()
            raw = len(header).to_bytes(8, "little") + header + raw[8 + size :]
        else:
            raw = edited(raw, data.draw)
        tensors.write_bytes(raw)
        if data.draw(st.booleans()) or True:
            told = json.loads(path.read_text()) | {"tensors_sha256": hashlib.sha256(raw).hexdigest()}
            path.write_text(json.dumps(told))
        keeps_its_promise("info", folder, "--json", codes={0, 1})


@some(15)
@given(DATA)
def test_weights(data):
    suffix = data.draw(st.sampled_from([".safetensors", ".pth", ".npz"]))
    with scratch() as folder:
        raw = edited((world() / f"tiny{suffix}").read_bytes(), data.draw)
        (folder / f"w{suffix}").write_bytes(raw)
        keeps_its_promise("info", world() / "run", "--weights", folder / f"w{suffix}", codes={0, 1})


@some(20)
@given(DATA)
def test_lists(data):
    cell = TEXTS | st.sampled_from(
        ["class0", "class1", "0", "1", "00", "1000000000", "train", "val", "test", "a\0b"]
    )
    path = st.sampled_from([f"{world()}/images/class0/00{i}.png" for i in range(6)]) | TEXTS
    rows = data.draw(st.lists(st.tuples(path, cell, cell), max_size=4))
    header = data.draw(
        st.sampled_from(
            [
                "path,label",
                "path,label,split",
                "label,path",
                "path",
                "",
                "path,path,label",
                "path,label,group",
            ]
        )
    )
    good = (world() / "list.csv").read_text().replace("images/", f"{world()}/images/")
    text = header + "\n" + "\n".join(",".join(row) for row in rows)
    text = data.draw(st.sampled_from([text, text.replace("\n", "\r\n"), good]))
    raw = text.encode("utf-8", "surrogatepass")
    with scratch() as folder:
        (folder / "l.csv").write_bytes(edited(raw, data.draw) if data.draw(st.booleans()) else raw)
        keeps_its_promise("evaluate", world() / "run", folder / "l.csv", "--device=cpu", "--json")


@some(20)
@given(DATA)
def test_the_split_of_a_run(data):
    name = data.draw(st.sampled_from(["split.csv", "splits.json"]))
    raw = (world() / "run" / name).read_bytes()
    if name == "split.csv" and data.draw(st.booleans()):
        table = [line.split(b",") for line in raw.splitlines()]
        row = data.draw(st.sampled_from(table))
        row[data.draw(st.integers(0, 5))] = data.draw(TEXTS).encode("utf-8", "surrogatepass")
        raw = b"\n".join(map(b",".join, table))
    elif name == "splits.json" and data.draw(st.booleans()):
        raw = json.dumps(changed(json.loads(raw), data.draw)).encode()
    else:
        raw = edited(raw, data.draw)
    with scratch() as folder:
        run = shutil.copytree(world() / "run", folder / "run")
        if name == "split.csv" and data.draw(st.booleans()):
            (run / "splits.json").unlink()
        if name == "splits.json" and data.draw(st.booleans()):
            (run / "split.csv").unlink()
        (run / name).write_bytes(raw)
        keeps_its_promise("evaluate", run, "--device=cpu", "--json", codes={0, 1})
        keeps_its_promise("evaluate", run, world() / "images", "--device=cpu", "--json", codes={0, 1})


@some(40)
@given(DATA)
def test_image_bytes(data):
    from PIL import Image

    form = data.draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm"]))
    mode = data.draw(st.sampled_from(["RGB", "L", *(["P"] if form in ("png", "gif", "tiff") else [])]))
    with scratch() as folder:
        path = folder / f"x.{form}"
        Image.open(world() / "images/class0/000.png").convert(mode).save(path, format=form)
        path.write_bytes(edited(path.read_bytes(), data.draw))
        keeps_its_promise("predict", world() / "run", path, "--device=cpu", "--json", codes={0, 1})


NAMES = st.one_of(
    st.sampled_from(
        [b"train", b"val", b"test", b"class0", b"class1", b".hidden", b"\xff\xfe", b"-x", b"a b", b"x\ny"]
    ),
    st.binary(min_size=1, max_size=4).filter(lambda b: not {0, 47} & set(b) and b not in (b".", b"..")),
)


@some(12)
@given(DATA)
def test_folders(data):
    draw = data.draw
    image = (world() / "images/class0/000.png").read_bytes()
    with scratch() as folder:
        root = os.fsencode(folder / "data")
        os.mkdir(root)
        for top in draw(st.lists(NAMES, max_size=4, unique=True)):
            os.mkdir(os.path.join(root, top))
            for name in draw(st.lists(NAMES, max_size=4, unique=True)):
                what = draw(
                    st.sampled_from(["image", "image", "image", "folder", "text", "loop", "pipe", "empty"])
                )
                path = os.path.join(root, top, name)
                if what == "folder":
                    os.mkdir(path)
                    path = os.path.join(path, b"x")
                path += draw(st.sampled_from([b".png", b".png", b".jpg", b""]))
                if os.path.lexists(path):
                    continue
                if what == "loop":
                    os.symlink(path, path)
                elif what == "pipe":
                    os.mkfifo(path)
                else:
                    with open(path, "wb") as file:
                        file.write({"text": b"no image", "empty": b""}.get(what, image))
        command = draw(st.sampled_from(["finetune", "evaluate", "predict"]))
        place = os.fsdecode(root)
        if command == "finetune":
            keeps_its_promise(command, place, "--out", folder / "out", *MODEL(world()), *SHORT, "--json")
        else:
            keeps_its_promise(command, world() / "run", place, "--device=cpu", "--json")


@some(5)
@given(DATA)
def test_checkpoints_whose_manifest_was_made_anew(data):
    with scratch() as folder:
        run = Path(shutil.copytree(world() / "run", folder / "run"))
        (last,) = (run / "checkpoints").iterdir()
        if data.draw(st.booleans()):
            good = json.loads((last / "state.json").read_text())
            (last / "state.json").write_text(json.dumps(changed(good, data.draw)))
        else:
            name = data.draw(st.sampled_from(["state.json", "tensors.safetensors"]))
            (last / name).write_bytes(edited((last / name).read_bytes(), data.draw))
        files = {}
        for name in ("state.json", "tensors.safetensors"):
            raw = (last / name).read_bytes()
            files[name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (last / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
        keeps_its_promise("finetune", "--config", run / "config.yaml", "--out", run, "--resume", "--json")


@some(6)
@given(DATA)
def test_records_of_a_run(data):
    """Whatever else lies in a run's folder."""
    with scratch() as folder:
        run = Path(shutil.copytree(world() / "run", folder / "run"))
        name = data.draw(
            st.sampled_from(["split.csv", "splits.json", "results.json", "steps.csv", "metrics.csv"])
        )
        raw = (run / name).read_bytes()
        if name.endswith("json") and data.draw(st.booleans()):
            (run / name).write_text(json.dumps(changed(json.loads(raw), data.draw)))
        else:
            (run / name).write_bytes(edited(raw, data.draw))
        if data.draw(st.booleans()):
            keeps_its_promise("evaluate", run, "--device=cpu", "--json")
        else:
            keeps_its_promise("finetune", "--config", run / "config.yaml", "--out", run, "--resume", "--json")


LISTS = {
    "vtab": {
        "train800.txt": "images/a.png 0\nimages/b.png 1\n", "val200.txt": "images/a.png 0\n",
        "train800val200.txt": "images/a.png 0\nimages/b.png 1\n", "test.txt": "images/b.png 1\n",
    },
    "fgvc": {"train.json": '{"a.png": 1, "b.png": 2}', "val.json": '{"c.png": 1}', "test.json": '{"d.png": 2}'},
    "birds": {
        "images.txt": "1 x/a.png\n2 y/b.png\n", "image_class_labels.txt": "1 1\n2 2\n",
        "train_test_split.txt": "1 1\n2 0\n",
    },
}  # fmt: skip


@some(10)
@given(DATA)
def test_published_lists(data):
    draw = data.draw
    lists = {name: text.encode() for name, text in LISTS[draw(st.sampled_from(sorted(LISTS)))].items()}
    name = draw(st.sampled_from(sorted(lists)))
    if name.endswith("json") and draw(st.booleans()):
        lists[name] = json.dumps(changed(json.loads(lists[name]), draw)).encode()
    else:
        lists[name] = edited(lists[name], draw)
    with scratch() as folder:
        for place in ("images", "images/x", "images/y"):
            (folder / place).mkdir()
            for image in "abcd":
                shutil.copy(world() / "images/class0/000.png", folder / place / f"{image}.png")
        for name, raw in lists.items():
            (folder / name).write_bytes(raw)
        more = draw(st.sampled_from([[], ["--split=train"], ["--split=test"], ["--check=none"]]))
        keeps_its_promise("evaluate", world() / "run", folder, "--device=cpu", *more, "--json")
