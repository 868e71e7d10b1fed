"""Plan files: what was saved comes back bit for bit, anything else is refused with a reason."""

import hashlib
import os
import stat
import warnings

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nets import make
from torch import nn

import planrt
from planrt.errors import LocalError, OptionError, PlanError, PlanFormatError, PlanWarning
from planrt.plans import Plan, load_file, load_plan
from planrt.serde.dtypes import DTYPES

pytestmark = pytest.mark.filterwarnings(
    "ignore::planrt.errors.PlanWarning"
)  # they capture tensors on purpose

ONE = torch.tensor([1.0])


def small():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanWarning)  # it captures ONE, on purpose
        return Plan(lambda x: x + ONE, name="small").build(torch.ones(2))


def saved(plan, folder, name="plan.bin"):
    path = folder / name
    plan.save(path)
    return path


def bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8).tolist() if tensor.numel() else []


class Every(nn.Module):
    """State of every dtype and shape that plans hold."""

    def __init__(self):
        super().__init__()
        for name, dtype in DTYPES.items():
            self.register_buffer(f"b_{name}", torch.randn(3, 2).mul(3).to(dtype))
        self.register_buffer("scalar", torch.tensor(-0.0))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("strided", torch.arange(12)[::3])
        self.register_buffer("conjugate", torch.randn(3, dtype=torch.complex64).conj())
        self.register_buffer(
            "odd", torch.tensor([0x7FC00001, 0xFFC12345, 0x80000000]).int().view(torch.float32)
        )
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.weight = nn.Parameter(torch.randn(2, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)

    def forward(self, x):
        return x + self.scalar


class Of(Plan):
    def __init__(self, net):
        super().__init__(name="of")
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


def test_state_survives_bit_for_bit(tmp_path):
    plan = Of(Every()).build(torch.ones(2))
    again = load_plan(saved(plan, tmp_path))
    for before, after in zip(plan.state_tensors(), again.state_tensors(), strict=True):
        assert (before.dtype, before.shape, before.requires_grad) == (
            after.dtype, after.shape, after.requires_grad,
        )  # fmt: skip
        assert bits(before.resolve_conj()) == bits(after)
    assert again.state_hash == plan.state_hash
    assert list(again.state_dict()) == sorted(again.state_dict(), key=list(plan.state_dict()).index)
    assert set(again.state_dict()) == set(plan.state_dict())
    assert "net.hidden" not in again.state_dict()
    assert {name for name, one in again.named_parameters()} == {"net.weight", "net.frozen"}


@pytest.mark.parametrize("name", ["mnist", "resnet18", "transformer", "lstm", "tied", "embedding", "frozen"])
def test_networks_come_back_as_plans(name, tmp_path):
    net, _, batches = make(name)
    x = batches[0][0]
    plan = Of(net).build(x).eval()
    plan.tag("#a", "#b").describe("A net.")
    again = planrt.load_plan(saved(plan, tmp_path))
    assert isinstance(again, Plan)
    assert again.is_built
    assert (again.name, again.training, again.tags, again.description) == (
        "of", False, {"#a", "#b"}, "A net.",
    )  # fmt: skip
    assert again.record.to_bytes() == plan.record.to_bytes()
    assert str(again.graph) == str(plan.graph)
    assert torch.equal(again(x), plan(x))
    for mode in (True, False):
        torch.manual_seed(3)
        expected = plan.train(mode)(x)
        torch.manual_seed(3)
        assert torch.equal(again.train(mode)(x), expected)
    net.load_state_dict({key.removeprefix("net."): value for key, value in again.state_dict().items()})
    twice = load_plan(saved(again, tmp_path, "twice"))
    assert twice.state_hash == again.state_hash
    assert list(twice.state_dict()) == list(again.state_dict())


def test_tied_weights_stay_one_tensor(tmp_path):
    net, _, batches = make("tied")
    again = load_plan(saved(Of(net).build(batches[0][0]), tmp_path))
    assert again.net.decoder.weight is again.net.encoder.weight
    assert len(list(again.parameters())) == 2


def test_a_plan_of_a_module_has_the_keys_of_the_module(tmp_path):
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    plan = planrt.func2plan(args_shape=[(-1, 2)])(net)
    again = load_plan(saved(plan, tmp_path))
    fresh = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    fresh.load_state_dict(again.state_dict())
    x = torch.randn(4, 2)
    assert torch.equal(again.eval()(x), fresh.eval()(x))


def test_captured_tensors_and_state_and_calls_by_name(tmp_path):
    captured = torch.randn(2)
    count = torch.tensor(3.0)

    def f(x, *, scale=2.0, more=None, state):
        state.read()[0].add_(1)
        return {"sum": x["a"] * scale + captured, "count": state.read()[0] + 0}

    plan = Plan(f, state=(count,)).build({"a": torch.ones(1, 2)})
    again = load_plan(saved(plan, tmp_path))
    for one in (plan, again):
        assert one(x={"a": torch.ones(3, 2)}, scale=2.0)["count"] == 4
        assert list(one.state_dict()) == ["state.0"]
    copied = again.copy()
    assert copied({"a": torch.ones(1, 2)})["count"] == 5
    assert again.state_dict()["state.0"] == 4
    assert torch.equal(again({"a": torch.zeros(1, 2)})["sum"][0], captured)
    with pytest.raises(planrt.errors.PlanArgumentError, match="scale of plan 'f' is fixed at 2.0"):
        again({"a": torch.ones(1, 2)}, scale=3.0)


def test_a_loaded_plan_is_sent_as_any_other(tmp_path):
    hook = planrt.TorchHook(torch)
    bob = planrt.VirtualWorker(hook, id="files-bob")
    plan = Of(nn.Linear(2, 3)).build(torch.ones(1, 2))
    again = load_plan(saved(plan, tmp_path))
    x = torch.randn(4, 2)
    assert torch.equal(again.send(bob)(x.send(bob)).get(), plan(x))


def test_the_header_is_read_without_the_state(tmp_path):
    plan = Of(nn.Linear(2, 3)).build(torch.ones(1, 2)).tag("#x").describe("words").eval()
    path = saved(plan, tmp_path)
    data = bytearray(path.read_bytes())
    found = load_file(path)
    assert found.record.graph(training=False) == plan.graph
    assert (found.training, found.tags, found.description) == (False, ("#x",), "words")
    assert found.state_hash == plan.state_hash
    assert found.keys == {"net.weight": "net.weight", "net.bias": "net.bias"}
    assert found.state_bytes == 9 * 4
    data[-40] ^= 1  # in the state
    path.write_bytes(data)
    assert load_file(path) == found
    with pytest.raises(PlanFormatError, match="altered"):
        load_plan(path)


def test_the_layout_is_the_documented_one(tmp_path):
    plan = small()
    data = saved(plan, tmp_path).read_bytes()
    assert data[:8] == b"\x89planrt\n"
    assert int.from_bytes(data[8:12], "little") == 1
    header, state = (int.from_bytes(data[at : at + 8], "little") for at in (12, 20))
    assert len(data) == 28 + header + 32 + state + 32
    assert data[28 + header : 60 + header] == hashlib.sha256(data[: 28 + header]).digest()
    assert data[60 + header : -32] == torch.tensor([1.0]).numpy().tobytes()
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    assert msgpack.unpackb(data[28 : 28 + header]) == [
        plan.record.to_bytes(), True, [], "", plan.state_hash, [],
    ]  # fmt: skip


# What is no plan file


def sealed(header, state=b"", version=1):
    """A file of these parts, its digests right."""
    start = b"\x89planrt\n" + b"".join(
        number.to_bytes(size, "little") for number, size in ((version, 4), (len(header), 8), (len(state), 8))
    )
    start += header + hashlib.sha256(start + header).digest() + state
    return start + hashlib.sha256(start).digest()


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path):
    path = saved(small(), tmp_path)
    data = path.read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(PlanFormatError):
            load_plan(path)
        path.write_bytes(data[:position])
        with pytest.raises(PlanFormatError, match=r"truncated|not a plan file"):
            load_plan(path)
        with pytest.raises(PlanFormatError, match=r"truncated|not a plan file"):
            load_file(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(PlanFormatError, match="1 bytes more than it announces"):
        load_plan(path)


def header_of(plan, **changes):
    fields = {
        "record": plan.record.to_bytes(), "training": True, "tags": [], "description": "",
        "state_hash": plan.state_hash, "keys": [],
    }  # fmt: skip
    return msgpack.packb(list({**fields, **changes}.values()))


STATE = torch.tensor([1.0]).numpy().tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a plan file"),
        (b"PK\x03\x04 something else entirely, a zip perhaps", "not a plan file"),
        (b"\x89planrt\n\1\0", "truncated: 10 bytes are not even the beginning"),
        (sealed(b"", version=2), r"format 2, newer than 1: update planrt"),
        (sealed(b"", version=0), "no version number"),
        (b"\x89planrt\n\1\0\0\0" + b"\xff" * 16 + b"x" * 100, "truncated: it announces 36893488147419103322"),
        (sealed(b"\xc1"), "not readable as msgpack"),
        (sealed(msgpack.packb(["x"])), "its header cannot be read"),
        (sealed(header_of(small(), training=1), STATE), "its header cannot be read"),
        (sealed(header_of(small(), record=b"\x91\x01"), STATE), "these bytes are not a plan"),
        (sealed(header_of(small(), tags=[""]), STATE), "its tags cannot be read"),
        (sealed(header_of(small(), tags=[7]), STATE), "its tags cannot be read"),
        (sealed(header_of(small(), description="x" * 70_000), STATE), "its description is too long"),
        (sealed(header_of(small(), keys=[["a"]]), STATE), "the keys of its state cannot be read"),
        (sealed(header_of(small(), keys=[["a", "b"]]), STATE), "the keys of its state cannot be read"),
        (sealed(header_of(small(), state_hash="0" * 64), STATE), "hash of the state is not the one"),
        (sealed(header_of(small())), "its state takes 4 bytes, not 0"),
        (sealed(header_of(small()), STATE * 2), "its state takes 4 bytes, not 8"),
    ],
)
def test_files_that_are_no_plan(data, message, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(PlanFormatError, match=message) as caught:
        load_plan(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_truth_values_and_names_are_checked(tmp_path):
    mask = torch.tensor([True, False])
    plan = Plan(lambda x: x * mask).build(torch.ones(2))
    path = tmp_path / "file"
    path.write_bytes(sealed(header_of(plan), b"\1\2"))
    with pytest.raises(PlanFormatError, match=r"state 'captured.0' holds truth values other than 0 and 1"):
        load_plan(path)
    keys = [["captured.0", "captured.0"], ["captured.0.x", "captured.0"], ["", "captured.0"]]
    path.write_bytes(sealed(header_of(plan, keys=keys), b"\1\0"))
    load_plan(path)
    net = Plan(nn.Linear(1, 1)).build(torch.ones(1, 1))
    state = b"".join(tensor.detach().numpy().tobytes() for tensor in net.state_tensors())
    path.write_bytes(sealed(header_of(net, keys=[["weight", "bias"], ["bias", "weight"]]), state))
    assert len(load_plan(path).state_tensors()) == 2
    path.write_bytes(sealed(header_of(net, keys=[["weight", "weight"], ["bias", "weight"]]), state))
    assert torch.equal(load_plan(path)(torch.zeros(1, 1)), net(torch.zeros(1, 1)))


HOSTILE = Of(nn.Sequential(nn.Linear(1, 2), nn.Dropout(0.5))).build(torch.ones(1, 1))
HEADER = header_of(HOSTILE, keys=[["net.0.weight", "net.0.weight"]], tags=["#a"])
HOSTILE_STATE = b"".join(tensor.detach().numpy().tobytes() for tensor in HOSTILE.state_tensors())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(HEADER) - 1), st.integers(0, 255)), min_size=1, max_size=3)
)
def test_headers_that_were_altered_and_sealed_again(changes, tmp_path):
    header = bytearray(HEADER)
    for position, value in changes:
        header[position] = value
    path = tmp_path / "file"
    path.write_bytes(sealed(bytes(header), HOSTILE_STATE))
    try:
        plan = load_plan(path)
    except PlanError:
        return
    assert len(plan.state_tensors()) == 2
    plan.save(path)
    assert load_plan(path).record == plan.record


