from mlm.errors import one_line


def test_an_error_is_one_line_of_limited_length():
    assert one_line(ValueError(" two\n  lines ")) == "two lines"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(FileNotFoundError("a.txt")) == "not found: a.txt"
    assert len(one_line(ValueError("x" * 1000))) == 403


def test_the_cause_of_an_error_is_in_its_line_once():
    error = RuntimeError("loading failed")
    error.__cause__ = OSError("disk full")
    assert one_line(error) == "loading failed (disk full)"
    error = RuntimeError("loading failed: disk full")
    error.__cause__ = OSError("disk full")
    assert one_line(error) == "loading failed: disk full"
