"""The split of a run, used again by evaluate, predict and --resume while the images change under them."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from training_helpers import TINY, write_images

from lion_fast.commands.main import main
from lion_fast.data.record import read_record

CPU = ["--device", "cpu"]
FLAGS = ["--backbone", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--method", "probe"]
FLAGS += [f"--backbone-set={key}={value}" for key, value in TINY.items()]
FLAGS += ["--epochs", "1", "--batch-size", "16", *CPU, "--no-progress"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with images in photos/ and a run of them in run/, begun from a relative path."""
    home = tmp_path_factory.mktemp("recorded")
    write_images(home / "photos")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["finetune", "photos", "--out", "run", *FLAGS]) == 0
    return home


@pytest.fixture
def home(whole, tmp_path) -> Path:
    """A copy of them, whose run has the images beside it."""
    shutil.copytree(whole, tmp_path / "home")
    config = tmp_path / "home" / "run" / "config.yaml"
    values = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump(values | {"data": str(tmp_path / "home" / "photos")}))
    return tmp_path / "home"


@pytest.fixture
def told(capsys):
    """What a command tells as JSON, and what it says beside it."""

    def run(*argv) -> tuple[dict, str]:
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == 0
        out, said = capsys.readouterr()
        return json.loads(out), said

    return run


def add(folder: Path, count: int, start: int = 500) -> None:
    """Images that are in none of the parts, under names that come first."""
    write_images(folder.parent / "more", each=40)
    for i in range(count):
        shutil.copy(
            folder.parent / "more" / f"class{i % 3}" / f"{30 + i // 3:03d}.png",
            folder / f"class{i % 3}" / f"a{i}.png",
        )


def old(run: Path) -> None:
    """As a run was before its split was written down."""
    (run / "split.csv").unlink()


def test_a_run_writes_its_split_and_where_its_data_are(whole):
    record = read_record(whole / "run" / "split.csv")
    assert [len(rows) for rows in record.parts.values()] == [36, 12, 12]
    assert yaml.safe_load((whole / "run" / "config.yaml").read_text())["data"] == str(whole / "photos")
    splits = json.loads((whole / "run" / "splits.json").read_text())
    assert splits["fingerprint"] == record.fingerprint()
    assert splits["duplicates"]["across"]["count"] == 0


def test_evaluate_uses_the_recorded_items_after_images_were_added(home, told, monkeypatch):
    before = json.loads((home / "run" / "results.json").read_text())["test"]
    monkeypatch.chdir(home.parent)  # from any folder
    add(home / "photos", 9)
    found, said = told("evaluate", home / "run", *CPU)
    assert found["n"] == 12 and found["accuracy"] == before["accuracy"]
    assert found["loss"] == pytest.approx(before["loss"], abs=1e-6)
    assert found["changes"]["new"]["count"] == 9 and "a0.png" in said
    assert found["training_images"] == 0
    (home / "photos" / read_record(home / "run" / "split.csv").parts["train"][0].name).unlink()
    found, said = told("evaluate", home / "run", *CPU)
    assert found["accuracy"] == before["accuracy"] and found["changes"]["missing"]["count"] == 1


def test_images_that_moved_are_found_where_the_settings_say(home, capsys, told):
    before = json.loads((home / "run" / "results.json").read_text())["test"]["accuracy"]
    (home / "photos").rename(home / "elsewhere")
    assert main(["evaluate", str(home / "run"), *CPU]) == 1
    assert "data: in" in capsys.readouterr().err
    config = home / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(home / "photos"), str(home / "elsewhere")))
    assert told("evaluate", home / "run", *CPU)[0]["accuracy"] == before


def test_evaluate_refuses_where_a_recorded_image_is_gone(home, capsys):
    gone = read_record(home / "run" / "split.csv").parts["test"][0].name
    (home / "photos" / gone).unlink()
    assert main(["evaluate", str(home / "run"), *CPU]) == 1
    assert gone in capsys.readouterr().err.splitlines()[-1]
    assert main(["evaluate", str(home / "run"), "--split", "val", *CPU]) == 0


