"""The command line, run as a user runs it; most of it in this process, the signals in another."""

import argparse
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import TINY, wait_for_step, write_images

import lion_fast
from lion_fast.commands.common import flag
from lion_fast.commands.main import COMMANDS, main
from lion_fast.data import load_data, transforms
from lion_fast.errors import AdapterError
from lion_fast.options import default_of, kind
from lion_fast.studies.vtab import DECIDED
from lion_fast.training.presets import preset
from lion_fast.training.settings import PARTS, ModelSettings, TrainConfig

ROOT = Path(__file__).parents[2]
CPU = ["--device", "cpu"]
SHORT = ["--epochs", "1", *CPU, "--no-progress"]
TRAIN = ["--epochs", "3", "--batch-size", "16", "--lr", "1e-2", *CPU, "--no-progress"]
TINY_FLAGS = [f"--backbone-set={key}={value}" for key, value in TINY.items()]


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("cli-images"))


@pytest.fixture(scope="session")
def model_flags(tmp_path_factory) -> list[str]:
    """Flags of a tiny ViT whose weights are in a file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY)
    save_file(model.state_dict(), path)
    return ["--backbone", "vit_tiny_patch16_224", "--weights", str(path), "--img-size", "32", *TINY_FLAGS]


@pytest.fixture(scope="session")
def trained(images, model_flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    lion = ["--set", "state_dim=8", "--set", "form=residual"]
    assert main(finetune(images, out, *lion, *model_flags, *TRAIN)) == 0
    return out


def finetune(data, out, *more) -> list[str]:
    return ["finetune", str(data), "--out", str(out), *more]


@pytest.fixture
def told(capsys):
    """What a command tells as JSON."""

    def run(*argv) -> dict:
        capsys.readouterr()
        assert main([*map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def config_of(out: Path) -> dict:
    return yaml.safe_load((out / "config.yaml").read_text())


def test_finetune_writes_everything(trained, images):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "adapter", "checkpoints", "config.yaml", "metrics.csv", "results.json", "splits.json", "steps.csv",
    }  # fmt: skip
    results = json.loads((trained / "results.json").read_text())
    assert results["parameters"] == {"dense": 1232, "kept": 1232, "with_head": 1331}  # 2 (2RD + R^2 + R + D)
    assert results["test"]["n"] == 12 and results["fit"]["epochs"] == 3
    assert results["settings"]["lr"] == {"value": 0.01, "default": 0.001, "from": "the command line"}
    splits = json.loads((trained / "splits.json").read_text())
    assert splits["seed"] == 0 and splits["sizes"] == {"train": 36, "val": 12, "test": 12}
    config = config_of(trained)
    assert (config["lr"], config["seed"], config["data"]) == (0.01, 0, str(images))
    assert config["options"] == {"state_dim": 8, "form": "residual"}


def test_the_saved_adapter_is_the_evaluated_one(trained, images, told, capsys):
    found = told("evaluate", trained, *CPU)
    assert found["accuracy"] == json.loads((trained / "results.json").read_text())["test"]["accuracy"]
    model = lion_fast.load_adapter(trained / "adapter")
    test = load_data(images).test.with_transform(transforms(model.backbone))
    with torch.no_grad():
        right = [int(model(image[None]).argmax()) == label for image, label in test]
    assert found["accuracy"] == sum(right) / len(right) and found["n"] == len(right)
    assert set(found["recall"]) == {"class0", "class1", "class2"}
    # and on other data, in words
    assert main(["evaluate", str(trained / "adapter"), str(images), *CPU]) == 0
    said = capsys.readouterr().out
    assert "60 images" in said and re.search(r"recall of class2 +[01]\.\d{4} of 20", said)


def test_a_config_file_gives_the_same_run_and_flags_win(trained, tmp_path, told):
    same = config_of(trained) | {"out": str(tmp_path / "again"), "method": None}
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(same))
    config = ["finetune", "--config", str(tmp_path / "same.yaml"), "--no-progress"]
    assert main(config) == 0
    ours, theirs = (load_file(out / "adapter/adapter.safetensors") for out in (tmp_path / "again", trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = told(*config, "--out", tmp_path / "other", "--set", "state_dim=4", "--epochs", "1")
    assert found["options"]["state_dim"] == 4 and found["fit"]["epochs"] == 1


def test_what_the_preset_set_is_said_before_training(images, model_flags, tmp_path, capsys):
    assert main(finetune(images, tmp_path / "a", *model_flags, *SHORT)) == 0
    said = capsys.readouterr().err.split("epoch 1 of 1")[0]
    config, few = config_of(tmp_path / "a"), preset("lion", "few").train
    assert config["preset"] == "few" and config["epochs"] == 1 and "preset: few" in said
    for name in ("lr", "weight_decay", "batch_size", "keep"):
        assert config[name] == few[name]
        default = getattr(TrainConfig(), name)
        assert f"  {name}: {few[name]} [{default}], from preset few\n" in said
    assert "  epochs: 1 [20], from the command line\n" in said and "warmup" not in said


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--set", "stat_dim=8"], "unknown option of lion 'stat_dim'; did you mean state_dim?"),
        (["--set", "oops"], "--set takes KEY=VALUE; got 'oops'"),
        (["--method", "lionn"], "no method named 'lionn'; the methods are "),
        (["--method", "vpt", "--preset", "auto"], "preset auto is for lion"),
        (["--lr", "-1"], "lr must be a finite number above 0"),
        (["--config", "missing.yaml"], "the config file missing.yaml cannot be read"),
        (["--config", "binary.yaml"], "cannot be read"),
        (["--config", "broken.yaml"], "is not YAML"),
        (["--config", "list.yaml"], "must hold"),
        (["--config", "unknown.yaml"], "'epoch'; did you mean epochs?"),
    ],
)
def test_a_wrong_option_is_told_in_one_line_with_code_2(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("binary.yaml").write_bytes(b"method: \xff\xfe")
    for name, text in (("unknown", "epoch: 3"), ("broken", "a: [1"), ("list", "[1]")):
        Path(f"{name}.yaml").write_text(text)
    # before any image is looked for, and before the folder of results is begun
    assert main(finetune("no such images", "out", *arguments)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("lion-fast finetune: error: ") and said in error and not Path("out").exists()


@pytest.mark.parametrize("option, said", [("gamma=1.5", "gamma must be"), ("backend=triton", "cannot run: ")])
def test_an_option_that_the_method_refuses_is_code_2(images, model_flags, tmp_path, capsys, option, said):
    assert main(finetune(images, tmp_path / "out", *model_flags, *CPU, "--set", option)) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "command, said",
    [
        (["finetune", "nowhere"], "'nowhere' is neither an existing folder"),
        (["evaluate", "nowhere"], "no adapter.json in nowhere"),
        (["predict", "nowhere", "x.png"], "no adapter.json in nowhere"),
        (["predict", "TRAINED", "holidya.png"], "there is no file or folder holidya.png"),
        (["finetune", "nowhere", "--resume"], "there is no checkpoint in"),
    ],
)
def test_input_that_cannot_be_used_is_code_1(trained, command, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [str(trained) if word == "TRAINED" else word for word in command]
    assert main(command) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert said in error
    with pytest.raises(lion_fast.errors.LionError):
        main([*command, "--debug"])


def test_a_wrong_command_line_is_code_2_and_none_prints_the_help(capsys):
    for arguments in (["finetune", "--epochs", "many"], ["train"], ["evaluate"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(f"    {name}" in said for name in COMMANDS)


OFFERED = {
    "finetune": {name for part in PARTS.values() for name in part.names()} - {"data"},
    "evaluate": {"check", "strict", "cache"},
    "vtab": {"check", "strict", "duplicates", *ModelSettings.names(), *TrainConfig.names()}
    - {"preset", *DECIDED},
    "profile": {"weights", "pretrained", "img_size", "method", "options", "backbone_options"},
}
OTHER_DEFAULTS = {"vtab": {"resize", *TrainConfig.names()}, "profile": {"pretrained"}}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples_and_every_option_with_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and f"examples:\n  lion-fast {command}" in said
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    for action in parser._actions[1:]:
        assert action.help and " ".join(action.help.replace("%%", "%").split()) in said, action
        if action.default not in (None, False, argparse.SUPPRESS):
            assert f"{action.default}".strip("[]") in action.help, action
    offered = {action.dest: action for action in parser._actions if action.default == argparse.SUPPRESS}
    assert offered.keys() - {"help", "data"} == OFFERED.get(command, set())
    for option in (o for part in PARTS.values() for o in fields(part) if o.name in offered):
        action = offered[option.name]
        assert option.name == "data" or flag(option.name) in action.option_strings
        assert action.help.startswith(option.metadata["help"])
        elsewhere = {"data", *OTHER_DEFAULTS.get(command, ())}
        if option.name not in elsewhere and kind(option) is not dict:
            assert action.help.endswith(f"[{default_of(option)}]")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_quick(command):
    code = f"from lion_fast.commands.main import main; main({[*command, '--help']})"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "lion_fast.commands.finetune" in loaded
    assert not loaded & {"torch", "timm", "accelerate", "torchvision", "matplotlib"}


def test_finetune_refuses_to_overwrite_and_resumes_a_finished_run(trained, tmp_path, capsys):
    out = shutil.copytree(trained, tmp_path / "run")  # what resumes writes the results anew
    config = ["finetune", "--config", str(out / "config.yaml"), "--out", str(out)]
    weights = out / "adapter/adapter.safetensors"
    before = (out / "config.yaml").read_bytes(), load_file(weights)
    assert main(config) == 1
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert main([*config, "--resume"]) == 0
    assert main([*config, "--resume", "--lr", "0.5"]) == 1
    assert "config.lr was 0.01, now 0.5" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before[0]
    after = load_file(weights)
    assert after.keys() == before[1].keys() and all(torch.equal(after[k], before[1][k]) for k in after)


def test_ctrl_c_exits_130_with_a_hint_that_works(images, model_flags, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lion_fast", *finetune(images, out, *model_flags, *TRAIN)]
    command += ["--epochs", "400", "--log-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(process, out, 5)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=180)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said and "interrupted; the checkpoint" in said
    hint = said.split("resume with: lion-fast ")[1].split()
    assert hint == ["finetune", "--config", str(out / "config.yaml"), "--resume"]
    assert main([*hint, "--epochs", "1"]) == 1  # found, and told that it is of a longer run
    assert config_of(out)["epochs"] == 400


def test_predict_writes_what_the_model_says_and_names_what_it_cannot_read(trained, images, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (images / "class1/000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("a.png", "sub/b.PNG"):
        Image.open(images / "class2/001.png").save(tmp_path / name, format="png")
    assert main(["predict", str(trained), str(tmp_path), "--top-k", "2", *CPU]) == 0
    out, error = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.PNG"]
    assert "2 of 4 images could not be read" in error and "broken.png" in error and "cut.png" in error
    model = lion_fast.load_adapter(trained / "adapter")
    with torch.no_grad():
        view = transforms(model.backbone)
        chances = model(view(Image.open(images / "class2/001.png"))[None]).softmax(1)[0]
    values, places = chances.topk(2)
    for row in rows:
        assert [row["class"], row["class_2"]] == [model.classes[i] for i in places]
        assert float(row["probability"]) == pytest.approx(values[0].item(), abs=2e-6)
        assert float(row["probability_2"]) == pytest.approx(values[1].item(), abs=2e-6)


def test_predict_to_a_file_strictly_and_as_json(trained, images, tmp_path, capsys, told):
    out, bad = tmp_path / "classes.csv", tmp_path / "bad.jpg"
    predict = ["predict", str(trained), *CPU]
    assert main([*predict, str(images / "class0"), "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 21
    bad.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for wrong in ([bad, "--strict"], [bad], [tmp_path / "empty"], [images, "--out", tmp_path]):
        assert main([*predict, *map(str, wrong)]) == 1
    assert "cannot write" in capsys.readouterr().err
    found = told(*predict, images, bad)
    assert len(found["predictions"]) == 60 and [s["path"] for s in found["skipped"]] == [str(bad)]


def test_info_of_an_adapter(trained, images, capsys, told):
    found = told("info", trained, "--images", images / "class0")
    assert found["parameters"] == {"dense": 1232, "kept": 1232, "with_head": 1331}
    assert found["measured_on"] == "20 given images"
    model = lion_fast.load_adapter(trained / "adapter")
    for name, end in found["ends"].items():
        layer = getattr(model, f"{name}_end")
        exact = torch.linalg.matrix_norm(layer.recurrence_matrix().detach().double(), 2).item()
        assert exact * 0.999 <= end["certified"] <= 0.8 * (1 + 1e-5)
        assert 0 < end["rate"] <= end["certified"] and end["iterations"] <= end["max_iterations"] <= 50
    assert main(["info", str(trained)]) == 0
    said = capsys.readouterr().out
    assert "8 random-normal images" in said and "input end: gamma 0.8, certified bound" in said


def test_the_measured_rate_is_that_of_a_known_map():
    """Tokens that keep every unit active make the iteration linear: its rate is W's largest eigenvalue."""
    from lion_fast.inspection import _bound_and_rate

    layer = lion_fast.LionLayer(4, 2)
    with torch.no_grad():
        layer.W.copy_(torch.tensor([[0.6, 0.0], [0.0, 0.1]]))
        layer.b.fill_(5.0)
        layer.A.mul_(0.01)
    certified, rate = _bound_and_rate(layer, torch.randn(50, 4))
    assert rate == pytest.approx(0.6, abs=1e-3) and 0.6 <= certified < 0.63


