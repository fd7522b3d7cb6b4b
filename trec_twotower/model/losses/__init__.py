"""The losses by their name in the config.

All have the same signature: `loss(user_BD, item_CD, relations, **parameters)` returns the sum over the rows.
The parameters are fields of its class in `config/losses.py`.
A new loss is a function here, a class there and a test.
"""

from collections.abc import Callable

from torch import Tensor

from trec_twotower.data.loading.pairs import Pairs
from trec_twotower.model.losses.listwise import listwise
from trec_twotower.model.losses.mixture import softmax_bce
from trec_twotower.model.losses.pairwise import bpr, margin
from trec_twotower.model.losses.pointwise import bce, ccl
from trec_twotower.model.losses.relations import Hardest, Relations
from trec_twotower.model.losses.softmax import bsl, softmax

__all__ = ["LOSSES", "Hardest", "Pairs", "Relations"]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "softmax": softmax,
    "bce": bce,
    "softmax_bce": softmax_bce,
    "bsl": bsl,
    "ccl": ccl,
    "bpr": bpr,
    "margin": margin,
    "listwise": listwise,
}
