"""The examples run as they stand; the one that downloads runs on a folder and a small backbone instead."""

import os
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
