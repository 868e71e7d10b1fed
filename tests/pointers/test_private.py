"""Private data: what users may not see leaves by no door, on either transport."""

import contextlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import planrt
from planrt.errors import GetNotPermittedError, HandshakeError, OptionError, PlanrtError, RemoteError
from planrt.workers import VirtualWorker, WebsocketClientWorker, WebsocketServerWorker

USERS = {"ann": "the long token of ann", "ben": "the long token of ben"}


@pytest.fixture
def clinic(transport):
    """``clinic(token)`` -> a client of the worker "clinic", which knows ann and ben."""
    with contextlib.ExitStack() as stack:
        if transport == "memory":
            first = None

            def connect(token=""):
                nonlocal first
                if first is None:
                    first = stack.enter_context(VirtualWorker("clinic", users=USERS, token=token))
                    return first
                return stack.enter_context(first.connect_as(token))

        else:
            server = WebsocketServerWorker("clinic", threads=1, users=USERS)
            uri = stack.enter_context(server.running())

            def connect(token=""):
                return stack.enter_context(WebsocketClientWorker("clinic", uri=uri, token=token))

        yield connect


def refused(action):
    with pytest.raises(GetNotPermittedError, match="private") as caught:
        action()
    return str(caught.value)


def test_private_data_is_not_fetched(clinic):
    worker = clinic()
    x = torch.tensor([123.25, 2.0]).send(worker, private=True)
    assert x.shape == (2,)
    message = refused(x.get)
    assert str(x.id_at_location) in message
    assert "nobody" in message
    assert "123.25" not in repr(x) + message


def test_allowed_users_may(clinic):
    ann, ben, anyone = clinic(USERS["ann"]), clinic(USERS["ben"]), clinic()
    torch.tensor([1.0, 2.0]).tag("#scores").send(ann, allowed_users=["ann"])
    ann.objects_count()
    assert "ann" in refused(ben.search("#scores")[0].get)
    refused(anyone.search("#scores")[0].get)
    (x,) = ann.search("#scores")
    assert (x * 2).get().tolist() == [2, 4]
    (y,) = ben.search("#scores")
    refused((y * 2).get)
    assert x.get().tolist() == [1, 2]


def test_private_and_allowed_users_contradict_each_other(clinic):
    worker = clinic()
    with pytest.raises(OptionError, match="give one of them"):
        torch.ones(1).send(worker, private=True, allowed_users=["ann"])
    with pytest.raises(OptionError, match=r"write \['ann'\]"):
        torch.ones(1).send(worker, allowed_users="ann")


def test_a_token_that_nobody_has_opens_nothing(clinic):
    clinic(USERS["ann"])
    with pytest.raises(HandshakeError, match="token"):
        clinic("the long token of ann ")
    with pytest.raises(HandshakeError, match="token"):
        clinic("ann")


