"""Opening, writing and removing through one module."""

from concurrent.futures import ThreadPoolExecutor

from bsq_ray.storage import remove_folder


def test_several_may_remove_the_same_folder_at_once(tmp_path):
    for folder in range(40):
        (tmp_path / "run" / str(folder)).mkdir(parents=True)
        for file in range(10):
            (tmp_path / "run" / str(folder) / str(file)).touch()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove_folder, [str(tmp_path / "run")] * 4))
    assert not (tmp_path / "run").exists()
