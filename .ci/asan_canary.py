"""Reads past the end of an array, through fastvae. Must die under AddressSanitizer."""

import numpy as np
import torch

import fastvae

array = np.zeros(16, dtype=np.float32)
claimed = torch.from_numpy(np.lib.stride_tricks.as_strided(array, shape=(64, 64), strides=(4, 4)))
print(fastvae.gaussian_kl(claimed, claimed))
