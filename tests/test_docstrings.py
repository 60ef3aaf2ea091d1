import time
import warnings

import pytest

from mlm.data.sources import docstrings

LONG = "A sentence that is long enough to be kept as a document."

MODULE = f'''"""Module: {LONG}"""
import os
if os.name:
    def first():
        """First: {LONG}

        Second line.
            indented
        """
    try:
        class Second:
            """Second: {LONG}"""
            async def third(self):
                r"""Third \\d: {LONG}"""
                def fourth():
                    "Fourth: {LONG}"
    except ValueError:
        def fifth():
            """Fifth: {LONG}"""
    else:
        def sixth():
            """Short."""
match os.name:
    case "posix":
        def matched():
            """Matched: {LONG}"""
def seventh():
    f"""Not a docstring: {LONG}"""
def eighth():
    x = "{LONG}"
'''


def test_docstrings_of_a_module_from_top_to_bottom(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(MODULE)
    found = docstrings.read_docstrings(str(path))
    assert found == [
        f"Module: {LONG}",
        f"First: {LONG}\n\nSecond line.\n    indented",
        f"Second: {LONG}",
        f"Third \\d: {LONG}",
        f"Fourth: {LONG}",
        f"Fifth: {LONG}",
        f"Matched: {LONG}",
    ]


@pytest.mark.parametrize(
    "code",
    [b"def f(:", b"\xff\xfe\x00", b"x = '\0'", b"(" * 10_000, b"# coding: none\n", b""],
    ids=["syntax", "bytes", "null", "deep", "coding", "empty"],
)
def test_files_that_do_not_parse_have_no_docstrings(tmp_path, code):
    path = tmp_path / "a.py"
    path.write_bytes(code)
    assert docstrings.read_docstrings(str(path)) == []
    assert docstrings.read_docstrings(str(tmp_path / "none.py")) == []


def test_parser_warnings_are_silent(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(f'"""{LONG} \\d"""\nassert (1, "always true")\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert docstrings.read_docstrings(str(path)) == [f"{LONG} \\d"]


def test_a_lone_surrogate_is_removed(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(f'"""{LONG}\\ud800"""\n')
    shard = docstrings.Shard("a", (str(path),))
    assert [texts.to_pylist() for texts in docstrings.read_shard(shard)] == [[LONG]]


def test_a_shard_is_a_package_or_a_part_of_a_large_one(tmp_path):
    site = tmp_path / "site-packages"
    big = docstrings._FILES_PER_SHARD + 1
    for name in [f"big/{n:03d}.py" for n in range(big)] + [
        "small/a.py",
        "small/tests/b.py",
        "tests/c.py",
        "one.py",
    ]:
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (tmp_path / "standard.py").write_text("")
    roots = (str(tmp_path), str(site))
    shards = {shard.name: shard.paths for shard in docstrings.find_shards(roots)}
    assert {name: len(paths) for name, paths in shards.items()} == {
        "big[0]": big - 1,
        "big[1]": 1,
        "small[0]": 1,
        "site-packages/*.py[0]": 1,
        f"{tmp_path.name}/*.py[0]": 1,
    }
    paths = [path for shard in shards.values() for path in shard]
    assert len(paths) == len(set(paths))
    assert docstrings.find_shards(roots) == docstrings.find_shards(roots)
    assert docstrings.find_shards(tuple(str(tmp_path / name) for name in ("none",))) == []


@pytest.mark.slow
def test_the_first_documents_come_from_several_packages_within_seconds():
    start = time.monotonic()
    shards = docstrings.find_shards()
    # Shards are sorted by a hash of their names, so the first ones are not all of one package.
    assert len({shard.name.split("[")[0] for shard in shards[:10]}) >= 5
    assert max(len(shard.paths) for shard in shards) <= docstrings._FILES_PER_SHARD
    texts = (text for shard in shards for column in docstrings.read_shard(shard) for text in column.to_pylist())
    first = [next(texts) for _ in range(200)]
    # Issue 2: the first batch within 10 s of the start of reading.
    assert time.monotonic() - start < 10
    assert all(len(text) >= docstrings._MIN_CHARACTERS for text in first)
    assert len(set(first)) > 150
