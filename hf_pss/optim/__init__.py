"""Spectral optimizers: a rule moves the weight matrices, and AdamW all other parameters."""

from hf_pss.optim.groups import build_optimizer as build_optimizer
from hf_pss.optim.groups import describe_groups as describe_groups
from hf_pss.optim.groups import matrix_groups as matrix_groups
from hf_pss.optim.optimizer import MatrixOptimizer as MatrixOptimizer
from hf_pss.optim.rules import RULES as RULES
from hf_pss.optim.rules import UPDATE_SCALES as UPDATE_SCALES
from hf_pss.optim.rules import Rule as Rule
