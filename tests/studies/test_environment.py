"""Which revision of the code rows are of."""

from lion_fast.studies import environment


def test_the_revision_is_that_of_the_code(tmp_path, monkeypatch):
    import subprocess

    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *args], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    nothing = {"git": None, "git_code": None, "git_changed": None}
    monkeypatch.delenv("LION_FAST_REVISION", raising=False)
    (tmp_path / "lion_fast").mkdir()
    source = tmp_path / "lion_fast" / "__init__.py"
    source.write_text("x = 1\n")
    monkeypatch.setattr(environment, "SOURCES", tmp_path)
    assert environment.git_revision() == nothing
    git("init", "-q")
    (tmp_path / "notes.txt").write_text("somebody else's\n")
    git("add", "notes.txt")
    git("commit", "-qm", "one")
    assert environment.git_revision() == nothing  # a checkout that does not know the sources
    git("add", "lion_fast")
    git("commit", "-qm", "two")
    code = git("rev-parse", "HEAD")
    assert environment.git_revision() == {"git": code, "git_code": code, "git_changed": False}
    (tmp_path / "notes.txt").write_text("other words\n")
    git("commit", "-qam", "three")
    source.write_text("x = 2\n")
    assert environment.git_revision() == {
        "git": git("rev-parse", "HEAD"),
        "git_code": code,
        "git_changed": True,
    }
    # a name that is given wins: the copy on another machine may be a checkout of its own
    monkeypatch.setenv("LION_FAST_REVISION", "abc+changes")
    assert environment.git_revision() == {
        "git": "abc+changes",
        "git_code": "abc+changes",
        "git_changed": None,
    }
