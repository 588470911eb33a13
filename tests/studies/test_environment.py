"""Which revision of the code rows are of."""

from functools import partial

from git_helpers import git as git_in

from lion_fast.studies import environment


def test_the_revision_is_that_of_the_code(tmp_path, monkeypatch):
    def found():
        return tuple(environment.git_revision().values())

    git = partial(git_in, tmp_path)
    monkeypatch.delenv("LION_FAST_REVISION", raising=False)
    (tmp_path / "lion_fast").mkdir()
    source, notes = tmp_path / "lion_fast" / "__init__.py", tmp_path / "notes.txt"
    source.write_text("x = 1\n")
    monkeypatch.setattr(environment, "SOURCES", tmp_path)
    assert found() == (None, None, None)
    git("init", "-q")
    notes.write_text("somebody else's\n")
    git("add", "notes.txt")
    git("commit", "-qm", "one")
    assert found() == (None, None, None)  # a checkout that does not know the sources
    git("add", "lion_fast")
    git("commit", "-qm", "two")
    code = git("rev-parse", "HEAD")
    assert found() == (code, code, False)
    notes.write_text("other words\n")
    git("commit", "-qam", "three")
    source.write_text("x = 2\n")
    assert found() == (git("rev-parse", "HEAD"), code, True)
    # a name that is given wins: the copy on another machine may be a checkout of its own
    monkeypatch.setenv("LION_FAST_REVISION", "abc+changes")
    assert found() == ("abc+changes", "abc+changes", None)
