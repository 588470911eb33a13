"""What SECURITY.md promises and no other test asks: files and folders of strangers run no code."""

import io
import json
import struct
import zlib

import pytest
import torch

from lion_fast import files, load_backbone
from lion_fast.data.images import read_image
from lion_fast.errors import DataError, LionError, OptionError
from lion_fast.options import key_values, read_settings


@pytest.fixture
def flag(tmp_path):
    """A file that is there if something ran."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return (open, (self.flag, "w"))


def test_a_folder_of_the_hub_runs_no_pickle(flag, tmp_path):
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save({"weight": Evil(flag)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(LionError):
        load_backbone(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("tag", ["python/object/apply:builtins.open", "python/object/new:io.FileIO"])
def test_yaml_builds_no_objects(flag, tmp_path, tag):
    text = f"!!{tag} [{flag}, w]"
    with pytest.raises(OptionError):
        key_values([f"pool={text}"], "--set")
    (tmp_path / "settings.yaml").write_text(f"pool: {text}")
    with pytest.raises(OptionError):
        read_settings(tmp_path / "settings.yaml", "settings")


def test_pip_is_not_taken_from_the_current_folder(flag, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text(f"open({str(flag)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("LION_FAST_OFFLINE", raising=False)
    with pytest.raises(files.FetchError):
        files.fetch_wheel("lf-sample", "1.0", "lf_sample/a.bin", "0" * 64, tmp_path / "a.bin")


def test_an_image_of_too_many_pixels_is_refused_unread(tmp_path):
    """20,000 x 20,000 pixels in 200 kB."""
    head, row, out = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0), bytes(2501), io.BytesIO()
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(20_000)) + packer.flush()
    out.write(b"\x89PNG\r\n\x1a\n")
    for kind, content in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b"")):
        out.write(struct.pack(">I", len(content)) + kind + content)
        out.write(struct.pack(">I", zlib.crc32(kind + content)))
    (tmp_path / "large.png").write_bytes(out.getvalue())
    assert len(out.getvalue()) < 200_000
    with pytest.raises(DataError, match="pixels"):
        read_image(tmp_path / "large.png")
