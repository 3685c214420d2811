"""Decide from plain numbers whether training is in trouble, without tensors, model or optimizer."""

from hf_pss.detection.baseline import Baseline as Baseline
from hf_pss.detection.detectors import DETECTORS as DETECTORS
from hf_pss.detection.detectors import AnyOf as AnyOf
from hf_pss.detection.detectors import Detector as Detector
from hf_pss.detection.detectors import DropDetector as DropDetector
from hf_pss.detection.detectors import FloorDetector as FloorDetector
from hf_pss.detection.detectors import Floors as Floors
from hf_pss.detection.detectors import RatioDetector as RatioDetector
from hf_pss.detection.detectors import make_detector as make_detector
from hf_pss.detection.judgement import GLOBAL as GLOBAL
from hf_pss.detection.judgement import Judgement as Judgement
from hf_pss.detection.judgement import Quantity as Quantity
from hf_pss.detection.judgement import Readings as Readings
from hf_pss.detection.judgement import Verdict as Verdict
from hf_pss.detection.judgement import worst as worst
