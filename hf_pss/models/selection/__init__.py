"""The weight matrices of a model: the parameters that hold them, their parts, and the reasons."""

from __future__ import annotations

from hf_pss.models.selection.layouts import RowPattern as RowPattern
from hf_pss.models.selection.select import select_matrices as select_matrices
from hf_pss.models.selection.survey import canonical_name as canonical_name
from hf_pss.models.selection.survey import named_parameters_canonical as named_parameters_canonical
from hf_pss.models.selection.views import AdapterView as AdapterView
from hf_pss.models.selection.views import Exclusion as Exclusion
from hf_pss.models.selection.views import MatrixView as MatrixView
from hf_pss.models.selection.views import Role as Role
from hf_pss.models.selection.views import Selection as Selection
