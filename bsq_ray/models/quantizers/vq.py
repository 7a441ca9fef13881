"""Vector quantization with a learned codebook (VQ-VAE; with l2-normalized codes as in ViT-VQGAN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bsq_ray import config
from bsq_ray.models.quantizers.bits import bits_to_integers, integers_to_bits
from bsq_ray.models.quantizers.l2_normalize import l2_normalize
from bsq_ray.models.quantizers.quantizer import Quantized, Quantizer, straight_through

# Maximum number of distances in memory at once, for any size of the codebook.
_MAX_DISTANCES = 2**24


class VectorQuantizer(Quantizer):
    """Nearest row of the codebook. loss = |sg(v) - e|² + commitment_weight · |v - sg(e)|², mean over tokens."""

    def __init__(self, quantizer_config: config.VQConfig) -> None:
        super().__init__()
        self.bits = quantizer_config.bits
        self.channels = quantizer_config.code_dim
        self.l2_normalize = quantizer_config.l2_normalize
        self.commitment_weight = quantizer_config.commitment_weight
        self.codebook = nn.Parameter(torch.empty(quantizer_config.codebook_size, quantizer_config.code_dim))
        nn.init.uniform_(self.codebook, -1 / quantizer_config.codebook_size, 1 / quantizer_config.codebook_size)

    def quantize(self, v_BNC: Tensor) -> Quantized:
        """Find the nearest codes and copy their gradient to the vectors."""
        v_BNC = self._maybe_normalize(v_BNC)
        codebook_KC = self._maybe_normalize(self.codebook)
        index_BN = _nearest_indices(v_BNC.detach().flatten(0, 1), codebook_KC.detach()).view(v_BNC.shape[:2])
        codes_BNC = F.embedding(index_BN, codebook_KC)
        codebook_loss = (v_BNC.detach() - codes_BNC).square().sum(-1).mean()
        commitment_loss = (v_BNC - codes_BNC.detach()).square().sum(-1).mean()
        loss = codebook_loss + self.commitment_weight * commitment_loss
        bits_BNL = integers_to_bits(index_BN.unsqueeze(-1), self.bits)
        return Quantized(straight_through(codes_BNC, v_BNC), bits_BNL, loss, {"commit": commitment_loss.detach()})

    def dequantize(self, bits_BNL: Tensor) -> Tensor:
        """Look up rows of the codebook."""
        index_BN = bits_to_integers(bits_BNL, self.bits).squeeze(-1)
        return F.embedding(index_BN, self._maybe_normalize(self.codebook))

    def _maybe_normalize(self, x: Tensor) -> Tensor:
        return l2_normalize(x) if self.l2_normalize else x


def _nearest_indices(v_NC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Return the index of the nearest row for each vector, searched in chunks of tokens."""
    square_K = codebook_KC.square().sum(-1)
    tiles = v_NC.split(max(1, _MAX_DISTANCES // codebook_KC.shape[0]))
    indices = [torch.addmm(square_K, tile, codebook_KC.t(), alpha=-2).argmin(-1) for tile in tiles]
    return torch.cat(indices)
