"""Commands and their folders: nothing that is read is written over, one process at a time, true hints."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from training_helpers import TINY, write_images

from lion_fast.commands.main import main
from lion_fast.files import output_folder
from lion_fast.studies import experiment
from lion_fast.training import Settings, checkpoints

TINY_FLAGS = ["--backbone", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--device", "cpu"]
TINY_FLAGS += [f"--backbone-set={key}={value}" for key, value in TINY.items()] + ["--epochs", "2"]
FIXED = ["--set", "reading=fixed"]  # so that there are states to prune


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with photos/ and a run base/ on them."""
    root = tmp_path_factory.mktemp("made")
    write_images(root / "photos", each=8)
    assert main(["finetune", str(root / "photos"), "--out", str(root / "base"), *TINY_FLAGS, *FIXED]) == 0
    return root


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    text = Path("base/config.yaml").read_text().replace(str(made) + "/", "")
    Path("base/config.yaml").write_text(text)
    shutil.copytree("base", "other")
    shutil.copytree("base/adapter", "adapter")
    Path("again").mkdir()
    Path("again/config.yaml").write_text(text.replace("out: base", "out: again"))
    Path("link").symlink_to("base")
    return tmp_path / "here"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        "prune base --keep 0.1 --out base", "prune base --keep 0.1 --out link",
        "prune base/adapter --keep 0.1 --out base", "prune base --keep 0.1 --out base/adapter",
        "prune base --keep 0.1 --out base/adapter/in", "prune adapter --keep 0.1 --out adapter",
        "prune base --keep 0.1 --out other", "prune base --keep 0.5 --granularity unit --compact",
        "finetune photos --out photos", "finetune photos --out photos/run",
        "finetune photos --out photos/../photos",
        "finetune --config again/config.yaml",
        "predict base photos/class0/000.png --out photos/class0/000.png",
        "predict base photos --out photos/class0/000.png",
        "predict base photos --out base/adapter/adapter.json",
        "predict base photos --out adapter/../base/adapter/adapter.safetensors",
        "profile base --images photos --out photos/profile",
        "vtab --root photos --out photos", "vtab --root photos --out photos/x",
    ],
)  # fmt: skip
def test_no_command_writes_over_what_it_reads(here, command, capsys):
    before = content(here)
    assert main(command.split()) in (1, 2)
    assert content(here) == before
    assert sum(bool(line) for line in capsys.readouterr().err.splitlines()) == 1


def test_settings_of_a_run_that_never_began_are_written_over_when_that_is_said(here):
    assert main([*"finetune --config again/config.yaml --overwrite".split()]) == 0
    assert main(["finetune", "--config", "again/config.yaml", "--resume"]) == 0


def test_a_run_is_pruned_from_inside_it(here, monkeypatch):
    monkeypatch.chdir("base")
    random = [*"--keep 0.5".split()]
    assert main(["prune", ".", *random]) == 0
    monkeypatch.chdir("adapter")
    assert main(["prune", "..", *random]) == 0
    assert (here / "base-pruned" / "adapter" / "adapter.json").is_file()
    assert not (here / "base" / "adapter-pruned").exists()


@pytest.mark.parametrize(
    "command",
    ["finetune photos --out base", "finetune photos --out base --overwrite", "finetune photos --out new",
     "finetune --config base/config.yaml --resume", "prune base --keep 0.5 --out new"],
)  # fmt: skip
def test_a_folder_that_another_process_writes_to_is_left_alone(here, command, capsys):
    folder = here / ("new" if "new" in command else "base")
    with output_folder(folder), ThreadPoolExecutor(1) as pool:
        before = content(here)
        more = TINY_FLAGS if "photos" in command else []
        assert pool.submit(main, [*command.split(), *more]).result() == 2
        assert content(here) == before
    assert "another run" in capsys.readouterr().err


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interruption_says_what_goes_on_and_what_does_not(here, monkeypatch, capsys):
    monkeypatch.setattr(Settings, "create", interrupt)
    monkeypatch.setattr(experiment, "check", interrupt)
    assert main(["finetune", "photos", "--out", "new", *TINY_FLAGS]) == 130
    told = capsys.readouterr().err
    assert "interrupted" in told and "begins anew" in told and "--resume" not in told
    assert main(["finetune", "--config", "base/config.yaml", "--resume"]) == 130
    assert "finetune --config base/config.yaml --resume" in capsys.readouterr().err
    assert main(["demo", "--out", "demo"]) == 130
    told = capsys.readouterr().err
    assert "interrupted" in told and "begins anew" in told and "resume" not in told


def test_what_cannot_be_pruned_is_told_before_training(here):
    assert (
        main(["finetune", "photos", "--out", "new", "--method", "probe", "--prune", "0.5", *TINY_FLAGS]) == 2
    )
    assert not checkpoints.list_checkpoints(Path("new/checkpoints"))


@pytest.mark.parametrize(
    "command", ["finetune photos", "prune base --keep 0.5", "demo", "profile base", "bench"]
)
@pytest.mark.parametrize("out", ["file", "file/in", "dangling"])
def test_an_output_that_cannot_be_is_one_line(here, command, out, capsys):
    Path("file").write_text("x")
    Path("dangling").symlink_to("nowhere/at/all")
    more = TINY_FLAGS if "finetune" in command else []
    assert main([*command.split(), "--out", out, *more]) in (1, 2)
    assert Path("dangling").is_symlink() and not Path("nowhere").exists()
    assert Path("file").read_text() == "x"
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "error:" in line] == told[-1:] and out in told[-1]


def test_a_run_that_chose_what_it_reads_goes_on_with_it(here):
    given = [*TINY_FLAGS, "--set", "grid=2", "--set", "state_dim=4", "--no-progress"]
    assert main(["finetune", "photos", "--out", "chosen", *given]) == 0
    before = content(Path("chosen/adapter"))
    told = json.loads(before["adapter.json"])
    assert told["options"]["reading"] == "auto" and told["chosen"]["grid"] == 2
    shutil.rmtree(checkpoints.list_checkpoints(Path("chosen/checkpoints"))[-1])
    shutil.rmtree("chosen/adapter")
    assert main(["finetune", "--config", "chosen/config.yaml", "--resume", "--no-progress"]) == 0
    assert content(Path("chosen/adapter")) == before
