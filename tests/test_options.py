# ruff: noqa: E501
"""Fields with help and ranges, values as people write them in YAML, KEY=VALUE, names that are not known."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lion_fast.errors import (
    OptionError,
    check_number,
    check_seed,
    check_whole,
    one_line,
    refuse_unknown,
    shown,
)
from lion_fast.options import (
    MOST_BYTES,
    Options,
    documented,
    dump_yaml,
    key_lists,
    key_values,
    parse_json,
    parse_yaml,
    read_file,
    read_settings,
    setting,
)


@documented
@dataclass(frozen=True)
class Some(Options):
    """Some settings."""

    rate: float = setting(0.5, "how fast", above=0, most=1)
    steps: int | None = setting(None, "how many", default_is="all")
    kind: str = setting("a", "which", choices=("a", "b"))
    quick: bool = setting(True, "whether")
    name: str = setting("x", "what it is called")
    more: dict = setting({}, "others")


def test_the_docstring_says_help_choices_and_default():
    lines = "rate: how fast [0.5]", "steps: how many [all]", "kind: which: a, b [a]", "quick: whether [yes]"
    for line in lines:
        assert f"\n        {line}\n" in Some.__doc__


@pytest.mark.parametrize(
    "given",
    [
        {"rate": 0}, {"rate": float("nan")}, {"rate": True}, {"rate": None}, {"rate": "1"}, {"steps": 0},
        {"steps": 1.5}, {"kind": "c"}, {"quick": 1}, {"name": 5}, {"more": [1]},
    ],
)  # fmt: skip
def test_values_outside_are_refused_by_name(given):
    with pytest.raises(OptionError, match=next(iter(given))):
        Some.from_dict(given)


def test_values_inside_are_kept():
    given = {"rate": 1, "steps": 3, "kind": "b", "quick": False, "name": "y", "more": {"z": [1]}}
    assert Some.from_dict(given).to_dict() == given and Some().steps is None
    assert Some().more is not Some().more


def test_unknown_names_come_with_the_nearest_one():
    with pytest.raises(OptionError, match="'rat'; did you mean rate"):
        Some.from_dict({"rat": 1})
    with pytest.raises(OptionError, match="unknown part 'z'. Valid: a, b"):
        refuse_unknown({"z": 1}, ["a", "b"], "part")


@pytest.mark.parametrize("text", ["1e-3", "+1E3", "-.5e2", "2.e0", "1.0e-05", "7e+1"])
def test_numbers_as_people_write_them(text):
    assert parse_yaml(f"[{text}]") == [float(text)]


@pytest.mark.parametrize("text", ["1e-3", "e3", "1e", "0x1e-3", "yes", "null", "12"])
def test_texts_stay_texts(text):
    assert parse_yaml(f"'{text}'") == text
    assert parse_yaml(dump_yaml({"a": text, "b": [text]})) == {"a": text, "b": [text]}


def test_key_values():
    assert key_values(["kv-length=5", "lr=1e-2", "ends=[input]", "a=b=c", "x="], "--set") == {
        "kv_length": 5, "lr": 0.01, "ends": ["input"], "a": "b=c", "x": None,
    }  # fmt: skip
    assert key_lists(["lr=1e-3,5e-3", "depth=deep,shallow", "ends=[input],[input, output]"], "--grid") == {
        "lr": (0.001, 0.005), "depth": ("deep", "shallow"), "ends": (["input"], ["input", "output"]),
    }  # fmt: skip
    assert key_lists(["clip-norm=null,1.5"], "--grid") == {"clip_norm": (None, 1.5)}
    for wrong in ("lr", "=1", "lr=[1"):
        with pytest.raises(OptionError, match="--set takes KEY=VALUE"):
            key_values([wrong], "--set")
    for wrong in ("lr", "lr=", "=1", "lr=1,,2", "lr=[1"):
        with pytest.raises(OptionError, match="--grid takes KEY=V1,V2"):
            key_lists([wrong], "--grid")
    with pytest.raises(OptionError, match="lr twice"):
        key_lists(["lr=1", "lr=2"], "--grid")


def start(value: object) -> str:
    return shown(value)[:20]


LEVELS = "\n".join(
    f"{b}: &{b} [{', '.join(9 * [f'*{a}'])}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = LEVELS.replace("[", "{<<: [").replace("]", "]}")


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2", "a: &a [*a]", 5000 * "[", "a: &a [1]\n" + LEVELS, "a: 0x" + 6000 * "f", "a: " + 5000 * "9",
        "a: !!timestamp x", "!!int ''", "!!bool x", "a: 2001-13-45", "a: !!python/name:os.system", "? [1]\n: 2", "\ta: 1",
        "a: \0", "a: 1\n---\nb: 2",
    ],
    ids=start,
)  # fmt: skip
def test_yaml_that_nobody_means_is_refused(text):
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)


def test_yaml_aliases_that_people_write_are_read():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }
    parse_yaml("a: &a {x: 1}\n" + MERGES)  # one name, however often it is merged


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        "1e999",
        '{"a": 1, "a": 2}',
        10**5 * "[",
        5000 * "9",
        400 * "9",
        b"\xff\xfe",
        "",
        "{'a': 1}",
    ],
    ids=start,
)
def test_json_that_nobody_means_is_refused(text):
    with pytest.raises(ValueError):
        parse_json(text)


@pytest.mark.parametrize(
    "kind", ["folder", "pipe", "loop", "device", "none", "long", "nul", "surrogate", "large"]
)
def test_what_is_no_file_is_an_error_and_no_wait(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "large":
        path.write_bytes(bytes(MOST_BYTES + 1))
    path = {"device": "/dev/zero", "long": 5000 * "x", "nul": "a\0b", "surrogate": "\ud800"}.get(kind, path)
    with pytest.raises(OSError) as error:
        read_file(path, MOST_BYTES)
    assert error.value.strerror
    with pytest.raises(OptionError, match="cannot be read"):
        read_settings(Path(path), "config file")


@pytest.mark.parametrize("value", [True, 1.5, "1", None, 0, 2**31, 10**5000, float("nan")], ids=start)
def test_whole_numbers_have_two_ends(value):
    with pytest.raises(OptionError, match="^n must be"):
        check_whole("n", value)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), 1j, "1", True], ids=start)
def test_numbers_are_those_of_floats(value):
    with pytest.raises(OptionError, match="^x must be"):
        check_number("x", value)


def test_seeds_are_those_of_torch():
    import torch

    for seed in (-(2**63), 0, 2**64 - 1):
        check_seed("seed", seed)
        torch.Generator().manual_seed(seed)
    for seed in (-(2**63) - 1, 2**64, 0.0):
        with pytest.raises(OptionError, match="seed"):
            check_seed("seed", seed)


def test_errors_are_one_printable_line():
    class Odd:
        def __repr__(self):
            raise RuntimeError

    assert one_line("a\n  b\x1b[2J\udcff") == "a b\\x1b[2J\\udcff"
    assert len(one_line(5000 * "x")) <= 1000 and len(shown([5000 * "x"])) <= 200
    assert "Odd" in shown(Odd()) and "int" in shown(10**5000)