def derived_values(x, public):
    """Values that would tell something of `x`, each by another door."""
    yield "function", lambda: x.sum()
    yield "mixed with public data", lambda: x + public
    yield "comparison", lambda: (x > 1).any()
    yield "shape only", lambda: torch.zeros_like(x) + 0 * x
    yield "view", lambda: x[:1]
    yield "detached", lambda: x.detach()
    yield "several results", lambda: x.sort()[1]
    yield "index", lambda: public[(x > 1).long()]
    yield "size from values", lambda: x.repeat_interleave(2)
    yield "copied", lambda: x.clone()
    yield "as a mask", lambda: torch.where(x > 1, public, -public)

    def written_in_place():
        target = torch.zeros(2).send(x.location)
        target.copy_(x)
        return target

    def written_to_a_view():
        target = torch.zeros(2).send(x.location)
        target[0:1].add_(x[0:1])
        return target

    def assigned():
        target = torch.zeros(2).send(x.location)
        target[0] = x[0]
        return target

    def data_set():
        target = torch.zeros(2).send(x.location)
        target.data = x
        return target

    def memory_set():
        target = torch.zeros(2).send(x.location)
        target.set_(x)
        return target

    def gradient():
        weight = torch.ones(2, requires_grad=True).send(x.location)
        (weight * x).sum().backward()
        return weight.grad

    def gradient_seen_before():
        weight = torch.ones(2, requires_grad=True).send(x.location)
        weight.sum().backward()
        before = weight.grad
        (weight * x).sum().backward()
        return before

    def gradient_inside_its_tensor():
        weight = torch.ones(2, requires_grad=True).send(x.location)
        (weight * x).sum().backward()
        return weight

    def gradient_by_grad():
        weight = torch.ones(2, requires_grad=True).send(x.location)
        return torch.autograd.grad((weight * x).sum(), weight)[0]

    def gradient_given():
        weight = torch.ones(2, requires_grad=True).send(x.location)
        (weight * 1).backward(x)
        return weight.grad

    def gradient_assigned():
        weight = torch.ones(2, requires_grad=True).send(x.location)
        weight.grad = x
        return weight.grad

    def stepped():
        model = nn.Linear(2, 1).send(x.location)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(x.view(1, 2)).sum().backward()
        optimizer.step()
        return model.weight

    def running_statistics():
        norm = nn.BatchNorm1d(1).send(x.location)
        norm(x.view(2, 1))
        return norm.running_mean

    def running_statistics_by_keyword():
        mean, var = torch.zeros(1).send(x.location), torch.ones(1).send(x.location)
        F.batch_norm(x.view(2, 1), running_mean=mean, running_var=var, training=True)
        return var

    for action in (
        written_in_place, written_to_a_view, assigned, data_set, memory_set, gradient, gradient_seen_before,
        gradient_inside_its_tensor, gradient_by_grad, gradient_given, gradient_assigned, stepped, running_statistics,
        running_statistics_by_keyword,
    ):  # fmt: skip
        yield action.__name__, action


NAMES = [name for name, _ in derived_values(None, None)]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_derived_leaves(clinic, name):
    worker = clinic()
    x, public = torch.tensor([3.0, 0.5]).send(worker, private=True), torch.tensor([1.0, 2.0]).send(worker)
    action = dict(derived_values(x, public))[name]
    refused(lambda: action().get())
    assert public.get().tolist() == [1, 2]


def test_sizes_that_depend_on_private_values_are_not_told(clinic):
    worker = clinic()
    x = torch.tensor([3.0, 0.0]).send(worker, private=True)
    for ask in (lambda: x[x > 1], x.nonzero, lambda: torch.unique(x), lambda: x.masked_select(x > 1)):
        assert "depends on the values" in refused(ask)


def test_errors_of_private_operands_tell_nothing(clinic):
    worker = clinic()
    x = torch.zeros(2, 2).send(worker, private=True)
    failed, worked = torch.linalg.inv(x), torch.linalg.inv(x + torch.eye(2).send(worker))
    texts = {refused(pointer.get).replace(str(pointer.id_at_location), "") for pointer in (failed, worked)}
    assert len(texts) == 1
    bad = torch.ones(3).send(worker)
    bad.index_add_(0, (x[0] + 7).long(), torch.ones(2).send(worker))
    refused(bad.get)


def test_private_data_is_not_moved(clinic, make_worker):
    worker, other = clinic(), make_worker("other")
    x = torch.ones(2).send(worker, private=True)
    refused(lambda: x.move(other))
    assert other.objects_count() == 0


def test_privacy_moves_with_the_data(clinic, make_worker):
    ann, other = clinic(USERS["ann"]), make_worker("other")
    x = torch.ones(2).send(ann, allowed_users=["ann"])
    moved = x.move(other)
    refused(moved.get)  # there nobody is ann


def test_private_data_behind_a_pointer_to_a_pointer(clinic, make_worker):
    worker, other = clinic(), make_worker("other")
    x = torch.ones(2).send(worker, private=True).send(other)
    y = (x * 2).get()
    refused(y.get)


