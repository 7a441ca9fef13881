"""Work in a pool of actors: results in order, and errors that read as if there were no pool."""

import pytest

from bsq_ray.runtime.actor_pool import actor_map_ordered


@pytest.mark.parametrize("workers", [0, 2])
def test_actor_map_keeps_order_and_raises_original_error(workers, ray_local):
    """Results arrive in order, and an error is raised as in a local call."""

    def half(number):
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    assert list(actor_map_ordered([4, 8, 2, 0], lambda: half, workers)) == [2, 4, 1, 0]
    results = actor_map_ordered([4, 6, 5, 2], lambda: half, workers)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ValueError, match="^5 is odd$"):
        next(results)
