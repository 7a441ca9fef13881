"""Opening, writing and removing through one module."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from bsq_ray.storage import remove_folder


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
