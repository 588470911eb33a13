"""The examples run as they stand; the one that downloads runs on a folder and a small backbone instead."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file
from training_helpers import write_images

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


def test_the_ten_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    """As they stand, but for the weights: random ones stand in for those of timm's hub."""
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^<!-- needs photos.*?-->\n```python\n(.*?)^```", page, re.S | re.M)
    name, settings = '"vit_base_patch16_224"', "TrainConfig(**few.train)"
    assert name in code and settings in code
    code = code.replace(name, '"test_vit", pretrained=False')
    code = code.replace(settings, 'TrainConfig(**{**few.train, "epochs": 1})')
    write_images(tmp_path / "photos", each=40, size=20)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "page"})
    accuracy, trained = capsys.readouterr().out.split()[-2:]
    assert 0 <= float(accuracy) <= 1 and int(trained) > 0
    assert (tmp_path / "runs/photos/adapter/adapter.safetensors").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    arguments = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path.stem == "python_api":
        weights = tmp_path / "weights.safetensors"
        save_file(timm.create_model("test_vit").state_dict(), weights)
        arguments = [str(write_images(tmp_path / "data", each=40, size=20)), "test_vit", str(weights)]
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
