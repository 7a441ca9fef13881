"""Measure the memory of gradients and of the buckets that they are sent in, during a backward pass."""


class GradientMemory:
    """Largest sum of bytes of gradients and buckets, after each gradient of a backward pass.

    Attributes:
        peak_bytes: the largest sum so far.
    """

    def __init__(self, model, buckets):
        self.peak_bytes = 0
        self._model, self._buckets = model, buckets
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: self.observe())

    def observe(self):
        """Compare the current sum with the largest one; memory that tensors share counts once."""
        tensors = [bucket.flat for bucket in self._buckets._buckets]
        tensors += [parameter.grad for parameter in self._model.parameters()]
        storages = [value.untyped_storage() for value in tensors if value is not None]
        num_bytes = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        self.peak_bytes = max(self.peak_bytes, num_bytes)
