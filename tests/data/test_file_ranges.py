"""Parts of files, from a disk and from an object store."""

import pytest

from bsq_ray import storage
from bsq_ray.data.file_ranges import read_range, read_tail


@pytest.mark.parametrize("where", ["local", "s3"])
def test_read_range_and_tail_return_parts(where, tmp_path, request):
    """Parts of a file are read alike from a disk and from an object store; a part may end behind the file."""
    url = f"{tmp_path if where == 'local' else request.getfixturevalue('bucket')}/digits"
    storage.write_bytes(url, b"0123456789")
    assert read_range(url, 2, 3) == b"234"
    assert read_range(url, 8, 10) == b"89"
    assert (read_tail(url, 4), read_tail(url, 100)) == (b"6789", b"0123456789")
    with pytest.raises(ValueError, match="does not exist"):
        read_range(f"{url}-missing", 0, 1)
