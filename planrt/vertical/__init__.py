"""Vertical federated learning: organisations with different columns about overlapping people train one model.

Each owner serves a `Table` from a worker. A `Party` names one for a run: its id columns, the columns that it gives, and
at one of them the label. `intersection_size` says how many people are in two tables, `linear_regression` and
`logistic_regression` train on encrypted values with a third worker that holds the key, or on secret shares,
`split_network` trains a network in parts. The client steers, and sees no row. docs/vertical.md says what each party
learns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.sharing.columns.table import Table
    from planrt.vertical.intersection import async_intersection_size, intersection_size
    from planrt.vertical.linear import (
        Regression,
        async_linear_regression,
        async_logistic_regression,
        linear_regression,
        logistic_regression,
    )
    from planrt.vertical.networks import SplitNetwork, async_split_network, split_network
    from planrt.vertical.parties import Party, async_table_columns, table_columns
    from planrt.vertical.runs import Evaluation

_HOMES = {
    "Evaluation": "planrt.vertical.runs",
    "Party": "planrt.vertical.parties",
    "Regression": "planrt.vertical.linear",
    "SplitNetwork": "planrt.vertical.networks",
    "Table": "planrt.sharing.columns.table",
    "async_intersection_size": "planrt.vertical.intersection",
    "async_linear_regression": "planrt.vertical.linear",
    "async_logistic_regression": "planrt.vertical.linear",
    "async_split_network": "planrt.vertical.networks",
    "async_table_columns": "planrt.vertical.parties",
    "intersection_size": "planrt.vertical.intersection",
    "linear_regression": "planrt.vertical.linear",
    "logistic_regression": "planrt.vertical.linear",
    "split_network": "planrt.vertical.networks",
    "table_columns": "planrt.vertical.parties",
}
"""Public name -> module, imported at first use."""

__all__ = [
    "Evaluation",
    "Party",
    "Regression",
    "SplitNetwork",
    "Table",
    "async_intersection_size",
    "async_linear_regression",
    "async_logistic_regression",
    "async_split_network",
    "async_table_columns",
    "intersection_size",
    "linear_regression",
    "logistic_regression",
    "split_network",
    "table_columns",
]

__getattr__ = names_of(__name__, _HOMES)