def test_objects_of_another_session_are_not_there(clinic):
    one, other = clinic(), clinic()
    x = torch.ones(2).send(one)
    assert other.search(str(x.id_at_location)) == []
    forged = torch.ones(2).send(other)
    forged._handle.id = x.id_at_location
    with pytest.raises(RemoteError, match="no object"):
        (forged + 1).get()
    assert (x + 1).get().tolist() == [2, 2]


@pytest.mark.parametrize("numbers", [3, 3_000_000], ids=["small", "over 8 MB, in a block of memory"])
def test_nobody_changes_what_another_published(clinic, numbers):
    one, other = clinic(), clinic()
    x = torch.ones(numbers).tag("#published").send(one)
    one.objects_count()
    (found,) = other.search("#published")
    found[1:].zero_()
    found.add_(5)
    assert found[:3].get().tolist() == [6, 5, 5]
    assert x[:3].get().tolist() == [1, 1, 1]
    assert x.sum().get().item() == numbers


def test_snapshots_go_with_their_pointers(clinic):
    one, other = clinic(), clinic()
    x = torch.ones(3).tag("#published").send(one)
    one.objects_count()
    for _ in range(5):
        (found,) = other.search("#published")
    assert other.objects_count() == 1
    del found
    assert other.objects_count() == 0
    assert x.get().tolist() == [1, 1, 1]


def test_untagged_objects_go_with_their_session_and_tagged_ones_stay(clinic):
    one, other = clinic(), clinic()
    kept = torch.ones(2).tag("#kept").send(one)
    dropped = torch.ones(2).send(one)
    one.objects_count()
    one.close()
    (found,) = other.search("#kept")
    assert found.get().tolist() == [1, 1]
    assert other.search(str(dropped.id_at_location)) == []
    assert kept.shape == dropped.shape


def test_private_values_are_not_found_by_bisection(clinic):
    """An index that is out of range or not, depending on a private value: whoever may read hears of it."""
    ann, anyone = clinic(USERS["ann"]), clinic()
    torch.tensor([7.25, 1.0]).tag("#scores").send(ann, allowed_users=["ann"])
    (hers,), (x,) = ann.search("#scores"), anyone.search("#scores")
    for limit in (5.0, 9.0):
        w = torch.ones(1, requires_grad=True).send(anyone)
        picked = w[(x[:1] > limit).long()]
        picked.sum().backward()
        assert w.grad.shape == (1,)
        refused(picked.get)
        refused(w.grad.get)
        assert anyone.objects_count() > 0  # where a failure that no result carries would show
    w = torch.ones(1, requires_grad=True).send(ann)
    with pytest.raises(RemoteError, match="op Tensor.__getitem__ failed"):
        w[(hers[:1] > 5).long()].get()


def test_training_goes_on_where_an_op_on_private_values_failed(clinic):
    ann, anyone = clinic(USERS["ann"]), clinic()
    torch.tensor([0, 9]).tag("#labels").send(ann, allowed_users=["ann"])  # one is no class of three
    (target,) = anyone.search("#labels")
    data = torch.ones(2, 4).send(anyone)
    model = nn.Linear(4, 3).send(anyone)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
    refused(loss.get)
    refused(model.get)
    assert data.get().sum() == 8


# -------------------------------------------------------------------------------------------------- plans


def test_what_a_plan_computes_from_private_data_is_private(clinic):
    @planrt.func2plan(args_shape=[(-1,), (-1,)])
    def both(x, y):
        return {"mixed": x + y, "public alone": y * 2, "input": y}

    worker = clinic()
    x = torch.tensor([1.0, 2.0]).send(worker, private=True)
    y = torch.tensor([3.0, 4.0]).send(worker)
    there = both.send(worker)
    result = there(x, y)
    refused(result["mixed"].get)
    refused(result["public alone"].get)  # the worker looks at the plan as one op
    assert result["input"].get().tolist() == [3.0, 4.0]
    assert there(torch.zeros(2).send(worker), torch.ones(2).send(worker))["mixed"].get().tolist() == [
        1.0,
        1.0,
    ]


