"""Ordered map over actors: order of results, and errors raised as in a local call."""

import pytest

from bsq_ray.runtime.actor_pool import actor_map_ordered


@pytest.mark.parametrize("num_workers", [0, 2])
def test_actor_map_keeps_order_and_raises_original_error(num_workers, ray_local):
    """Results arrive in order, and an error is raised as in a local call."""

    def half(number):
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    assert list(actor_map_ordered([4, 8, 2, 0], lambda: half, num_workers)) == [2, 4, 1, 0]
    results = actor_map_ordered([4, 6, 5, 2], lambda: half, num_workers)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ValueError, match="^5 is odd$"):
        next(results)
