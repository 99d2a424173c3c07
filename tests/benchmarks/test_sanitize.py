"""What compute-sanitizer watches computes the right numbers."""
from benchmarks import sanitize


def test_what_the_sanitizers_watch_is_right(capsys):
    sanitize.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 14 and all(line.endswith("as the reference") for line in lines)
