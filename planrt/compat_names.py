"""What PySyft 0.2 called things, and what planrt calls them: the table behind `planrt.compat` and
MIGRATION.md.

One row a line: the old name, the new one or ``-`` where there is none, and after ``|`` what is different and
what to write. A row needs a new name or such a text. ``python scripts/write_migration.py`` writes
MIGRATION.md from it, and ``tests/compat`` walks it.
"""

# ruff: noqa: E501 - rows are lines

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Name:
    """A name of PySyft 0.2.

    Attributes:
        old: the name with its module, such as ``syft.exceptions.GetNotPermittedError``; of methods with their
            class.
        new: planrt's, with its module; empty where it has none.
        note: what is different, and what to write; may be empty where `new` is not.
    """

    old: str
    new: str
    note: str


_ENCRYPTED = "share() makes such tensors: write x.fix_precision().share(bob, alice, crypto_provider=james)"
_NOT_ENCRYPTED = "not what shares are made with here: see docs/sharing.md"
_FUNCTIONS = "a name for a number in 0.2's messages; planrt's are not made of such"
_PRIVATE = "read what private=True and allowed_users= protect, and write x.send(worker, private=True)"

_NAMES: Final = f"""
syft.TorchHook                                        planrt.TorchHook
syft.hook                                             planrt.hook
syft.local_worker                                     planrt.local_worker
syft.torch                                            torch
syft.VirtualWorker                                    planrt.VirtualWorker
syft.WebsocketClientWorker                            planrt.WebsocketClientWorker
syft.WebsocketServerWorker                            planrt.WebsocketServerWorker
syft.BaseWorker                                       planrt.workers.BaseWorker
syft.Plan                                             planrt.Plan
syft.func2plan                                        planrt.func2plan
syft.method2plan planrt.method2plan
syft.Protocol                                         planrt.Protocol
syft.TrainConfig                                      planrt.TrainConfig
syft.BaseDataset                                      planrt.BaseDataset
syft.FederatedDataset                                 planrt.FederatedDataset
syft.FederatedDataLoader                              planrt.FederatedDataLoader | num_iterators=3 reads three, once
syft.PrivateGridNetwork                               planrt.PrivateGridNetwork | gives pointers, virtual workers too
syft.VirtualGrid                                      planrt.PrivateGridNetwork
syft.create_sandbox                                   planrt.create_sandbox
syft.PointerTensor                                    planrt.PointerTensor
syft.MultiPointerTensor                               planrt.MultiPointerTensor
syft.PointerPlan                                      planrt.workers.pointers.plan.PointerPlan
syft.PointerProtocol                                  planrt.PointerProtocol
syft.PointerDataset                                   planrt.BaseDataset | what dataset.send(worker) gives
syft.combine_pointers                                 planrt.combine_pointers
syft.ID_PROVIDER                                      planrt.ID_PROVIDER
syft.exceptions                                       planrt.exceptions
syft.serde                                            planrt.serde
syft.version                                          planrt.version
syft.__version__                                      planrt.__version__ | planrt's own, such as 0.1.0
syft.version.__version__                              planrt.version.__version__ | planrt's own, such as 0.1.0
syft.PublicGridNetwork                                - | there is no grid gateway: write PrivateGridNetwork(*workers)
syft.AdditiveSharingTensor                            - | {_ENCRYPTED}
syft.FixedPrecisionTensor                             - | {_ENCRYPTED}
syft.CRTPrecisionTensor                               - | {_NOT_ENCRYPTED}
syft.LargePrecisionTensor                             - | {_NOT_ENCRYPTED}
syft.AutogradTensor                                   - | gradients of pointers are computed on their worker: call loss.backward()
syft.PrivateTensor                                    - | {_PRIVATE}
syft.LoggingTensor                                    - | call logging.basicConfig(level=logging.DEBUG) and see worker.traffic
syft.ObjectWrapper                                    - | nothing from a peer is run: send a Plan made with func2plan
syft.ObjectPointer                                    planrt.workers.pointers.handle.ObjectPointer
syft.String                                           - | text does not travel as an object: tag or describe a tensor
syft.keras                                            - | planrt is for PyTorch: trace a module with planrt.Plan

syft.frameworks.torch.hook.hook.TorchHook             planrt.TorchHook
syft.frameworks.torch.TorchHook                       planrt.TorchHook
syft.frameworks.torch.fl.FederatedDataset             planrt.FederatedDataset
syft.frameworks.torch.fl.FederatedDataLoader          planrt.FederatedDataLoader
syft.frameworks.torch.fl.BaseDataset                  planrt.BaseDataset
syft.frameworks.torch.fl.dataset.BaseDataset          planrt.BaseDataset
syft.frameworks.torch.fl.dataset.FederatedDataset     planrt.FederatedDataset
syft.frameworks.torch.fl.dataset.dataset_federate     planrt.fl.federate
syft.frameworks.torch.fl.dataloader.FederatedDataLoader planrt.FederatedDataLoader
syft.frameworks.torch.fl.utils.federated_avg          planrt.fl.utils.federated_avg | changes and returns the first model, copy=True does not
syft.frameworks.torch.fl.utils.add_model              planrt.fl.utils.add_model
syft.frameworks.torch.fl.utils.scale_model            planrt.fl.utils.scale_model
syft.frameworks.torch.fl.utils.accuracy               planrt.fl.utils.accuracy
syft.frameworks.torch.fl.utils.extract_batches_per_worker planrt.fl.utils.extract_batches_per_worker
syft.frameworks.torch.fl.utils.create_gaussian_mixture_toy_data planrt.fl.utils.create_gaussian_mixture_toy_data
syft.frameworks.torch.fl.utils.iris_data_partial      planrt.fl.utils.iris_data_partial
syft.frameworks.torch.fl.loader.FederatedDataLoader   planrt.FederatedDataLoader
syft.frameworks.torch.federated.BaseDataset           planrt.BaseDataset
syft.frameworks.torch.federated.FederatedDataset      planrt.FederatedDataset
syft.frameworks.torch.federated.FederatedDataLoader   planrt.FederatedDataLoader
syft.frameworks.torch.federated.utils.federated_avg   planrt.fl.utils.federated_avg
syft.frameworks.torch.federated.utils.add_model       planrt.fl.utils.add_model
syft.frameworks.torch.federated.utils.scale_model     planrt.fl.utils.scale_model
syft.frameworks.torch.federated.utils.accuracy        planrt.fl.utils.accuracy
syft.frameworks.torch.federated.dataset.BaseDataset   planrt.BaseDataset
syft.frameworks.torch.federated.dataset.FederatedDataset planrt.FederatedDataset
syft.frameworks.torch.functions.combine_pointers      planrt.combine_pointers
syft.frameworks.torch.tensors.interpreters.native.TorchTensor torch.Tensor
syft.frameworks.torch.tensors.interpreters.additive_shared.AdditiveSharingTensor - | {_ENCRYPTED}
syft.frameworks.torch.tensors.interpreters.precision.FixedPrecisionTensor - | {_ENCRYPTED}
syft.frameworks.torch.tensors.interpreters.private.PrivateTensor - | {_PRIVATE}
syft.frameworks.torch.tensors.decorators.logging.LoggingTensor - | call logging.basicConfig(level=logging.DEBUG) and see worker.traffic
syft.frameworks.torch.nn.Conv2d                       torch.nn.Conv2d
syft.frameworks.torch.nn.RNN                          torch.nn.RNN
syft.frameworks.torch.nn.GRU                          torch.nn.GRU
syft.frameworks.torch.nn.LSTM                         torch.nn.LSTM
syft.frameworks.torch.crypto.securenn.relu_deriv      - | {_NOT_ENCRYPTED}
syft.frameworks.torch.mpc.spdz.spdz_mul               - | {_NOT_ENCRYPTED}
syft.frameworks.torch.he.paillier.keygen              - | {_NOT_ENCRYPTED}
syft.frameworks.torch.dp.pate.perform_analysis        - | planrt adds no noise: see planrt.plans.policy.rules for what a data owner can ask for
syft.frameworks.torch.linalg.EncryptedLinearRegression - | {_NOT_ENCRYPTED}

syft.federated.train_config.TrainConfig               planrt.TrainConfig
syft.federated.TrainConfig                            planrt.TrainConfig
syft.federated.floptimizer.Optims                     planrt.Optims
syft.federated.federated_client.FederatedClient       planrt.WebsocketServerWorker | serve data sets: server.add_dataset(dataset, key)
syft.federated.fl_client.FLClient                     - | it spoke to PyGrid: serve data with planrt.WebsocketServerWorker
syft.federated.fl_job.FLJob                           - | it spoke to PyGrid: write planrt.fl.RoundScheduler

syft.workers.base.BaseWorker                          planrt.workers.BaseWorker
syft.workers.abstract.AbstractWorker                  planrt.workers.BaseWorker
syft.workers.virtual.VirtualWorker                    planrt.VirtualWorker
syft.workers.websocket_client.WebsocketClientWorker   planrt.WebsocketClientWorker | its id must be the server's
syft.workers.websocket_server.WebsocketServerWorker   planrt.WebsocketServerWorker
syft.workers.node_client.NodeClient                   planrt.WebsocketClientWorker
syft.workers.tfe.TFEWorker                            - | planrt is for PyTorch: serve a plan from a planrt.WebsocketServerWorker

syft.messaging.plan.Plan                              planrt.Plan
syft.messaging.plan.func2plan                         planrt.func2plan
syft.messaging.plan.method2plan planrt.method2plan
syft.messaging.plan.plan.Plan                         planrt.Plan
syft.messaging.plan.plan.func2plan                    planrt.func2plan
syft.messaging.plan.plan.method2plan planrt.method2plan
syft.messaging.plan.state.State                       planrt.plans.plan.PlanState
syft.messaging.plan.procedure.Procedure               planrt.plans.ir.graph.Graph
syft.messaging.protocol.Protocol                      planrt.Protocol
syft.messaging.message.Message                        - | messages are planrt.workers.wire.messages; nobody makes them by hand: call pointers
syft.messaging.message.ObjectMessage                  - | write x.send(worker)
syft.messaging.message.ObjectRequestMessage           - | write pointer.get()
syft.messaging.message.Operation                      - | call torch's functions on pointers
syft.messaging.message.OperationMessage               - | call torch's functions on pointers
syft.messaging.message.PlanCommandMessage             - | write me.fetch_plan(id, worker)
syft.messaging.message.ForceObjectDeleteMessage       - | write del pointer, or worker.rm_obj(id)
syft.messaging.message.GetShapeMessage                - | write pointer.shape, which asks nobody
syft.messaging.message.IsNoneMessage                  - | write id in worker._objects
syft.messaging.message.ExecuteWorkerFunctionMessage   - | nothing from a peer is run: send a Plan made with func2plan
syft.messaging.message.SearchMessage                  - | write worker.search(["#tag"])
syft.execution.plan.Plan                              planrt.Plan
syft.execution.plan.func2plan                         planrt.func2plan
syft.execution.plan.method2plan planrt.method2plan
syft.execution.protocol.Protocol                      planrt.Protocol
syft.execution.placeholder.PlaceHolder                - | arguments of a plan are those of its function: give build() example tensors
syft.execution.translation.torchscript.PlanTranslatorTorchscript - | plan.torchscript is the plan as TorchScript
syft.execution.translation.default.PlanTranslatorDefault - | plan.code shows its ops; plan.torchscript is it as TorchScript
syft.execution.state.State                            planrt.plans.plan.PlanState

syft.generic.pointers.pointer_tensor.PointerTensor    planrt.PointerTensor
syft.generic.pointers.multi_pointer.MultiPointerTensor planrt.MultiPointerTensor
syft.generic.pointers.pointer_plan.PointerPlan        planrt.workers.pointers.plan.PointerPlan
syft.generic.pointers.pointer_protocol.PointerProtocol planrt.PointerProtocol
syft.generic.pointers.object_pointer.ObjectPointer    planrt.workers.pointers.handle.ObjectPointer
syft.generic.pointers.pointer_dataset.PointerDataset  planrt.BaseDataset
syft.generic.pointers.object_wrapper.ObjectWrapper    - | nothing from a peer is run: send a Plan made with func2plan
syft.generic.pointers.callable_pointer.CallablePointer - | send a Plan made with func2plan, and call its pointer
syft.generic.string.String                            - | text does not travel as an object: tag or describe a tensor
syft.generic.id_provider.IdProvider                   - | ids are drawn where they are needed: write planrt.ID_PROVIDER.pop()
syft.generic.metrics.NetworkMonitor                   - | write worker.traffic: messages and bytes each way
syft.generic.frameworks.types.FrameworkTensor         torch.Tensor
syft.generic.frameworks.types.FrameworkTensorType     torch.Tensor

syft.grid.PrivateGridNetwork                          planrt.PrivateGridNetwork
syft.grid.private_grid.PrivateGridNetwork             planrt.PrivateGridNetwork
syft.grid.public_grid.PublicGridNetwork               - | there is no grid gateway: write PrivateGridNetwork(*workers)
syft.grid.VirtualGrid                                 planrt.PrivateGridNetwork
syft.grid.clients.data_centric_fl_client.DataCentricFLClient planrt.WebsocketClientWorker
syft.grid.clients.model_centric_fl_client.ModelCentricFLClient - | it spoke to PyGrid: write planrt.fl.RoundScheduler

syft.serde.serialize                                  planrt.serde.serialize | plans and tensors; another format than 0.2's
syft.serde.deserialize                                planrt.serde.deserialize
syft.serde.serde.serialize                            planrt.serde.serialize
syft.serde.serde.deserialize                          planrt.serde.deserialize
syft.serde.msgpack.serde.serialize                    planrt.serde.serialize
syft.serde.msgpack.serde.deserialize                  planrt.serde.deserialize
syft.serde.protobuf.serde.protobuf_tensor_serializer  - | write planrt.serde.serialize(tensor)
syft.serde.compression.apply_lz4_compression          - | nothing is compressed: tensors travel as they are in memory
syft.sandbox.create_sandbox                           planrt.create_sandbox
syft.codes.TENSOR_SERIALIZATION                       - | {_FUNCTIONS}

syft.exceptions.GetNotPermittedError                  planrt.exceptions.GetNotPermittedError
syft.exceptions.SendNotPermittedError                 planrt.exceptions.SendNotPermittedError
syft.exceptions.TensorsNotCollocatedException         planrt.exceptions.TensorsNotCollocatedException
syft.exceptions.WorkerNotFoundException               planrt.exceptions.WorkerNotFoundException
syft.exceptions.ObjectNotFoundError                   planrt.exceptions.ObjectNotFoundError
syft.exceptions.IdNotUniqueError                      planrt.exceptions.IdNotUniqueError
syft.exceptions.InvalidTensorForRemoteGet             planrt.exceptions.InvalidTensorForRemoteGet
syft.exceptions.CannotRequestObjectAttribute          planrt.exceptions.CannotRequestObjectAttribute
syft.exceptions.PlanCommandUnknownError               planrt.exceptions.PlanCommandUnknownError
syft.exceptions.ResponseSignatureError                planrt.exceptions.ResponseSignatureError
syft.exceptions.PureFrameworkTensorFoundError         planrt.exceptions.PureFrameworkTensorFoundError
syft.exceptions.PureTorchTensorFoundError             planrt.exceptions.PureFrameworkTensorFoundError
syft.exceptions.RemoteObjectFoundError                planrt.exceptions.RemoteObjectFoundError
syft.exceptions.RemoteTensorFoundError                planrt.exceptions.RemoteObjectFoundError
syft.exceptions.CompressionNotFoundException          - | nothing is compressed, so nothing raises it: take it out
syft.exceptions.InvalidProtocolFileError              planrt.exceptions.InvalidProtocolFileError
"""
"""Names of modules. Every module that is named here is there under `planrt.compat`."""

