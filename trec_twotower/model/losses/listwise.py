"""Losses over lists of items with grades."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from trec_twotower.model.losses.chunked import pair_logits, row_log_sum_exp, scaled
from trec_twotower.model.losses.relations import Relations

Grades = Literal["share", "softmax"]


def listwise(
    user_BD: Tensor,
    item_CD: Tensor,
    relations: Relations,
    *,
    temperature: float | Tensor = 1.0,
    grades: Grades = "share",
) -> Tensor:
    """Return the cross-entropy between the grades of a row's list and the softmax over the list, in nats.

    Other candidates are not used.

        sum over the row's given pairs g of  -weight_g * t_g * log softmax(l)_g,     l = u . v / temperature

    With grades `share` the target t is the grade's share of the row's grades (a row without any above 0 costs
    nothing; those below 0 count as 0): weighted softmax cross-entropy, Bruch et al. 2019. With `softmax` it is the
    softmax of the row's grades: ListNet's top-one probability, Cao et al. 2007.
    """
    given = relations.given
    assert given is not None
    user_BD, item_CD = scaled(user_BD, item_CD, temperature)
    row_G, num_rows = given.row_P, user_BD.shape[0]
    logit_G = pair_logits(user_BD, item_CD, given)
    grade_G = given.labels(logit_G)
    if grades == "share":
        grade_G = grade_G.clamp(min=0)
        total_B = grade_G.new_zeros(num_rows).index_add(0, row_G, grade_G)
        target_G = grade_G / total_B.where(total_B > 0, 1.0)[row_G]
    else:
        target_G = (grade_G - row_log_sum_exp(grade_G, row_G, num_rows)[row_G]).exp()
    log_sum_B = row_log_sum_exp(logit_G, row_G, num_rows)
    return (given.weights(logit_G) * target_G * (log_sum_B[row_G] - logit_G)).sum()
