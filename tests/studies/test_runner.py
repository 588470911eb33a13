"""The store of rows and the runner: what is on the disk, found again, replaced, refused, gone on with."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lion_fast.errors import DataError, LionError, OptionError, WriteError
from lion_fast.studies import environment, markdown, runner
from lion_fast.studies.rows import (
    Store,
    pack_bits,
    pack_integers,
    read_rows,
    unpack_bits,
    unpack_integers,
    write_csv,
)

# -- rows


def test_a_row_is_on_the_disk_at_once_and_a_later_one_of_its_key_replaces_it(tmp_path):
    with Store(tmp_path) as store:
        store.add({"key": "a", "n": 1}, {"key": "b", "n": 2})
        assert read_rows(tmp_path) == store.rows == [{"key": "a", "n": 1}, {"key": "b", "n": 2}]
        store.add({"key": "a", "n": 3})
        assert store.get("a") == {"key": "a", "n": 3} and "c" not in store and store.get("c") is None
    assert (tmp_path / "rows.jsonl").read_bytes().count(b"\n") == 3
    assert read_rows(tmp_path) == [{"key": "b", "n": 2}, {"key": "a", "n": 3}]
    assert read_rows(tmp_path / "nothing") == []


def test_the_half_of_a_last_line_is_cut_off_and_told(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a"}\n{"key": "b", "n')
    with Store(tmp_path) as store:
        store.add({"key": "c"})
    assert "half written" in capsys.readouterr().err
    assert path.read_text() == '{"key": "a"}\n{"key": "c"}\n'
    path.write_text('{"key": "a"}\nnot json\n{"key": "b"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_rows(tmp_path)


def test_older_files_are_read_and_gone_on_from(tmp_path):
    old = {"format": 1, "rows": [{"key": "a", "n": 1}, {"key": "b", "n": 2}]}
    (tmp_path / "rows.json").write_text(json.dumps(old))
    with Store(tmp_path) as store:
        store.add({"key": "a", "n": 3})
    assert [row["n"] for row in read_rows(tmp_path)] == [2, 3]
    assert json.loads((tmp_path / "rows.json").read_text()) == old
    vtab = {"format": "lion_fast.vtab/1", "protocol": {"seed": 1}, "rows": [{"task": "dtd"}, {"task": "dtd"}]}
    (tmp_path / "old.json").write_text(json.dumps(vtab))
    assert read_rows(tmp_path / "old.json") == [{"task": "dtd", "protocol": {"seed": 1}}] * 2
    Store(tmp_path / "old.json").close()
    assert (tmp_path / "old.jsonl").exists()
    for wrong in ("{", "[1]", '{"format": "other"}', '{"rows": [1], "protocol": 1}'):
        (tmp_path / "rows.json").write_text(wrong)
        with pytest.raises(DataError, match="no rows"):
            read_rows(tmp_path)


@pytest.mark.parametrize(
    "name", ["methods-cpu", "methods-cpu-resnet", "methods-cpu-states", "pruning_accuracy.json"]
)
def test_committed_rows_of_older_formats(name):
    rows = read_rows(os.path.join(os.path.dirname(__file__), "../../bench/results", name))
    assert rows and len({row["key"] for row in rows}) == len(rows)


def test_one_writer_at_a_time_and_a_place_that_can_be_written(tmp_path):
    with Store(tmp_path), pytest.raises(OptionError, match="another run"):
        Store(tmp_path)
    Store(tmp_path).close()
    (tmp_path / "file").write_text("here")
    with pytest.raises(OptionError, match="cannot be written"):
        Store(tmp_path / "file")


def test_a_row_that_does_not_fit_is_not_there_at_all(tmp_path):
    """A limit on file size stands for a full disk: a part of the line is written before it is refused."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(tmp_path) as store:
        store.add({"key": "a"})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(WriteError, match="rows.jsonl"):
                store.add({"key": "b", "long": "x" * 20000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert "b" not in store and (tmp_path / "rows.jsonl").read_text() == '{"key": "a"}\n'
        store.add({"key": "c"})
    assert [row["key"] for row in read_rows(tmp_path)] == ["a", "c"]


def test_bits_and_integers_come_back():
    rng = np.random.default_rng(0)
    for n in (1, 7, 8, 9, 1000):
        bits, numbers = rng.random(n) < 0.5, rng.integers(0, 2**32, n)
        assert (unpack_bits(pack_bits(bits), n) == bits).all()
        assert (unpack_integers(pack_integers(numbers)) == numbers).all()


def test_a_flat_table_of_rows(tmp_path):
    write_csv([{"a": {"b": 1}, "c": [2]}, {"d": "x,y"}], tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == 'a.b,c,d\n1,[2],\n,,"x,y"\n'


def test_where_a_row_was_taken():
    here = environment.context(torch.device("cpu"))
    assert environment.same_place({"key": "a", **here}, here)
    assert not environment.same_place({**here, "threads": -1}, here) and not environment.same_place({}, here)
    said = markdown.where_taken(here | {"git": "0123456789abcdef", "git_changed": True})
    assert here["device_name"] in said and "0123456789ab with local changes" in said


def test_a_padded_table_lines_up_and_says_the_same():
    head, rows = ["method", "accuracy"], [["lion", "0.944"], ["linear probe", "1"]]
    plain, padded = (markdown.table(head, rows, pad=pad) for pad in (False, True))
    assert len({len(line) for line in padded}) == 1 and padded[3] == "| linear probe |        1 |"
    assert [line.replace(" ", "") for line in plain if "-" not in line] == [
        line.replace(" ", "") for line in padded if "-" not in line
    ]


# -- the runner


def plan_of(store, n=4, **more):
    return runner.Plan({f"key {i}": i for i in range(n)}, store, **more)


def twice(i):
    return {"n": 2 * i}


def test_what_is_there_is_not_done_again_unless_asked(tmp_path):
    seen, told = [], []
    with Store(tmp_path) as store:
        store.add({"key": "key 1", "n": "old"})
        found = runner.run(plan_of(store), lambda i: seen.append(i) or twice(i), say=told.append)
        assert (found.done, found.held, found.left, found.failed) == (3, 1, 0, 0) and seen == [0, 2, 3]
        assert [row["n"] for row in store.rows] == ["old", 0, 4, 6] and told[0].startswith(
            "1 done, 2 left: 0"
        )
        assert runner.run(plan_of(store), twice).held == 4
        assert runner.run(plan_of(store, again=True), twice).done == 4
        assert store.get("key 1")["n"] == 2
        assert runner.run(plan_of(store, 6), twice, minutes=0).left == 2


def test_an_item_may_give_several_rows_or_none(tmp_path):
    with Store(tmp_path) as store:
        runner.run(plan_of(store), lambda i: [{"key": f"{i}.{k}"} for k in range(i)])
        assert [row["key"] for row in store.rows] == ["1.0", "2.0", "2.1", "3.0", "3.1", "3.2"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, LionError])
def test_what_is_done_stays_where_a_run_ends(tmp_path, error):
    def do(i):
        if i == 2:
            raise error("at two")
        return twice(i)

    with Store(tmp_path) as store:
        with pytest.raises(runner.ExperimentError if error is LionError else error, match="at two"):
            runner.run(plan_of(store), do)
        assert [row["n"] for row in read_rows(tmp_path)] == [0, 2]
    with pytest.raises(OptionError, match="workers"):
        runner.run(plan_of(store), do, workers=0)


# -- processes


lost = []


def breaks(i):
    """1 ends its process; 2 fails, and what follows it in its process would too."""
    if i == 1:
        os._exit(9)
    if i == 2 or lost:
        lost.append(i)
        raise RuntimeError("CUDA error: a stand-in")
    return {"n": i, "threads": torch.get_num_threads(), "process": os.getpid()}


def dies(i):
    os._exit(9)


def test_a_run_that_breaks_costs_no_other(tmp_path, monkeypatch):
    """It gets a new process, and the run is done by the next call."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with Store(tmp_path) as store:
        with pytest.raises(runner.ExperimentError) as broken:
            runner.run(plan_of(store, 7), breaks, workers=2)
        told = str(broken.value)
        assert "1: its process died (exit code 9)" in told and "CUDA error: a stand-in" in told
        assert told.count("1 more runs broke") == 1
        assert sorted(row["n"] for row in store.rows) == [0, 3, 4, 5, 6]
        assert {row["threads"] for row in store.rows} == {1}
        assert os.getpid() not in {row["process"] for row in store.rows}
        assert runner.run(plan_of(store, 7), twice, workers=2).done == 2


def waits(number, folder):
    if number:
        Path(folder, str(os.getpid())).touch()
        time.sleep(120)
    return {"n": number}


def begin_to_wait(folder):
    with Store(folder) as store:
        try:
            runner.run(plan_of(store), functools.partial(waits, folder=folder), workers=2)
        except KeyboardInterrupt:
            sys.exit(130)


@pytest.mark.parametrize("killed", [False, True])
def test_processes_end_with_a_parent_that_is_interrupted_or_killed(tmp_path, killed):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_runner\n"
    code += f"test_runner.begin_to_wait({str(tmp_path)!r})"
    begun = {"start_new_session": True, "stderr": subprocess.PIPE}
    parent = subprocess.Popen([sys.executable, "-c", code], **begun)
    try:
        wait_until(lambda: len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 2)
        parent.kill() if killed else os.killpg(parent.pid, signal.SIGINT)
        _, told = parent.communicate(timeout=60)
        wait_until(lambda: not alive(parent.pid))  # Python's own resource tracker ends after its parent
    finally:
        if alive(parent.pid):
            os.killpg(parent.pid, signal.SIGKILL)
    assert killed or (parent.returncode == 130 and b"Traceback" not in told)
    assert [row["n"] for row in read_rows(tmp_path)] == [0]


def wait_until(there):
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_where_everything_breaks_it_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "MOST_BROKEN", 1)
    with Store(tmp_path) as store, pytest.raises(runner.ExperimentError) as broken:
        runner.run(plan_of(store), dies, workers=2)
    assert 1 <= str(broken.value).count("died") <= 2  # of four
