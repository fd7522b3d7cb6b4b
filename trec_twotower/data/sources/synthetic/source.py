"""The source `synthetic`: a generated dataset whose best reachable recall is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from trec_twotower.data.sources.synthetic.interaction_model import InteractionModel
from trec_twotower.data.sources.synthetic.options import Options
from trec_twotower.data.sources.synthetic.reach import reachable
from trec_twotower.data.sources.synthetic.tables import Tables
from trec_twotower.data.sources.writer import DatasetWriter


def write(options: Options, writer: DatasetWriter) -> dict[str, Any]:
    """Write the synthetic dataset and return the content of dataset.yaml."""
    options = options.resolve()
    model = InteractionModel(options)
    tables = Tables(model)
    for piece in tables.catalogue():
        writer.write("items", piece)

    train_count = np.zeros(options.items, np.int64)
    num_events = 0
    users_per_piece = max(1, int(options.rows_per_piece / options.events_per_user))
    for start in range(0, options.users, users_per_piece):
        user = np.arange(start, min(start + users_per_piece, options.users))
        events = model.events(user)
        num_events += len(events.item)
        train_count += np.bincount(events.item[events.is_train], minlength=options.items)
        writer.write("users", tables.users(user))
        for split, table in tables.interactions(events).items():
            writer.write(split, table)

    counts = {"users": options.users, "items": options.items, "interactions": num_events}
    reach = reachable(model, tables.item_id, train_count)
    return writer.finish("synthetic", options.model_dump(mode="json"), counts, **reach)
