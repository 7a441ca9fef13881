"""Work in a pool of actors: results in order, and errors that read as if there were no pool."""

import pytest

from bsq_ray.runtime.actor_pool import map_in_pool


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_errors_as_they_were(workers, ray_local):
    def half(number):
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    assert list(map_in_pool([4, 8, 2, 0], lambda: half, workers)) == [2, 4, 1, 0]
    found = map_in_pool([4, 6, 5, 2], lambda: half, workers)
    assert [next(found), next(found)] == [2, 3]
    with pytest.raises(ValueError, match="^5 is odd$"):
        next(found)
