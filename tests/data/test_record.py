"""Splits written down by item and used again; sources that changed since; records that were tampered with."""

import csv
import os
import unicodedata

import pytest
from image_helpers import sizes, write_image, write_noise

from lion_fast.data import load_data
from lion_fast.data.record import COLUMNS, count_trained, read_record
from lion_fast.errors import DataError, OptionError

PARTS = ("train", "val", "test")


@pytest.fixture
def photos(tmp_path):
    """10 images of each of two classes, no two alike."""
    root = tmp_path / "photos"
    for k, name in enumerate(("cat", "dog")):
        for i in range(10):
            write_noise(root / name / f"{i}.png", 100 * k + i, (12, 10))
    return root


def names(splits):
    return {part: images.names for part in PARTS if (images := getattr(splits, part)) is not None}


def again(source, record, **options):
    return load_data(source, record=record, **options)


def rows_of(record):
    with open(record, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.reader(file))


def test_a_record_gives_the_same_items_when_images_were_added(photos, tmp_path):
    before = load_data(photos, n_train=7)
    before.save(tmp_path / "split.csv")
    for i in range(5):
        write_noise(photos / "cat" / f"a{i}.png", 500 + i)
    write_noise(photos / "bee" / "0.png", 600)  # and a class, which sorts first
    drawn, found = load_data(photos, n_train=7), again(photos, tmp_path / "split.csv")
    assert set(drawn.test.names) & set(before.train.names)  # what the record is for
    assert names(found) == names(before) and found.classes == ["cat", "dog"]
    assert [found.test.labels.tolist(), found.train.labels.tolist()] == [
        before.test.labels.tolist(), before.train.labels.tolist(),
    ]  # fmt: skip
    assert found.description["fingerprint"] == before.description["fingerprint"]
    new = found.description["changes"].pop("new")
    assert new["count"] == 6 and new["images"][0] == "bee/0.png" and not found.description["changes"]
    assert sorted(found.unused) == sorted(before.unused) and len(before.unused) == 5


def test_what_is_gone_is_an_error_for_the_parts_that_are_needed(photos, tmp_path):
    before, record = load_data(photos), tmp_path / "split.csv"
    before.save(record)
    gone = before.train.names[0]
    (photos / gone).rename(photos / "cat" / "renamed.png")
    with pytest.raises(DataError, match=f"{gone}.*renamed.png"):
        again(photos, record)
    found = again(photos, record, needed=("test",))
    assert found.test.names == before.test.names
    assert found.description["changes"]["missing"] == {"count": 1, "images": [gone]}
    (photos / before.test.names[0]).write_bytes(b"")  # there, but unreadable
    with pytest.raises(DataError, match=before.test.names[0]):
        again(photos, record, needed=("test",))


def test_a_class_folder_that_is_gone_or_renamed(photos, tmp_path):
    before, record = load_data(photos), tmp_path / "split.csv"
    before.save(record)
    (photos / "cat").rename(photos / "kitten")
    with pytest.raises(DataError, match=r"cat/.*new there: kitten/"):
        again(photos, record)
    (photos / "kitten").rename(photos / "cat")
    assert names(again(photos, record)) == names(before)
    for path in (photos / "cat").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="gone"):
        again(photos, record)


def test_other_content_is_said_and_not_for_parts_left_out(photos, tmp_path, capsys):
    before, record = load_data(photos), tmp_path / "split.csv"
    before.save(record)
    path = photos / before.val.names[1]
    path.write_bytes(path.read_bytes())  # the same bytes anew are no change
    assert again(photos, record).description["changes"] == {}
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # as large as before
    path.write_bytes(content)
    found = again(photos, record, check="none").description["changes"]
    assert found == {"changed": {"count": 1, "images": [before.val.names[1]]}}
    assert before.val.names[1] in capsys.readouterr().err
    assert again(photos, record, check="none", needed=("test",)).description["changes"] == {}


