"""The table of rules by name. The contract tests cover every row."""

from __future__ import annotations

from hf_pss.optim.muon import MUON, NORMUON
from hf_pss.optim.softmuon import SOFTMUON, SOFTSIGNUM
from hf_pss.optim.specmuon import SPECMUON
from hf_pss.optim.spectra import SPECTRA
from hf_pss.optim.update_rule import Rule

RULES: dict[str, Rule] = {
    "muon": MUON,
    "normuon": NORMUON,
    "softmuon": SOFTMUON,
    "softsignum": SOFTSIGNUM,
    "specmuon": SPECMUON,
    "spectra": SPECTRA,
}