def test_info_of_the_installation_and_the_methods(told):
    found = told("info")
    assert (found["torch"], found["lion_fast"]) == (torch.__version__, lion_fast.__version__)
    assert found["triton"] or found["triton_reason"]
    found = told("info", "--methods")
    assert found["lion"]["options"]["gamma"] == 0.8 and {"lion", "probe", "vpt"} <= found.keys()


def test_a_backbone_of_random_weights_is_made_again_from_its_seed(images, tmp_path, told):
    flags = ["--backbone", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--seed", "3"]
    results = told(*finetune(images, tmp_path / "a", *flags, *TINY_FLAGS, *TRAIN))
    assert told("evaluate", tmp_path / "a", *CPU)["accuracy"] == results["test"]["accuracy"]


def test_the_resize_of_training_is_kept_by_evaluate_and_predict(model_flags, tmp_path, capsys, told):
    rng = torch.Generator().manual_seed(0)
    for k in range(2):  # wide images that differ at their edges only, which a crop cuts off
        (tmp_path / "wide" / str(k)).mkdir(parents=True)
        for i in range(8):
            pixels = torch.randint(0, 60, (32, 96, 3), generator=rng, dtype=torch.uint8).numpy()
            pixels[:, :20] += 180 * k
            Image.fromarray(pixels).save(tmp_path / "wide" / str(k) / f"{i}.png")
    out = tmp_path / "out"
    command = finetune(tmp_path / "wide", out, "--method", "probe", *model_flags, *TRAIN, "--epochs", "20")
    results = told(*command, "--resize", "direct")
    assert results["test"]["accuracy"] == 1.0  # the crop sees noise
    found = told("evaluate", out, *CPU)
    assert (found["accuracy"], found["loss"]) == (1.0, pytest.approx(results["test"]["loss"], abs=1e-6))
    predictions = told("predict", out, tmp_path / "wide" / "1", *CPU)["predictions"]
    assert {row["class"] for row in predictions} == {"1"}
    assert main([*command, "--resume"]) == 1  # another resize is another run
    assert "backbone" in capsys.readouterr().err
    model = lion_fast.load_adapter(out / "adapter")
    assert model.backbone.resize == "direct"
    crop = lion_fast.load_backbone(
        model.backbone.name, weights=model_flags[3], img_size=32, **model.backbone.request["timm_kwargs"]
    )
    with pytest.raises(AdapterError, match="resize direct"):
        lion_fast.load_adapter(out / "adapter", crop)


def test_an_adapter_from_before_resize_was_a_choice_loads(trained, tmp_path):
    description = json.loads((trained / "adapter" / "adapter.json").read_text())
    assert description["normalisation"].pop("resize") == "crop"
    description["backbone"]["request"].pop("resize")
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    shutil.copy(trained / "adapter" / "adapter.safetensors", tmp_path)
    assert lion_fast.load_adapter(tmp_path).backbone.resize == "crop"


@pytest.mark.parametrize(
    "change, said", [({"test": 0.0}, "no test images"), ({"data": "OTHER"}, "other classes")]
)
def test_evaluate_refuses_what_is_no_longer_there(trained, tmp_path, capsys, change, said):
    if "data" in change:
        change = {"data": str(write_images(tmp_path / "other", classes=2))}
    (tmp_path / "adapter").symlink_to(trained / "adapter")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_of(trained) | change))
    assert main(["evaluate", str(tmp_path), "--split", "test", *CPU]) == 1
    assert said in capsys.readouterr().err


def test_unreadable_images_are_named_before_training(model_flags, tmp_path, capsys):
    folder = write_images(tmp_path / "photos")
    (folder / "class0" / "bad.png").write_bytes(b"no image")
    assert main(finetune(folder, tmp_path / "out", "--method", "probe", *model_flags, *SHORT)) == 0
    said = capsys.readouterr().err
    assert "1 unreadable images" in said and "bad.png" in said


def test_a_config_of_another_tool_beside_an_adapter_is_not_read(trained, images, tmp_path, capsys):
    (tmp_path / "adapter").symlink_to(trained / "adapter")
    (tmp_path / "config.yaml").write_text("model: {name: x}\ndata: {root: y}\n")
    assert main(["predict", str(tmp_path), str(images / "class0"), *CPU]) == 0
    assert main(["evaluate", str(tmp_path), *CPU]) == 2
    assert "name the DATA" in capsys.readouterr().err