def test_an_op_that_this_torch_does_not_have(tmp_path):
    record = small().record.to_bytes().replace(b"Tensor.add", b"Tensor.zdd")
    path = tmp_path / "file"
    path.write_bytes(sealed(header_of(small(), record=record), STATE))
    with pytest.raises(planrt.errors.OpNotAllowedError, match="'Tensor.zdd', is not on the table"):
        load_plan(path)


# Places


def test_places_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match="there is no file .*nothing"):
        load_plan(tmp_path / "nothing")
    with pytest.raises(OptionError, match="is a directory: name the file"):
        load_plan(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptionError, match="is no ordinary file"):
        load_file(tmp_path / "pipe")
    with pytest.raises(OptionError, match="cannot read .*Not a directory"):
        load_plan(saved(small(), tmp_path) / "more")
    with pytest.raises(OptionError, match="named by its path, not by int"):
        load_plan(0)


def test_places_that_cannot_be_written(tmp_path):
    plan = small()
    with pytest.raises(OptionError, match="is a directory; name a file in it"):
        plan.save(tmp_path)
    with pytest.raises(OptionError, match="cannot save to .*No such file or directory"):
        plan.save(tmp_path / "no" / "such" / "place")
    with pytest.raises(OptionError, match="cannot save to .*Not a directory"):
        plan.save(saved(plan, tmp_path) / "more")
    with pytest.raises(OptionError, match="named by its path"):
        plan.save(None)
    assert [one.name for one in tmp_path.iterdir()] == ["plan.bin"]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = saved(small(), tmp_path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OptionError, match="No space left on device"):
        Of(nn.Linear(2, 3)).build(torch.ones(1, 2)).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_saved_touches_nothing(tmp_path):
    path = saved(small(), tmp_path)
    before = path.read_bytes()
    with pytest.raises(PlanError, match=r"'f' is not built: call f\.build"):
        Plan(lambda x: x, name="f").save(path)
    with pytest.raises(OptionError, match="description of more than"):
        small().describe("x" * 70_000).save(path)
    with pytest.raises(LocalError, match="only dense tensors with data"):
        Of(nn.Linear(2, 3)).build(torch.ones(1, 2)).to("meta").save(path)
    assert path.read_bytes() == before


def test_state_on_a_worker_cannot_be_saved_or_exported(tmp_path):
    hook = planrt.TorchHook(torch)
    bob = planrt.VirtualWorker(hook, id="files-away")
    plan = Of(nn.Linear(2, 3)).build(torch.ones(1, 2))
    plan.net.send(bob)
    for use in (
        lambda: plan.save(tmp_path / "file"),
        lambda: plan.state_hash,
        lambda: plan.torchscript,
        plan.to_exported_program,
        lambda: plan.to_onnx(tmp_path / "file"),
    ):
        with pytest.raises(
            PlanError, match=r"'net.weight' of plan 'of' is on worker 'files-away': get\(\) the module"
        ):
            use()
    plan.net.get()
    plan.save(tmp_path / "file")


def test_saving_replaces_a_file_and_follows_links(tmp_path):
    path = saved(small(), tmp_path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    plan = Of(nn.Linear(2, 3)).build(torch.ones(1, 2))
    plan.save(str(link))
    assert link.is_symlink()
    assert load_plan(path).hash == plan.hash
    assert stat.S_ISREG(path.stat().st_mode)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "plan.bin"]
