"""Opening, writing and removing through one module."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bsq_ray.storage import Unavailable, copy_out, remove_folder, write_bytes


def test_several_may_remove_the_same_folder_at_once(tmp_path):
    for folder in range(40):
        (tmp_path / "run" / str(folder)).mkdir(parents=True)
        for file in range(10):
            (tmp_path / "run" / str(folder) / str(file)).touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove_folder, [str(tmp_path / "run")] * 4))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_removed_is_told_and_not_tried_for_ever(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    # fsspec asks for the working folder, which is no more.
    with pytest.raises(ValueError, match="cannot remove"):
        remove_folder(str(tmp_path / "folder"))


def test_a_full_local_disk_is_not_taken_for_storage_that_is_away(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100_000))
    (tmp_path / "copy").symlink_to("/dev/full")
    with pytest.raises(
        Unavailable, match=f"to the scratch folder {tmp_path}: its disk is full; make room there, or set"
    ):
        copy_out(str(tmp_path / "file"), str(tmp_path / "copy"))


def test_a_folder_in_the_place_of_a_file_is_not_written_into(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=f"^cannot write {tmp_path}/out: Is a directory$"):
        write_bytes(str(tmp_path / "out"), b"data")
    assert not list((tmp_path / "out").iterdir())


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^cannot write {tmp_path}/file/a.png: .*: {tmp_path}/file$"):
        write_bytes(str(tmp_path / "file" / "a.png"), b"data")
