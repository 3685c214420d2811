"""Curvature of a loss, on demand: Hessian eigenvalues, trace and spectral density."""

from __future__ import annotations

from hf_pss.health.curvature.density import SpectralDensity as SpectralDensity
from hf_pss.health.curvature.density import hessian_density as hessian_density
from hf_pss.health.curvature.lanczos import ExtremeEigenvalues as ExtremeEigenvalues
from hf_pss.health.curvature.lanczos import hessian_eigenvalues as hessian_eigenvalues
from hf_pss.health.curvature.products import Hessian as Hessian
from hf_pss.health.curvature.trace import HessianTrace as HessianTrace
from hf_pss.health.curvature.trace import TraceEstimate as TraceEstimate
from hf_pss.health.curvature.trace import hessian_trace as hessian_trace
