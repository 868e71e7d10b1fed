"""The errors of `planrt.errors`, also by the names that PySyft 0.2 had for them: ``sy.exceptions``."""

from __future__ import annotations

from planrt.errors import *  # noqa: F403
from planrt.errors import (
    DuplicateIdError,
    GetNotPermittedError,
    LocalError,
    MixedLocationsError,
    OpNotAllowedError,
    PlanFormatError,
    PointerError,
    RemoteOpError,
    UnknownObjectError,
    UnknownWorkerError,
    WireError,
)

TensorsNotCollocatedException = MixedLocationsError
WorkerNotFoundException = UnknownWorkerError
ObjectNotFoundError = UnknownObjectError
IdNotUniqueError = DuplicateIdError
InvalidTensorForRemoteGet = LocalError
CannotRequestObjectAttribute = LocalError
PlanCommandUnknownError = OpNotAllowedError
ResponseSignatureError = WireError
PureFrameworkTensorFoundError = PointerError
RemoteObjectFoundError = RemoteOpError
InvalidProtocolFileError = PlanFormatError
SendNotPermittedError = GetNotPermittedError
