"""Numerics: norms, ranks, singular triplets, polar factors and spectral smoothing of matrices."""

from hf_pss.linalg.editing import Smoothed as Smoothed
from hf_pss.linalg.editing import SmoothingStatus as SmoothingStatus
from hf_pss.linalg.editing import product_triplets as product_triplets
from hf_pss.linalg.editing import smooth_product as smooth_product
from hf_pss.linalg.editing import smooth_spectrum as smooth_spectrum
from hf_pss.linalg.norms import effective_rank as effective_rank
from hf_pss.linalg.norms import frobenius_norm as frobenius_norm
from hf_pss.linalg.norms import noise_stable_rank as noise_stable_rank
from hf_pss.linalg.norms import quick_stable_rank as quick_stable_rank
from hf_pss.linalg.norms import spectral_norm as spectral_norm
from hf_pss.linalg.norms import stable_rank as stable_rank
from hf_pss.linalg.polar import POLYNOMIAL_SCHEDULES as POLYNOMIAL_SCHEDULES
from hf_pss.linalg.polar import newton_schulz as newton_schulz
from hf_pss.linalg.smoothing import SMOOTHING_FUNCTIONS as SMOOTHING_FUNCTIONS
from hf_pss.linalg.smoothing import Anchored as Anchored
from hf_pss.linalg.smoothing import Clip as Clip
from hf_pss.linalg.smoothing import SmoothingFunction as SmoothingFunction
from hf_pss.linalg.smoothing import StableRankCap as StableRankCap
from hf_pss.linalg.triplets import Triplets as Triplets
from hf_pss.linalg.triplets import leading_triplets as leading_triplets