def test_private_data_written_into_the_state_of_a_plan(clinic):
    @planrt.func2plan(args_shape=[(-1,)], state=(torch.zeros(1),))
    def remember(x, state):
        state.read()[0].add_(x.sum())
        return x.shape[0]

    worker = clinic()
    there = remember.tag("#kept").send(worker)
    copied = there.copy()
    assert there(torch.ones(2).send(worker)) == 2
    assert there(torch.tensor([123.0, 2.0]).send(worker, private=True)) == 2
    refused(there.get)
    refused(lambda: there.move(clinic()))
    refused(there.copy().get)
    (found,) = clinic().search("#kept")
    refused(found.get)
    assert there.record.name == "remember"  # what it does is no secret
    assert copied.get().state.read()[0].item() == 0.0


def test_private_data_written_into_the_input_of_a_plan(clinic):
    @planrt.func2plan(args_shape=[(2,), (2,)])
    def overwrite(x, y):
        y.copy_(x)
        return y.sum()

    worker = clinic()
    there = overwrite.send(worker)
    y = torch.zeros(2).send(worker)
    view = y[:1]
    there(torch.tensor([1.0, 2.0]).send(worker, private=True), y)
    refused(y.get)
    refused(view.get)


def test_no_plan_tells_by_failing(clinic):
    @planrt.func2plan()
    def pick(index, values):
        return values[index]

    worker = clinic()
    there = pick.build(torch.zeros(1, dtype=torch.int64), torch.zeros(3)).send(worker)
    values = torch.arange(3.0).send(worker)
    said = []
    for index in (0, 7):
        result = there(torch.tensor([index]).send(worker, private=True), values)
        said += [[re.sub(r"\d+", "N", refused(get)) for get in (result.get, (result + 1).get)]]
    assert said[0] == said[1]

    @planrt.func2plan(args_shape=[(-1,)])
    def positive(x):
        return x[x > 0]

    with pytest.raises(GetNotPermittedError, match="depends on the values"):
        positive.send(worker)(torch.tensor([1.0, -1.0]).send(worker, private=True))


def test_a_private_plan(clinic):
    @planrt.func2plan(args_shape=[(-1,)], state=(torch.tensor([5.0]),))
    def shifted(x, state):
        return x + state.read()[0]

    ann, ben = clinic(USERS["ann"]), clinic(USERS["ben"])
    shifted.tag("#shift").send(ann, allowed_users=["ann"])
    ann.objects_count()
    (found,) = ben.search("#shift")
    refused(found.get)
    refused(found(torch.zeros(1).send(ben)).get)
    (own,) = ann.search("#shift")
    assert own(torch.zeros(1).send(ann)).get().item() == 5.0
    assert own.get().state_dict()["state.0"].item() == 5.0


def test_a_plan_on_private_data_gives_what_is_expanded_without_writing_it_out(clinic):
    """2**44 entries of three values: what is kept of it, or in its place where it fails, has them once."""

    @planrt.func2plan(args_shape=[(3,)])
    def expanded(x):
        return x.reshape(3, 1).expand(3, 2**44), x * 2

    @planrt.func2plan()
    def failing(x, at):
        return x.reshape(3, 1).expand(3, 2**44), x[at]

    worker = clinic(USERS["ann"])
    x = torch.tensor([1.0, 2.0, 3.0]).send(worker, allowed_users=["ann"])
    large, double = expanded.send(worker)(x)
    assert large.shape == (3, 2**44)
    assert large[:, 5].get().tolist() == [1, 2, 3]
    assert double.get().tolist() == [2, 4, 6]
    failing.build(torch.ones(3), torch.tensor([0]))
    sent = failing.send(worker)
    assert sent(x, torch.tensor([2]).send(worker))[1].get().tolist() == [3]
    failed = sent(x, torch.tensor([7]).send(worker))
    with pytest.raises(RemoteError):
        failed[1].get()


