"""How parameters are stored over ranks. Only this package handles DDP, DTensor and ZeRO.

The other packages use a `Backend`. A backend reads complete parameters, or the part of a parameter
that this rank stores. It sends small results from the rank that computed them to all others, and
makes sure that all ranks make the same decisions.
"""

from hf_pss.models.distributed.backend import Backend as Backend
from hf_pss.models.distributed.backend import OneProcess as OneProcess
from hf_pss.models.distributed.backend import Part as Part
from hf_pss.models.distributed.backend import Replicated as Replicated
from hf_pss.models.distributed.choose import backend_for as backend_for
from hf_pss.models.distributed.sharded import Sharded as Sharded
from hf_pss.models.distributed.sharded import gathered as gathered
from hf_pss.models.distributed.sharded import reshard as reshard
from hf_pss.models.distributed.sharing import Alone as Alone
from hf_pss.models.distributed.sharing import ComputedTensor as ComputedTensor
from hf_pss.models.distributed.sharing import Ranks as Ranks
from hf_pss.models.distributed.sharing import Replicas as Replicas
from hf_pss.models.distributed.sharing import Shards as Shards
from hf_pss.models.distributed.sharing import Sharing as Sharing
from hf_pss.models.distributed.sharing import local as local
from hf_pss.models.distributed.sharing import owners_of as owners_of
from hf_pss.models.distributed.sharing import shards_of as shards_of
from hf_pss.models.distributed.zero import Zero as Zero
