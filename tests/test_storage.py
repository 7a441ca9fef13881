"""Reading, writing, copying and removing files through `bsq_ray.storage`."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bsq_ray.storage import StorageUnavailableError, download, remove_folder, retry_while_unavailable, write_bytes


def test_remove_folder_concurrent_calls_succeed(tmp_path):
    """Several threads can remove the same folder at once."""
    for folder in range(40):
        (tmp_path / "run" / str(folder)).mkdir(parents=True)
        for file in range(10):
            (tmp_path / "run" / str(folder) / str(file)).touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove_folder, [str(tmp_path / "run")] * 4))
    assert not (tmp_path / "run").exists()


def test_remove_folder_unremovable_raises(tmp_path, monkeypatch):
    """A folder that cannot be removed raises an error after a limited number of attempts."""
    (tmp_path / "folder").mkdir()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    # fsspec queries the working folder, which no longer exists.
    with pytest.raises(ValueError, match="cannot remove"):
        remove_folder(str(tmp_path / "folder"))


def test_download_full_local_disk_names_scratch_folder(tmp_path):
    """A full local disk raises an error that names the scratch folder."""
    (tmp_path / "file").write_bytes(bytes(100_000))
    (tmp_path / "copy").symlink_to("/dev/full")
    with pytest.raises(
        StorageUnavailableError, match=f"to the scratch folder {tmp_path}: its disk is full; free some space, or set"
    ):
        download(str(tmp_path / "file"), str(tmp_path / "copy"))


def test_write_bytes_onto_folder_raises(tmp_path):
    """Writing to a path that is a folder raises an error."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=f"^cannot write {tmp_path}/out: Is a directory$"):
        write_bytes(str(tmp_path / "out"), b"data")
    assert not list((tmp_path / "out").iterdir())


def test_write_bytes_below_file_raises(tmp_path):
    """Writing below a path that is a file raises an error that names the file."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^cannot write {tmp_path}/file/a.png: .*: {tmp_path}/file$"):
        write_bytes(str(tmp_path / "file" / "a.png"), b"data")


def failing_operation(num_failures, error):
    """Return an operation that fails a number of times, and the list of its calls."""
    calls = []

    def operation():
        calls.append(1)
        if len(calls) <= num_failures:
            raise error
        return "done"

    return operation, calls


def test_retry_while_unavailable_returns_after_failures():
    """An operation that fails twice is called three times, and each retry is reported."""
    operation, calls = failing_operation(2, StorageUnavailableError("cannot read x: slow down"))
    messages = []
    assert retry_while_unavailable(operation, 30, messages.append) == "done"
    assert messages == ["cannot read x: slow down; trying again"] * 2
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("error", "timeout_s", "min_calls"),
    [
        (StorageUnavailableError("no response"), 0.0, 1),
        (StorageUnavailableError("no response"), 0.2, 2),
        (ValueError("does not exist"), 30.0, 1),
    ],
)
def test_retry_while_unavailable_raises_the_error_itself(error, timeout_s, min_calls):
    """The error is raised at the timeout, or at once if a retry does not help."""
    operation, calls = failing_operation(100, error)
    with pytest.raises(type(error)) as raised:
        retry_while_unavailable(operation, timeout_s, lambda message: None)
    assert raised.value is error
    assert len(calls) == min_calls
