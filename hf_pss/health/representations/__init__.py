"""Representations of sampled tokens: have a block's outputs collapsed to few directions?"""

from __future__ import annotations

from hf_pss.health.representations.attention_logits import (
    attention_logit_bound as attention_logit_bound,
)
from hf_pss.health.representations.capture import Capture as Capture
from hf_pss.health.representations.capture import capture as capture
from hf_pss.health.representations.collapse import CollapseMeasures as CollapseMeasures
from hf_pss.health.representations.collapse import collapse_measures as collapse_measures
from hf_pss.health.representations.log_det import LogDetBounds as LogDetBounds
from hf_pss.health.representations.log_det import gram_log_det as gram_log_det
from hf_pss.health.representations.log_det import log_det_bounds as log_det_bounds
from hf_pss.health.representations.token_cosine import token_cosine as token_cosine