def test_the_split_of_a_csv_whose_rows_moved(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))

    def write(parts, prefix="", label=lambda p: p.parent.name):
        lines = [
            f"{prefix}{p.relative_to(tmp_path)},{label(p)},{s}" for p, s in zip(files, parts, strict=True)
        ]
        (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *lines]) + "\n")
        return tmp_path / "list.csv"

    table, record = write(["train", "train", "val", "test"] * 5), tmp_path / "split.csv"
    before = load_data(table)
    before.save(record)
    write(["test", "train", "train", "train"] * 5, prefix="./")
    found = again(table, record)
    assert names(found) == names(before)
    assert [image.tobytes() for image, _ in found.test] == [image.tobytes() for image, _ in before.test]
    moved = found.description["changes"]["moved"]["count"]
    assert moved == 5 + 5  # the first training image of four, and the test image; val may come from train
    write(
        ["train", "train", "val", "test"] * 5, label=lambda p: "dog" if p.name == "3.png" else p.parent.name
    )
    with pytest.raises(DataError, match=r"another label.*cat/3\.png \(was cat, now dog\)"):
        again(table, record)


def test_integer_labels_and_empty_classes_keep_their_numbers(photos, tmp_path):
    files = sorted(photos.rglob("*.png"))
    lines = [f"{p},{10 if p.parent.name == 'dog' else 2}" for p in files]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *lines]) + "\n")
    wanted = [f"c{k}" for k in range(12)]
    before, record = load_data(tmp_path / "list.csv", classes=wanted), tmp_path / "split.csv"
    before.save(record)
    assert read_record(record).classes == wanted
    found = again(tmp_path / "list.csv", record, classes=wanted)
    assert found.classes == wanted and found.train.labels.tolist() == before.train.labels.tolist()


@pytest.mark.parametrize("test", [0.2, 0])
def test_vtab_lists_and_what_is_not_opened(tmp_path, test):
    root = tmp_path / "cifar"
    for part, n in (("train800", 4), ("val200", 4), ("test", 4)):
        lines = [f"images/{part}/{i}.png {i % 2}" for i in range(n)]
        for i in range(n):
            write_noise(root / "images" / part / f"{i}.png", 10 * len(part) + i)
        (root / f"{part}.txt").write_text("\n".join(lines))
    (root / "train800val200.txt").write_text((root / "train800.txt").read_text() + "\n")
    before, record = load_data(root, test=test), tmp_path / "split.csv"
    before.save(record)
    assert sizes(again(root, record)) == [4, 4, 4 if test else 0]
    for path in (root / "images" / "test").iterdir():
        path.write_bytes(b"opened")
    found = again(root, record, needed=("val",))
    assert found.val.names == before.val.names and found.description["changes"] == {}
    load_data(root, val=0, test=0).save(record)
    assert names(again(root, record)) == {"train": before.train.names}


def test_built_in_sets_by_name(tmp_path):
    before, record = load_data("digits", n_per_class=2, n_test=20, n_val=10), tmp_path / "split.csv"
    before.save(record)
    found = again("digits", record)
    assert names(found) == names(before) and found.description["changes"] == {}
    assert count_trained(read_record(record), found.train.stored()) == 20
    assert count_trained(read_record(record), found.test.stored()) == 0


def test_names_of_every_kind_survive(tmp_path):
    odd = ["com,ma.png", 'quo"te.png', "new\nline.png", "cr\r.png", " space .png", "it's.png", "é.png"]
    odd.append(os.fsdecode(b"\xff\xfe.png"))
    for k, name in enumerate(("a", "b")):
        for i, file in enumerate(odd):
            write_noise(tmp_path / "d" / name / file, 100 * k + i)
    before, record = load_data(tmp_path / "d"), tmp_path / "split.csv"
    before.save(record)
    assert names(again(tmp_path / "d", record)) == names(before)
    assert {row[0] for row in rows_of(record)[1:]} == {f"{k}/{n}" for k in "ab" for n in odd}