_METHODS: Final = f"""
Tensor.send                   torch.Tensor.send
Tensor.send_                  torch.Tensor.send_
Tensor.get                    planrt.PointerTensor.get | user= is refused: a token says who asks, at the connection
Tensor.get_                   planrt.PointerTensor.get_
Tensor.move                   planrt.PointerTensor.move
Tensor.remote_get             planrt.PointerTensor.remote_get
Tensor.remote_send            planrt.PointerTensor.remote_send
Tensor.mid_get                planrt.PointerTensor.remote_get
Tensor.copy                   planrt.PointerTensor.copy
Tensor.combine                planrt.PointerTensor.combine
Tensor.id                     torch.Tensor.id
Tensor.owner                  torch.Tensor.owner
Tensor.location               planrt.PointerTensor.location
Tensor.id_at_location         planrt.PointerTensor.id_at_location
Tensor.child                  planrt.PointerTensor.child | the pointer itself: there are no wrappers
Tensor.is_wrapper             torch.Tensor.is_wrapper
Tensor.tag                    torch.Tensor.tag
Tensor.tags                   torch.Tensor.tags
Tensor.describe               torch.Tensor.describe
Tensor.description            torch.Tensor.description
Tensor.gc                     planrt.PointerTensor.gc
Tensor.garbage_collection     planrt.PointerTensor.garbage_collection
Tensor.disable_gc             planrt.PointerTensor.disable_gc
Tensor.create_pointer         - | x.send(worker) gives a pointer, PointerTensor(location=worker, id_at_location=id) one to what is there
Tensor.private_tensor         - | {_PRIVATE}
Tensor.allow                  - | allowed_users= of send says who may read, and a token who asks: worker.connect_as(token)
Tensor.share                  torch.Tensor.share | after fix_precision(), or of whole numbers
Tensor.fix_precision          torch.Tensor.fix_precision | field=, dtype= and storage= only as shares are: modulo 2**64
Tensor.float_precision        torch.Tensor.float_precision
Tensor.ser                    - | write planrt.serde.serialize(x)
torch.native_*                - | planrt replaces none of torch's functions: write torch.masked_select and the like
torch.roll                    torch.roll | torch's own, which takes whole numbers only
Module.send                   torch.nn.Module.send
Module.get                    torch.nn.Module.get
Module.move                   torch.nn.Module.move
Module.copy                   torch.nn.Module.copy
Module.location               torch.nn.Module.location
Dataset.federate              torch.utils.data.Dataset.federate
TorchHook.local_worker        planrt.local_worker
TorchHook.torch               planrt.TorchHook.torch
TorchHook.is_client_worker    planrt.TorchHook | an attribute that is kept; objects go with their pointers either way
BaseWorker._objects           planrt.VirtualWorker._objects | on websocket workers a listing without values
BaseWorker.search             planrt.VirtualWorker.search | gives pointers, on virtual workers too
BaseWorker.request_search     planrt.VirtualWorker.request_search
BaseWorker.request_obj        planrt.VirtualWorker.request_obj
BaseWorker.get_obj            planrt.VirtualWorker.get_obj
BaseWorker.set_obj            planrt.VirtualWorker.set_obj
BaseWorker.rm_obj             planrt.VirtualWorker.rm_obj
BaseWorker.register_obj       planrt.VirtualWorker.register_obj
BaseWorker.de_register_obj    planrt.VirtualWorker.de_register_obj
BaseWorker.load_data          planrt.VirtualWorker.load_data
BaseWorker.send               planrt.VirtualWorker.send
BaseWorker.send_obj           planrt.VirtualWorker.send_obj
BaseWorker.train_config       planrt.VirtualWorker.train_config
BaseWorker.registration_enabled planrt.VirtualWorker.registration_enabled | is_client_worker is False meanwhile; objects go with their pointers either way
BaseWorker.log_msgs           planrt.VirtualWorker.log_msgs
BaseWorker.msg_history        planrt.VirtualWorker | a list of planrt's own messages, once log_msgs is set
BaseWorker.message_pending_time planrt.VirtualWorker.message_pending_time
BaseWorker.is_framework_supported planrt.VirtualWorker.is_framework_supported
BaseWorker._known_workers     planrt.VirtualWorker._known_workers
BaseWorker.recv_msg           - | messages are planrt.workers.wire.messages, and workers answer those of their connections only
BaseWorker.execute_command    - | call torch's functions on pointers
BaseWorker.send_msg           - | messages are sent by pointers and plans: write x.send(worker), pointer.get()
BaseWorker.send_command       - | call torch's functions on pointers, or worker.remote.torch.zeros(2, 3)
BaseWorker.remote             planrt.VirtualWorker.remote
BaseWorker.add_worker         planrt.VirtualWorker.add_worker
BaseWorker.add_workers        planrt.VirtualWorker.add_workers
BaseWorker.get_worker         planrt.VirtualWorker.get_worker
BaseWorker.remove_worker_from_registry planrt.VirtualWorker.remove_worker_from_registry
BaseWorker.remove_worker_from_local_worker_registry planrt.VirtualWorker.remove_worker_from_local_worker_registry
BaseWorker.clear_objects      planrt.VirtualWorker.clear_objects
BaseWorker.objects_count      planrt.VirtualWorker.objects_count
BaseWorker.list_objects       planrt.VirtualWorker.list_objects
BaseWorker.fetch_plan         planrt.VirtualWorker.fetch_plan
BaseWorker.is_client_worker   planrt.VirtualWorker | an attribute that is kept
BaseWorker.generate_triple    - | the crypto provider hands them out by itself
WebsocketClientWorker.connect planrt.WebsocketClientWorker.connect | a session's objects do not outlive their connection, unless they are tagged
WebsocketClientWorker.close   planrt.WebsocketClientWorker.close
WebsocketClientWorker.fit     planrt.WebsocketClientWorker.fit
WebsocketClientWorker.async_fit planrt.WebsocketClientWorker.async_fit
WebsocketClientWorker.evaluate planrt.WebsocketClientWorker.evaluate | the loss is the mean over the samples
WebsocketClientWorker.clear_objects_remote planrt.WebsocketClientWorker.clear_objects_remote
WebsocketClientWorker.objects_count_remote planrt.WebsocketClientWorker.objects_count_remote
WebsocketClientWorker.list_objects_remote planrt.WebsocketClientWorker.list_objects_remote
WebsocketServerWorker.start   planrt.WebsocketServerWorker.start
WebsocketServerWorker.add_dataset planrt.WebsocketServerWorker.add_dataset
TrainConfig.send              planrt.TrainConfig.send
TrainConfig.model_ptr         planrt.TrainConfig | an attribute, once it was sent: config.model_ptr.get().obj
TrainConfig.loss_fn_ptr       planrt.TrainConfig | an attribute, once it was sent: config.loss_fn_ptr.get().obj
Plan.build                    planrt.Plan.build
Plan.is_built                 planrt.Plan.is_built
Plan.send                     planrt.Plan.send
Plan.copy                     planrt.Plan.copy
Plan.get_pointers             planrt.Plan.get_pointers
Plan.readable_plan            planrt.Plan.readable_plan
Plan.owner                    planrt.Plan.owner
Plan.state                    planrt.Plan | of func2plan(state=...): state.read(), state.tensors(), len(state)
Plan.add_translation          - | plan.torchscript is the plan as TorchScript
Plan.remove_translation       - | there are none to remove: plan.torchscript makes one when it is asked for
Plan.fix_precision            - | call the plan's function on shares
Plan.share                    - | call the plan's function on shares
PointerPlan.get               planrt.workers.pointers.plan.PointerPlan.get
PointerPlan.move              planrt.workers.pointers.plan.PointerPlan.move
PointerPlan.parameters        planrt.workers.pointers.plan.PointerPlan.parameters
Protocol.deploy               planrt.Protocol.deploy
Protocol.run                  planrt.Protocol.run | prints what goes where with verbose=True; inputs that are here are sent
Protocol.send                 planrt.Protocol.send
Protocol.get                  planrt.Protocol.get
Protocol.plans                planrt.Protocol.plans
Protocol.workers_resolved     planrt.Protocol.workers_resolved
PrivateGridNetwork.search     planrt.PrivateGridNetwork.search
PrivateGridNetwork.serve_model - | write plan.send(worker), and plan.tag("#model") before it
BaseDataset.send              planrt.BaseDataset.send
BaseDataset.get               planrt.BaseDataset.get
BaseDataset.transform         planrt.BaseDataset.transform
BaseDataset.get_data          planrt.BaseDataset.get_data
BaseDataset.get_targets       planrt.BaseDataset.get_targets
FederatedDataset.workers      planrt.FederatedDataset.workers
FederatedDataset.get_dataset  planrt.FederatedDataset.get_dataset
Optims.get_optim              planrt.Optims.get_optim
"""
"""Methods and attributes, by the class that users know. ``Tensor`` is a tensor here or a pointer."""


def _rows(text: str) -> tuple[Name, ...]:
    rows = []
    for line in text.strip().splitlines():
        if line:
            names, _, note = line.partition("|")
            old, new = names.split()
            rows.append(Name(old, "" if new == "-" else new, note.strip()))
    return tuple(rows)


NAMES: Final = _rows(_NAMES)
METHODS: Final = _rows(_METHODS)
BY_OLD: Final = {name.old: name for name in NAMES}
MODULES: Final = frozenset(
    ".".join(parts[:count])
    for parts in (name.old.split(".") for name in NAMES)
    for count in range(1, len(parts))
)
"""Every module of 0.2 that a row's name is in."""
