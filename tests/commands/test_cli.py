"""The command line, run as a user runs it; most of it in this process, the signals in another."""

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from training_helpers import TINY, write_images

import lion_fast
from lion_fast.commands.main import main
from lion_fast.data import load_data, transforms
from lion_fast.training.presets import preset


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("cli-images"))


@pytest.fixture(scope="session")
def model_flags(tmp_path_factory) -> list[str]:
    """Flags of a tiny ViT whose weights are in a file."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(
            timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY).state_dict(), path
        )
    flags = ["--backbone", "vit_tiny_patch16_224", "--weights", str(path), "--img-size", "32"]
    for key, value in TINY.items():
        flags += ["--backbone-set", f"{key}={value}"]
    return flags


TRAIN = ["--epochs", "3", "--batch-size", "16", "--lr", "1e-2", "--device", "cpu", "--no-progress"]


@pytest.fixture(scope="session")
def trained(images, model_flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained")
    lion = ["--set", "state_dim=8", "--set", "form=residual"]
    assert main(["finetune", str(images), "--out", str(out), *lion, *model_flags, *TRAIN]) == 0
    return out


def test_finetune_writes_everything(trained, images):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "adapter", "checkpoints", "config.yaml", "metrics.csv", "results.json", "splits.json", "steps.csv",
    }  # fmt: skip
    results = json.loads((trained / "results.json").read_text())
    assert results["parameters"] == {"dense": 1232, "kept": 1232, "with_head": 1331}  # 2 (2RD + R^2 + R + D)
    assert results["test"]["n"] == 12 and results["fit"]["epochs"] == 3
    splits = json.loads((trained / "splits.json").read_text())
    assert splits["seed"] == 0 and splits["sizes"] == {"train": 36, "val": 12, "test": 12}
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert (
        config["lr"] == 0.01
        and config["options"] == {"state_dim": 8, "form": "residual"}
        and config["seed"] == 0
    )


def test_the_saved_adapter_is_the_evaluated_one(trained, images, capsys):
    assert main(["evaluate", str(trained), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] == json.loads((trained / "results.json").read_text())["test"]["accuracy"]
    model = lion_fast.load_adapter(trained / "adapter")
    test = load_data(images).test.with_transform(transforms(model.backbone))
    with torch.no_grad():
        right = [int(model(image[None]).argmax()) == label for image, label in test]
    assert told["accuracy"] == sum(right) / len(right) and told["n"] == len(right)
    assert set(told["recall"]) == {"class0", "class1", "class2"}


def test_evaluate_on_other_data_and_in_words(trained, images, capsys):
    assert main(["evaluate", str(trained / "adapter"), str(images), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "60 images" in told and re.search(r"recall of class2 +[01]\.\d{4} of 20", told)


def test_a_config_file_gives_the_same_run_and_flags_win(trained, images, tmp_path, capsys):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    (tmp_path / "same.yaml").write_text(yaml.safe_dump(config | {"out": str(tmp_path / "again")}))
    assert main(["finetune", "--config", str(tmp_path / "same.yaml")]) == 0
    ours, theirs = (load_file(out / "adapter/adapter.safetensors") for out in (tmp_path / "again", trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    flags = ["--out", str(tmp_path / "other"), "--set", "state_dim=4", "--epochs", "1"]
    assert main(["finetune", "--config", str(tmp_path / "same.yaml"), *flags, "--json"]) == 0
    told = json.loads(capsys.readouterr().out.split("\n", 3)[3])
    assert told["options"]["state_dim"] == 4 and told["fit"]["epochs"] == 1


def test_one_split_for_several_seeds(images, model_flags, tmp_path):
    for name, flags in (
        ("a", ["--seed", "3", "--data-seed", "0"]),
        ("b", ["--seed", "0"]),
        ("c", ["--seed", "3"]),
    ):
        command = ["finetune", str(images), "--out", str(tmp_path / name), "--epochs", "1", *model_flags]
        assert main([*command, "--method", "probe", *flags]) == 0
    splits = [json.loads((tmp_path / name / "splits.json").read_text())["fingerprint"] for name in "abc"]
    heads = [load_file(tmp_path / name / "adapter/adapter.safetensors")["head.weight"] for name in "ab"]
    assert splits[0] == splits[1] != splits[2] and not torch.equal(*heads)


def test_numbers_as_people_write_them_in_yaml(images, model_flags, tmp_path):
    """YAML 1.1 takes 1e-2 for text."""
    (tmp_path / "c.yaml").write_text(
        f"data: {images}\nlr: 1e-2\nepochs: 1\nmethod: vpt\noptions: {{length: 3}}\n"
    )
    assert (
        main(["finetune", "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o"), *model_flags])
        == 0
    )
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert results["method"] == "vpt" and results["options"]["length"] == 3


@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--set", "stat_dim=8"], "method lion has no option stat_dim; its options are pool"),
        (["--set", "gamma=1.5"], "gamma must be"),
        (["--set", "oops"], "--set takes KEY=VALUE; got 'oops'"),
        (["--method", "lionn"], "no method named 'lionn'; the methods are "),
        (["--lr", "-1"], "lr must be a finite number above 0"),
        (["--config", "missing.yaml"], "the config file missing.yaml cannot be read"),
        (["--set", "backend=triton"], "backend=triton cannot run: "),
    ],
)
def test_a_wrong_option_is_told_in_one_line_with_code_2(
    images, model_flags, tmp_path, capsys, monkeypatch, arguments, told
):
    monkeypatch.chdir(tmp_path)
    code = main(["finetune", str(images), "--out", str(tmp_path / "out"), *model_flags, *arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("lion-fast finetune: error: ") and told in error


def test_an_unknown_setting_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("data: x\nepoch: 3\n")
    assert main(["finetune", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "'epoch'; did you mean epochs?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command,told",
    [
        (["finetune", "nowhere"], "'nowhere' is neither an existing folder"),
        (["evaluate", "nowhere"], "no adapter.json in nowhere"),
        (["predict", "nowhere", "x.png"], "no adapter.json in nowhere"),
        (["finetune", "nowhere", "--resume"], "there is no checkpoint in"),
    ],
)
def test_input_that_cannot_be_used_is_code_1(command, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    error = capsys.readouterr().err.strip()
    assert told in error and len(error.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lion_fast.errors.DataError):
        main(["finetune", "nowhere", "--debug"])


@pytest.mark.parametrize("arguments", [["finetune", "--epochs", "many"], ["train"], ["evaluate"]])
def test_a_wrong_command_line_is_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize("command", ["finetune", "evaluate", "predict", "info", "demo"])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    told = capsys.readouterr().out
    assert stopped.value.code == 0 and "examples:" in told and f"lion-fast {command}" in told


def test_every_training_option_has_a_flag_with_help(capsys):
    from dataclasses import fields

    from lion_fast.training import TrainConfig

    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    told = capsys.readouterr().out
    for field in fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        assert re.search(rf"{flag}[ ,].*\n?\s+\S", told), flag


def test_finetune_refuses_to_overwrite_and_resumes_a_finished_run(trained, capsys):
    config = ["finetune", "--config", str(trained / "config.yaml")]
    weights = trained / "adapter/adapter.safetensors"
    before = (trained / "config.yaml").read_bytes(), load_file(weights)
    assert main(config) == 1
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert main([*config, "--resume"]) == 0
    assert main([*config, "--resume", "--lr", "0.5"]) == 1
    assert "config.lr was 0.01, now 0.5" in capsys.readouterr().err
    assert (trained / "config.yaml").read_bytes() == before[0]
    after = load_file(weights)
    assert after.keys() == before[1].keys() and all(torch.equal(after[k], before[1][k]) for k in after)


def test_ctrl_c_exits_130_with_a_hint_that_works(images, model_flags, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "lion_fast",
        "finetune",
        str(images),
        "--out",
        str(out),
        *model_flags,
        *TRAIN,
    ]
    command += ["--epochs", "400", "--log-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.time() + 240
        while time.time() < deadline and process.poll() is None:
            if (out / "steps.csv").exists() and (out / "steps.csv").read_text().count("\n") > 5:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=180)[1]
    assert process.returncode == 130, told
    assert "Traceback" not in told and "interrupted; the checkpoint" in told
    hint = told.split("resume with: lion-fast ")[1].split()
    assert main([*hint, "--epochs", "1"]) == 1  # found, and told that it is of a longer run
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["epochs"] == 400 and hint == ["finetune", "--config", str(out / "config.yaml"), "--resume"]


def test_predict_writes_what_the_model_says_and_names_what_it_cannot_read(trained, images, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no image")
    whole = (images / "class1/000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("a.png", "sub/b.PNG"):
        Image.open(images / "class2/001.png").save(tmp_path / name, format="png")
    assert main(["predict", str(trained), str(tmp_path), "--top-k", "2", "--device", "cpu"]) == 0
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


def test_predict_to_a_file_strictly_and_as_json(trained, images, tmp_path, capsys):
    out = tmp_path / "classes.csv"
    assert main(["predict", str(trained), str(images / "class0"), "--out", str(out), "--device", "cpu"]) == 0
    assert len(out.read_text().splitlines()) == 21
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"")
    assert main(["predict", str(trained), str(bad), "--strict", "--device", "cpu"]) == 1
    assert "bad.jpg cannot be decoded" in capsys.readouterr().err
    assert main(["predict", str(trained), str(bad), "--device", "cpu"]) == 1
    assert main(["predict", str(trained), str(tmp_path / "empty"), "--device", "cpu"]) == 1
    capsys.readouterr()
    assert main(["predict", str(trained), str(images), str(bad), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["predictions"]) == 60 and [s["path"] for s in told["skipped"]] == [str(bad)]


def test_info_of_an_adapter(trained, images, capsys):
    assert main(["info", str(trained), "--images", str(images / "class0"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == {"dense": 1232, "kept": 1232, "with_head": 1331}
    assert told["measured_on"] == "20 given images"
    model = lion_fast.load_adapter(trained / "adapter")
    for name, end in told["ends"].items():
        layer = getattr(model, f"{name}_end")
        exact = torch.linalg.matrix_norm(layer.recurrence_matrix().detach().double(), 2).item()
        assert exact * 0.999 <= end["certified"] <= 0.8 * (1 + 1e-5)
        assert 0 < end["rate"] <= end["certified"] and end["iterations"] <= end["max_iterations"] <= 50
    assert main(["info", str(trained)]) == 0
    told = capsys.readouterr().out
    assert "8 random-normal images" in told and "input end: gamma 0.8, certified bound" in told


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


def test_info_of_the_installation_and_the_methods(capsys):
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["torch"] == torch.__version__ and told["lion_fast"] == lion_fast.__version__
    assert told["triton"] or told["triton_reason"]
    assert main(["info", "--methods", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["lion"]["options"]["gamma"] == 0.8 and {"lion", "probe", "vpt"} <= told.keys()


def test_no_command_prints_the_help(capsys):
    assert main([]) == 2
    assert "finetune" in capsys.readouterr().out


def test_a_backbone_of_random_weights_is_made_again_from_its_seed(images, tmp_path, capsys):
    flags = ["--backbone", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "32", "--seed", "3"]
    for key, value in TINY.items():
        flags += ["--backbone-set", f"{key}={value}"]
    assert main(["finetune", str(images), "--out", str(tmp_path / "a"), *flags, *TRAIN]) == 0
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "a"), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accuracy"] == results["test"]["accuracy"]


def test_a_misspelt_image_is_named(trained, capsys):
    assert main(["predict", str(trained), "holidya.png"]) == 1
    assert "there is no file or folder holidya.png" in capsys.readouterr().err


def test_the_resize_of_training_is_kept_by_evaluate_and_predict(model_flags, tmp_path, capsys):
    rng = torch.Generator().manual_seed(0)
    for k in range(2):  # wide images that differ at their edges only, which a crop cuts off
        for i in range(8):
            pixels = torch.randint(0, 60, (32, 96, 3), generator=rng, dtype=torch.uint8).numpy()
            pixels[:, :20] += 180 * k
            (tmp_path / "wide" / str(k)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "wide" / str(k) / f"{i}.png")
    out = tmp_path / "out"
    command = ["finetune", str(tmp_path / "wide"), "--out", str(out), "--method", "probe", *model_flags]
    assert main([*command, "--resize", "direct", *TRAIN, "--epochs", "20"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["test"]["accuracy"] == 1.0  # the crop sees noise
    capsys.readouterr()
    assert main(["evaluate", str(out), "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["accuracy"], told["loss"]) == (1.0, pytest.approx(results["test"]["loss"], abs=1e-6))
    assert main(["predict", str(out), str(tmp_path / "wide" / "1"), "--device", "cpu", "--json"]) == 0
    assert {row["class"] for row in json.loads(capsys.readouterr().out)["predictions"]} == {"1"}
    assert main([*command, "--resume", *TRAIN, "--epochs", "20"]) == 1  # another resize is another run
    assert "backbone" in capsys.readouterr().err

    model = lion_fast.load_adapter(out / "adapter")
    assert model.backbone.resize == "direct"
    crop = lion_fast.load_backbone(**model.backbone.request["timm_kwargs"] | {
        "name": model.backbone.name, "weights": model_flags[3], "img_size": 32,
    })  # fmt: skip
    with pytest.raises(lion_fast.errors.AdapterError, match="resize direct; this backbone takes crop"):
        lion_fast.load_adapter(out / "adapter", crop)


def test_an_adapter_from_before_resize_was_a_choice_loads(trained, tmp_path):
    description = json.loads((trained / "adapter" / "adapter.json").read_text())
    assert description["normalisation"].pop("resize") == "crop"
    description["backbone"]["request"].pop("resize")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter.json").write_text(json.dumps(description))
    tensors = (trained / "adapter" / "adapter.safetensors").read_bytes()
    (tmp_path / "old" / "adapter.safetensors").write_bytes(tensors)
    assert lion_fast.load_adapter(tmp_path / "old").backbone.resize == "crop"


SHORT = ["--epochs", "1", "--device", "cpu", "--no-progress"]


def _config(out: Path) -> dict:
    return yaml.safe_load((out / "config.yaml").read_text())


def test_lion_starts_from_the_preset_of_its_number_of_images(images, model_flags, tmp_path):
    assert main(["finetune", str(images), "--out", str(tmp_path / "a"), *model_flags, *SHORT]) == 0
    config, few = _config(tmp_path / "a"), preset("lion", "few").train
    assert config["preset"] == "few" and config["epochs"] == 1  # what is given wins
    for name in ("lr", "weight_decay", "batch_size", "keep"):
        assert config[name] == few[name]
    # a config that a run wrote says everything: the same again
    again = ["finetune", "--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]
    assert main(again) == 0
    assert _config(tmp_path / "b") == config | {"out": str(tmp_path / "b")}


def test_early_stopping_keeps_the_best_epoch_whatever_the_preset_has(images, model_flags, tmp_path):
    flags = [*model_flags, *SHORT, "--early-stop", "2"]
    assert main(["finetune", str(images), "--out", str(tmp_path / "a"), *flags]) == 0
    assert _config(tmp_path / "a")["preset"] == "few" and _config(tmp_path / "a")["keep"] == "best"
    assert main(["finetune", str(images), "--out", str(tmp_path / "b"), *flags, "--keep", "last"]) == 0
    assert _config(tmp_path / "b")["keep"] == "last"


def test_presets_of_other_methods_and_none(images, model_flags, tmp_path, capsys):
    vpt = ["--method", "vpt", "--set", "length=3", "--preset", "paper"]
    assert main(["finetune", str(images), "--out", str(tmp_path / "v"), *vpt, *model_flags, *SHORT]) == 0
    config = _config(tmp_path / "v")
    assert config["optimizer"] == "sgd" and config["options"] == {
        "depth": "deep",
        "length": 3,
        "dropout": 0.1,
    }
    assert config["seed"] == 0
    for flags in (["--preset", "none"], ["--set", "form=residual"], ["--method", "probe"]):
        out = tmp_path / flags[-1]
        assert main(["finetune", str(images), "--out", str(out), *flags, *model_flags, *SHORT]) == 0
        assert _config(out)["lr"] == 1e-3 and _config(out)["batch_size"] == 64
    for flags, told in (
        (["--preset", "huge"], "preset must be one of paper, common, few, small, large; got 'huge'"),
        (["--method", "vpt", "--preset", "auto"], "preset auto is for lion"),
    ):
        out = tmp_path / "no"
        # before any image is looked for, and before the folder of results is begun
        missing = str(tmp_path / "no such images")
        assert main(["finetune", missing, "--out", str(out), *flags, *model_flags, *SHORT]) == 2
        assert told in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    "line, told", [("out: 5", "out must be a text; got 5"), ("weights: [1]", "weights must be a text")]
)
def test_settings_that_are_no_text(line, told, images, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"data: {images}\n{line}\n")
    assert main(["finetune", "--config", str(tmp_path / "c.yaml")]) == 2
    assert told in capsys.readouterr().err


def test_null_in_a_file_is_not_given_and_a_file_may_be_unreadable(images, model_flags, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("method: null\nweights: null\npreset: null\nepochs: null\n")
    flags = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o"), *model_flags, *SHORT]
    assert main(["finetune", str(images), *flags]) == 0
    assert _config(tmp_path / "o")["method"] == "lion"
    (tmp_path / "c.yaml").write_bytes(b"method: \xff\xfe")
    assert main(["finetune", str(images), "--config", str(tmp_path / "c.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
