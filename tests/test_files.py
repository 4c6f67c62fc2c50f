"""Files that are there whole or not at all."""

import pytest

from blockmoe.files import write_whole


def test_a_full_disk_leaves_what_stood_there(tmp_path, most_bytes_a_file):
    path = write_whole(tmp_path / "made" / "report.md", "é\udce9\n")
    with most_bytes_a_file(1000), pytest.raises(OSError, match="File too large"):
        write_whole(path, "x" * 2000)
    assert path.read_text(encoding="utf-8") == "é?\n" and list(path.parent.iterdir()) == [path]
    assert write_whole(path, b"new").read_bytes() == b"new"