def test_a_run_without_a_record_is_compared_with_its_description(home, capsys, told):
    old(home / "run")
    before = json.loads((home / "run" / "results.json").read_text())["test"]
    assert told("evaluate", home / "run", *CPU)[0]["accuracy"] == before["accuracy"]
    add(home / "photos", 9)
    for command in (["evaluate"], ["finetune", "--resume", "--out"]):
        more = ["--config", str(home / "run" / "config.yaml")] if "finetune" in command else CPU
        assert main([*command, str(home / "run"), *more]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "class0, now" in error and "train had 12 images" in error
    found, said = told("evaluate", home / "run", home / "photos", *CPU)
    assert found["n"] == 69 and found["training_images"] is None and "not written down" in said
    (home / "run" / "splits.json").unlink()
    assert "drawn anew" in told("evaluate", home / "run", *CPU)[1]


def test_how_many_of_other_images_were_trained_on(home, told):
    found, said = told("evaluate", home / "run", home / "photos", *CPU)
    assert found["n"] == 60 and found["training_images"] == 36
    assert "36 of these 60 images are training images" in said
    shutil.copytree(home / "photos", home / "elsewhere")
    shutil.rmtree(home / "photos")
    assert told("evaluate", home / "run" / "adapter", home / "elsewhere", *CPU)[0]["training_images"] == 36
    found, said = told("predict", home / "run", home / "elsewhere", *CPU)
    assert found["training_images"] == 36 and "36 of these 60" in said


def test_a_copy_of_a_training_image_in_the_test_part_is_said(home, told, capsys):
    record = read_record(home / "run" / "split.csv")
    shutil.copy(
        home / "photos" / record.parts["train"][0].name, home / "photos" / record.parts["test"][0].name
    )
    found, said = told("evaluate", home / "run", *CPU)
    assert found["training_images"] == 1 and found["changes"]["changed"]["count"] == 1
    assert "1 of these 12" in said and record.parts["test"][0].name in said
    assert main(["finetune", str(home / "photos"), "--out", str(home / "new"), *FLAGS]) == 0
    said = capsys.readouterr().err
    assert "with the same content" in said and record.parts["test"][0].name in said
    strict = ["finetune", str(home / "photos"), "--out", str(home / "strict"), "--strict", *FLAGS]
    assert main(strict) == 1 and main([*strict, "--duplicates", "none"]) == 0


def test_resume_takes_the_recorded_images_or_says_which_are_gone(home, capsys):
    resume = [
        "finetune",
        "--config",
        str(home / "run" / "config.yaml"),
        "--out",
        str(home / "run"),
        "--resume",
    ]
    before = json.loads((home / "run" / "results.json").read_text())["test"]["accuracy"]
    add(home / "photos", 9)
    assert main(resume) == 0
    said = capsys.readouterr().err
    assert "a0.png" in said
    assert json.loads((home / "run" / "results.json").read_text())["test"]["accuracy"] == before
    for change, told in (
        (["--n-train", "9"], "n_train was None, now 9"),
        (["--seed", "3"], "seed was 0, now 3"),
    ):
        assert main([*resume, *change]) == 1
        assert told in capsys.readouterr().err.splitlines()[-1]
    gone = read_record(home / "run" / "split.csv").parts["train"][0].name
    (home / "photos" / gone).unlink()
    assert main(resume) == 1
    assert gone in capsys.readouterr().err.splitlines()[-1]


def test_a_record_of_another_run_is_refused(home, capsys):
    path = home / "run" / "split.csv"
    with open(path, newline="") as file:
        table = list(csv.reader(file))
    table[1][2] = "test"  # a training image is called a test image by hand
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(table)
    assert main(["evaluate", str(home / "run"), *CPU]) == 1
    assert "different splits" in capsys.readouterr().err.splitlines()[-1]
    path.write_text("import os; os.system('x')\n")
    assert main(["evaluate", str(home / "run"), *CPU]) == 1
    assert "no record" in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_record_blocks_no_other_data(home, told):
    (home / "run" / "split.csv").write_bytes(b"\xff\x00")
    assert main(["evaluate", str(home / "run"), *CPU]) == 1
    for command in ("evaluate", "predict"):
        result, said = told(command, home / "run", home / "photos", *CPU)
        assert result["training_images"] is None and "split.csv" in said
