"""Where parameters live: the one place that knows DDP, DTensor and ZeRO.

Layer 3 sees a `Backend`: it reads whole parameters, or the part of one that is kept here, sends
small results from the rank that computed them to all others, and makes every rank decide alike.
"""

from hf_pss.distributed.backend import Backend as Backend
from hf_pss.distributed.backend import OneProcess as OneProcess
from hf_pss.distributed.backend import Part as Part
from hf_pss.distributed.backend import Replicated as Replicated
from hf_pss.distributed.choose import backend_for as backend_for
from hf_pss.distributed.sharded import Sharded as Sharded
from hf_pss.distributed.sharded import gathered as gathered
from hf_pss.distributed.zero import Zero as Zero