def test_the_same_record_under_another_unicode_form_and_order(photos, tmp_path):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    (photos / "cat").rename(photos / composed)
    before, record = load_data(photos), tmp_path / "split.csv"
    before.save(record)
    (photos / composed).rename(photos / apart)  # as a copy on another file system
    found = again(photos, record)
    assert names(found) == names(before) and found.classes == before.classes
    assert found.description["fingerprint"] == before.description["fingerprint"]
    table = rows_of(record)
    with open(record, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    assert names(again(photos, record)) == names(before)


def test_two_names_in_two_unicode_forms_stay_two(photos, tmp_path):
    two = [unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD")]
    for i, name in enumerate(two):
        write_noise(photos / "cat" / name, 900 + i)
    load_data(photos, val=0, test=0).save(tmp_path / "split.csv")
    (photos / "cat" / two[1]).unlink()
    with pytest.raises(DataError, match="1 are gone"):
        again(photos, tmp_path / "split.csv")


def first(**values):
    """A change of the first row."""

    def change(table):
        table[1] = [values.get(name, value) for name, value in zip(COLUMNS, table[1], strict=True)]
        return table

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda table: [],
        lambda table: table[:1],
        lambda table: table[1:],
        lambda table: [["path", "label"], *table[1:]],
        lambda table: [*table, table[1]],
        lambda table: [*table, ["x.png"]],
        lambda table: [row for row in table if row[2] != "train"],
        first(split="holdout"),
        first(split=""),
        first(path=""),
        first(path="nul\0.png"),
        first(**{"class": "9" * 5000}),
        first(**{"class": "1000000000"}),
        first(**{"class": "-1"}),
        first(label="dog"),
        first(bytes="1e3"),
        first(bytes=""),
        first(sha256="=cmd()"),
        first(path="x" * 200_000),
    ],
)
def test_a_record_that_was_tampered_with_is_one_error(photos, tmp_path, change):
    record = tmp_path / "split.csv"
    load_data(photos).save(record)
    table = change(rows_of(record))
    with open(record, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)
    with pytest.raises(DataError) as error:
        again(photos, record)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "content", [b"\0\0\0", b"\xff\xfe\x00p", b'path,label,split,class,bytes,sha256\n"', b""]
)
def test_a_record_of_other_bytes_is_one_error(photos, tmp_path, content):
    (tmp_path / "split.csv").write_bytes(content)
    with pytest.raises(DataError):
        again(photos, tmp_path / "split.csv")
    with pytest.raises(DataError):
        again(photos, tmp_path)
    with pytest.raises(DataError):
        again(photos, tmp_path / "none.csv")
    with pytest.raises(DataError):
        again(photos, "nul\0.csv")


def test_a_record_says_which_images_there_are(photos, tmp_path):
    load_data(photos).save(tmp_path / "split.csv")
    for draw in ({"n_train": 3}, {"n_test": 3}, {"n_per_class": 2}, {"imbalance": 2.0}):
        with pytest.raises(OptionError, match=next(iter(draw))):
            again(photos, tmp_path / "split.csv", **draw)
    with pytest.raises(OptionError, match="record"):
        again(photos, load_data(photos))
    with pytest.raises(OptionError, match="needed"):
        again(photos, tmp_path / "split.csv", needed=("all",))


def test_training_images_are_counted_by_content_and_by_file(photos, tmp_path):
    splits = load_data(photos)
    splits.save(tmp_path / "split.csv")
    record = read_record(tmp_path / "split.csv")
    copies = [write_image(tmp_path / "other" / "none.png", 1)]
    for i, name in enumerate(splits.train.names[:3]):
        copies.append(tmp_path / "other" / f"{i}.png")
        copies[-1].write_bytes((photos / name).read_bytes())
    assert count_trained(record, list(map(str, copies))) == 3
    edited = photos / splits.train.names[0]
    write_noise(edited, 4242)
    (tmp_path / "link").symlink_to(photos)
    same = [str(edited), str(tmp_path / "link" / splits.train.names[1]), str(photos / splits.test.names[0])]
    assert count_trained(record, same) == 1  # by content alone
    assert count_trained(record, same, photos) == 2


def test_an_image_that_is_listed_twice_is_not_written_down(tmp_path):
    root = tmp_path / "fgvc"
    for i in range(4):
        write_noise(root / "images" / f"{i}.png", i)
    (root / "train.json").write_text('{"0.png": 0, "1.png": 1, "2.png": 0}')
    (root / "test.json").write_text('{"2.png": 0, "3.png": 1}')
    with pytest.raises(DataError, match=r"2\.png"):
        load_data(root, val=0).save(tmp_path / "split.csv")
