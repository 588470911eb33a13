"""Crossovers from made rows: where a storage begins to pay, the file `choose_storage` reads, the plot."""

import json

import crossovers
import pytest
import torch

from lion_fast import LionLayer, pruning
from lion_fast.errors import OptionError
from lion_fast.pruning import storage

DEVICE = "A device"


def made(contender, granularity, sparsity, us, *, block=None, state=192, width=192, mode="forward", **more):
    return {
        "kind": "sparse", "contender": contender, "granularity": granularity, "block": block, "mode": mode,
        "sparsity": sparsity, "dead": sparsity, "state": state, "width": width, "batch": 64, "us": us,
        "us_20": us * 0.98, "us_80": us * 1.02, "device": DEVICE, "dtype": "bf16", "revision": "abc",
        "when": "2026-01-01T00:00:00Z", **more,
    }  # fmt: skip


def curve(times, *, dense=100.0, block=32, **more):
    """Block-sparse times by sparsity, each beside a dense one."""
    rows = []
    for sparsity, us in times.items():
        rows.append(made("dense fused", "block", sparsity, dense, block=block, **more))
        rows.append(made("block-sparse fused", "block", sparsity, us, block=block, **more))
    return rows


def entries(rows, key="block-sparse"):
    return crossovers.find_crossovers(rows)["devices"][DEVICE].get(key)


def test_a_form_pays_from_where_it_never_loses_again():
    rows = curve({0.0: 150, 0.25: 90, 0.5: 105, 0.75: 60, 0.95: 20})
    rows += curve({0.5: 130, 0.75: 110, 0.95: 70}, mode="backward", dense=100.0)
    place = {"state_dim": 192, "width": 192, "block": 32}
    assert entries(rows) == [{**place, "from_sparsity": 0.75, "backward_from_sparsity": 0.95}]
    # Within the spread of the samples nothing is won.
    assert entries(curve({0.5: 98.0, 0.75: 97.0})) == []
    assert entries(curve({0.5: 98.0, 0.75: 95.0}))[0]["from_sparsity"] == 0.75


def test_a_form_is_compared_with_the_dense_solve_of_its_own_case():
    rows = curve({0.75: 60}, dense=50.0) + curve({0.75: 60}, dense=100.0, block=64)
    assert [e["block"] for e in entries(rows)] == [64]
    # The newest measurement counts, beside the dense one of its own revision.
    old = curve({0.75: 20}, revision="old", when="2025-01-01T00:00:00Z")
    assert entries(curve({0.75: 200}) + old) == []
    assert entries(old)[0]["from_sparsity"] == 0.75
    assert crossovers.find_crossovers(old, dtype="fp32")["devices"] == {}


def test_the_worst_of_several_token_widths_counts():
    better, worse = curve({0.5: 50, 0.75: 40}), curve({0.5: 150, 0.75: 40}, width=768)
    assert [e["from_sparsity"] for e in entries(better + worse)] == [0.75]
    assert entries(better + worse)[0]["width"] == 768
    assert entries(better + curve({0.75: 150}, width=100)) == []
    assert entries(curve({0.75: 150}, width=100) + better) == []


def test_every_granularity_has_its_form():
    rows = [made("dense fused", g, 0.5, 100) for g in ("unit", "element", "2:4")]
    rows += [made("compacted", "unit", 0.5, 50), made("CSR loop", "element", 0.5, 900)]
    rows += [made("2:4 form", "2:4", 0.5, 80), made("2:4 loop", "2:4", 0.5, 10)]
    rows += [{k: v for k, v in made("BSR loop", "block", 0.5, 1).items() if not k.startswith("us")}]
    found = crossovers.find_crossovers(rows)["devices"][DEVICE]
    assert [e["state_dim"] for e in found["2:4"]] == [192] and "block" not in found["2:4"][0]
    assert found["compact"][0]["from_sparsity"] == 0.5
    assert found["element"] == [] and "block-sparse" not in found


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_choose_storage_reads_the_file_that_was_written(tmp_path, monkeypatch, capsys):
    rows = curve({0.25: 120, 0.5: 80, 0.75: 40}) + [made("dense fused", "2:4", 0.5, 100)]
    rows += [made("2:4 form", "2:4", 0.5, 80), {"kind": "time", "contender": "lion-fast"}]
    write(tmp_path / "rows.jsonl", rows)
    out, picture = tmp_path / "crossovers.json", tmp_path / "plot.png"
    out.write_text('{"format": 1, "devices": {"Another": {"2:4": []}}}')
    words = [str(tmp_path / "rows.jsonl"), "--out", str(out), "--plot", str(picture)]
    assert crossovers.main(words) == 0
    assert DEVICE in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    table = pruning.measured_crossovers(out)
    assert set(table) == {"Another", DEVICE}

    monkeypatch.setattr(storage, "_device_name", lambda device: DEVICE)
    torch.manual_seed(0)
    expected = {0.25: "block-sparse", 0.5: "block-sparse", 0.75: "dense"}
    for keep, name in expected.items():
        layer = LionLayer(192, 192)
        pruning.prune_once(layer, keep, granularity="block", block=32, scope="matrix", criterion="random")
        form = pruning.choose_storage(layer, crossovers=table)
        assert form.name == name, form
        if name == "block-sparse":
            assert form.block == 32 and "it pays from 50% on (A device" in form.reason
    half = LionLayer(192, 192)
    pruning.prune_once(half, 0.5, granularity="2:4")
    assert pruning.choose_storage(half, crossovers=table).name == "2:4"
    assert pruning.choose_storage(half, crossovers={DEVICE: {}}).name == "dense"
    out.write_text('{"devices": {}}')
    with pytest.raises(OptionError, match="format 1"):
        pruning.measured_crossovers(out)


def test_rows_of_no_gpu_write_nothing(tmp_path, capsys):
    write(tmp_path / "a.jsonl", curve({0.5: 10}, device="cpu") + curve({0.5: 10}, dry_run=True))
    with pytest.raises(SystemExit):
        crossovers.main([str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "c.json")])
    assert "nothing is written" in capsys.readouterr().err and not (tmp_path / "c.json").exists()


def test_the_plot_has_a_panel_per_width(tmp_path):
    rows = curve({0.5: 80, 0.75: 40}) + curve({0.5: 90}, state=256, width=256)
    assert crossovers.plot(rows, tmp_path / "p.svg") == 2
    text = (tmp_path / "p.svg").read_text()
    assert "<svg" in text and len(text) > 5000
    assert crossovers.plot(rows, tmp_path / "q.png", mode="backward") == 0
    assert not (tmp_path / "q.png").exists()