def _inner(worker):
    """An inner tensor of a graph of the client's own, with its leaf."""
    leaf = torch.ones(2, requires_grad=True).send(worker)
    return leaf, leaf * 1


def _as_input(x, leaf, t):
    (t * x).sum().backward(inputs=[t])


def _as_input_with_a_graph(x, leaf, t):
    (t * x).sum().backward(inputs=[t], create_graph=True)


def _given_as_the_gradient(x, leaf, t):
    t.backward(x, inputs=[t])


def _retained_by_an_earlier_pass(x, leaf, t):
    t.sum().backward(inputs=[t], retain_graph=True)
    (t * x).sum().backward()


def _retained_and_differentiated(x, leaf, t):
    t.retain_grad()
    torch.autograd.grad((t * x).sum(), [leaf], retain_graph=True)
    (t * x).sum().backward()


def _hessian(x, leaf, t):
    (first,) = torch.autograd.grad((t * t * x).sum(), [t], create_graph=True)
    first.sum().backward(inputs=[t])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize(
    "attack",
    [
        _as_input,
        _as_input_with_a_graph,
        _given_as_the_gradient,
        _retained_by_an_earlier_pass,
        _retained_and_differentiated,
        _hessian,
    ],
)
@pytest.mark.parametrize("read", ["the value with its gradient", "the gradient", "a move"])
def test_gradients_at_inner_tensors_are_private(clinic, attack, read):
    """Autograd writes to tensors that nobody named: the inputs of a pass, from then on, are some."""
    owner = clinic()
    torch.tensor([123.25, 2.0]).tag("#x").send(owner, private=True)
    owner.objects_count()
    mallory = clinic()
    (x,) = mallory.search("#x")
    leaf, t = _inner(mallory)
    attack(x, leaf, t)
    match read:
        case "the value with its gradient":
            refused(t.get)
        case "the gradient":
            refused(t.grad.get)
        case "a move":
            with VirtualWorker("elsewhere") as elsewhere:
                with pytest.raises(PlanrtError):
                    t.move(elsewhere)
                assert elsewhere.objects_count() == 0


def test_gradients_of_public_values_beside_private_ones_are_read(clinic):
    worker = clinic()
    early = torch.ones(2, requires_grad=True).send(worker)
    (early * 3).sum().backward()
    torch.ones(2).tag("#x").send(worker, private=True)
    leaf, t = _inner(worker)
    (t * 2).sum().backward(inputs=[t], retain_graph=True)
    assert t.grad.get().tolist() == [2, 2]
    assert t.get().grad.tolist() == [2, 2]
    (leaf * 5).sum().backward()
    assert leaf.get().grad.tolist() == [5, 5]
    assert early.grad.get().tolist() == [3, 3]
    net = nn.Linear(2, 1).send(worker)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(3, 2).send(worker)).sum().backward()
        optimizer.step()
    assert net.get().weight.grad.tolist() == [[3, 3]]


def test_inner_inputs_of_a_pass_have_gradients_as_in_torch(clinic):
    worker = clinic()
    leaf, t = _inner(worker)
    (t * 4).sum().backward(inputs=[t])
    assert leaf.grad is None
    assert t.grad.get().tolist() == [4, 4]


@pytest.mark.parametrize("kind", ["tensor", "plan"])
def test_what_is_moved_stays_private(clinic, kind):
    """To a virtual worker it goes through its client, who may read it, and others there may not."""
    ann = clinic(USERS["ann"])
    if kind == "tensor":
        there = torch.tensor([1.0, 2.0]).send(ann, allowed_users=["ann"])
    else:
        plan = planrt.func2plan(nn.Linear(2, 2))
        plan.build(torch.ones(1, 2))
        there = plan.send(ann, allowed_users=["ann"])
    with VirtualWorker("elsewhere", users=USERS, token=USERS["ann"]) as to:
        moved = there.move(to).tag("#moved")
        to.objects_count()
        with to.connect_as(USERS["ben"]) as ben:
            (found,) = ben.search("#moved")
            refused(found.get)
            del found
        moved.get()
