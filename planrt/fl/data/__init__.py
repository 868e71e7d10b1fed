"""Data sets: the digits, Boston Housing, splitting, and data sets that lie on several workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from planrt.lazy import names_of

if TYPE_CHECKING:
    from planrt.fl.data.digits import (
        DATASETS,
        DOWNLOAD_TIMEOUT,
        PARTITIONS,
        TEST_KEY,
        TESTING,
        TRAIN_KEY,
        VARIABLE,
        Bytes,
        DataSource,
        LoadedData,
        cache_folder,
        digit_counts,
        find,
        load,
        no_partition,
        normalize,
        partition_for,
        read,
        usual_places,
    )

_HOMES = {
    "Bytes": "planrt.fl.data.digits",
    "VARIABLE": "planrt.fl.data.digits",
    "DATASETS": "planrt.fl.data.digits",
    "PARTITIONS": "planrt.fl.data.digits",
    "TESTING": "planrt.fl.data.digits",
    "TRAIN_KEY": "planrt.fl.data.digits",
    "TEST_KEY": "planrt.fl.data.digits",
    "DOWNLOAD_TIMEOUT": "planrt.fl.data.digits",
    "DataSource": "planrt.fl.data.digits",
    "LoadedData": "planrt.fl.data.digits",
    "load": "planrt.fl.data.digits",
    "find": "planrt.fl.data.digits",
    "read": "planrt.fl.data.digits",
    "partition_for": "planrt.fl.data.digits",
    "no_partition": "planrt.fl.data.digits",
    "normalize": "planrt.fl.data.digits",
    "digit_counts": "planrt.fl.data.digits",
    "cache_folder": "planrt.fl.data.digits",
    "usual_places": "planrt.fl.data.digits",
}
"""Public name -> module, imported at first use."""

__all__ = [
    "Bytes",
    "VARIABLE",
    "DATASETS",
    "PARTITIONS",
    "TESTING",
    "TRAIN_KEY",
    "TEST_KEY",
    "DOWNLOAD_TIMEOUT",
    "DataSource",
    "LoadedData",
    "load",
    "find",
    "read",
    "partition_for",
    "no_partition",
    "normalize",
    "digit_counts",
    "cache_folder",
    "usual_places",
]

__getattr__ = names_of(__name__, _HOMES)
