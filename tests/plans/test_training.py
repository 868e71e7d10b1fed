"""Training and evaluating from plans gives the numbers of the plain PyTorch loop."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from nets import NETS, make
from torch import nn

from planrt.errors import OptionError, PlanArgumentError, PlanError, TraceError
from planrt.plans import Graph
from planrt.plans.training import OPTIMIZERS, check_optimizer, evaluate, trace_model, train

SEED = 11


def through_bytes(plan):
    return Graph.from_bytes(plan.to_bytes())


def plain_loop(net, loss_fn, batches, optimizer):
    """The loop that a user would write, seeded as `train` seeds."""
    losses = []
    net.train()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for data, target in batches:

            def closure(data=data, target=target):
                optimizer.zero_grad()
                loss = loss_fn(net(data), target)
                loss.backward()
                return loss

            losses.append((optimizer.step(closure).item(), len(data)))
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def tensors_of(net):
    return dict(net.named_parameters()) | dict(net.named_buffers())


def fresh(plans):
    return [tensor.clone() for tensor in plans.names.entries.values()]


@pytest.mark.parametrize("name", NETS)
def test_training_equals_the_plain_loop_bit_for_bit(name):
    net, loss_fn, batches = make(name)
    local = copy.deepcopy(net)
    plans = trace_model(net, loss_fn, *batches[0])
    state = fresh(plans)
    args = {"lr": 0.05, "momentum": 0.9}

    result = train(
        through_bytes(plans.training), state, batches, optimizer="SGD", optimizer_args=args, seed=SEED
    )
    loss = plain_loop(local, loss_fn, batches, torch.optim.SGD(local.parameters(), **args))

    wanted = tensors_of(local)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert (result.samples, result.batches) == (14, 3)
    changed = {plans.training.state[i].name: t for i, t in zip(result.changed, result.state, strict=True)}
    for path, tensor in changed.items():
        assert torch.equal(tensor, wanted[path]), path
    unchanged = wanted.keys() - changed.keys()
    assert all(
        not wanted[path].requires_grad and isinstance(wanted[path], nn.Parameter) for path in unchanged
    )


# The transformer's evaluation goes through fused kernels in plain PyTorch, which round differently.
@pytest.mark.parametrize(
    ("name", "tolerance"), [(name, 2e-6 if name in ("transformer", "masked") else 0.0) for name in NETS]
)
def test_evaluation_equals_plain_pytorch(name, tolerance):
    net, loss_fn, batches = make(name)
    plans = trace_model(net, loss_fn, *batches[0])
    histogram = None if name in ("tied", "unet") else 10  # no classes, and several for each sample
    result = evaluate(through_bytes(plans.evaluation), fresh(plans), batches, bins=histogram or 0)
    net.eval()
    with torch.no_grad():
        outputs = [net(data) for data, _ in batches]
        losses = [loss_fn(out, target).item() for out, (_, target) in zip(outputs, batches, strict=True)]
    sizes = [len(data) for data, _ in batches]
    wanted = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert result.loss == pytest.approx(wanted, rel=tolerance or 1e-12)
    assert result.samples == sum(sizes)
    if histogram:
        predicted = torch.cat([out.argmax(1).flatten() for out in outputs])
        targets = torch.cat([target.flatten() for _, target in batches])
        assert result.correct == int((predicted == targets).sum())
        assert result.histogram == torch.bincount(predicted, minlength=10).tolist()
        assert result.target_histogram == torch.bincount(targets, minlength=10).tolist()
    else:
        assert (result.correct, result.histogram, result.target_histogram) == (None, None, None)


OPTIMIZER_ARGS = {"SGD": {"lr": 0.1, "momentum": 0.5, "nesterov": True}, "LBFGS": {"max_iter": 4}}


class SparseNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 3, sparse=True)

    def forward(self, x):
        return self.embed(x).sum(1)


class MatrixNet(nn.Module):
    """Only 2-d parameters: Muon takes no others."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5, bias=False)
        self.last = nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.last(torch.relu(self.first(x.float())))


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_every_optimizer_equals_the_plain_loop_and_goes_on_from_its_state(optimizer):
    net, loss_fn, batches = make("embedding")
    if optimizer in ("SparseAdam", "Muon"):
        torch.manual_seed(3)
        net = SparseNet() if optimizer == "SparseAdam" else MatrixNet()
    local = copy.deepcopy(net)
    plans = trace_model(net, loss_fn, *batches[0])
    plan, state = through_bytes(plans.training), fresh(plans)
    args = OPTIMIZER_ARGS.get(optimizer, {})
    local_optimizer = OPTIMIZERS[optimizer](local.parameters(), **args)
    kept = None
    for _ in range(2):
        result = train(
            plan,
            state,
            batches,
            optimizer=optimizer,
            optimizer_args=args,
            optimizer_state=kept,
            seed=SEED,
        )
        kept = result.optimizer_state
        loss = plain_loop(local, loss_fn, batches, local_optimizer)
        assert result.loss == pytest.approx(loss, rel=1e-12)
    wanted = tensors_of(local)
    for index, tensor in zip(result.changed, result.state, strict=True):
        assert torch.equal(tensor, wanted[plans.training.state[index].name])


def test_a_fresh_optimizer_each_time_unless_its_state_is_given():
    net, loss_fn, batches = make("mnist")
    plans = trace_model(net, loss_fn, *batches[0])
    args = {"lr": 0.1, "momentum": 0.9}

    def two_rounds(keep):
        state, kept = fresh(plans), None
        for _ in range(2):
            result = train(
                plans.training, state, batches, optimizer="SGD", optimizer_args=args, optimizer_state=kept,
                seed=SEED,
            )  # fmt: skip
            kept = result.optimizer_state if keep else None
        return state[0]

    assert not torch.equal(two_rounds(True), two_rounds(False))


def test_the_seed_decides_dropout_and_generators_are_put_back():
    net, loss_fn, batches = make("lstm")
    plans = trace_model(net, loss_fn, *batches[0])
    before = torch.get_rng_state()

    def trained(seed):
        state = fresh(plans)
        train(plans.training, state, batches, optimizer="SGD", optimizer_args={"lr": 0.1}, seed=seed)
        return state[0]

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_zero_batches_give_the_state_back_unchanged():
    net, loss_fn, batches = make("unet")
    plans = trace_model(net, loss_fn, *batches[0])
    state = fresh(plans)
    result = train(plans.training, state, [], optimizer="SGD", optimizer_args={"lr": 0.1}, seed=0)
    assert math.isnan(result.loss)
    assert (result.samples, result.batches) == (0, 0)
    assert all(given is state[index] for index, given in zip(result.changed, result.state, strict=True))
    assert torch.equal(state[0], next(net.parameters()))


def test_training_works_in_the_tensors_it_is_given():
    net, loss_fn, batches = make("tied")
    plans = trace_model(net, loss_fn, *batches[0])
    state = fresh(plans)
    result = train(plans.training, state, batches, optimizer="SGD", optimizer_args={"lr": 0.1}, seed=0)
    assert [state[index].data_ptr() for index in result.changed] == [t.data_ptr() for t in result.state]
    assert len(state) == 2  # the tied weight is one entry
    assert not any(tensor.requires_grad for tensor in (*state, *result.state))


def test_state_of_both_plans_is_one_list_with_the_models_names():
    net, loss_fn, batches = make("frozen")
    plans = trace_model(net, loss_fn, *batches[0])
    names = [entry.name for entry in plans.training.state]
    assert names == [entry.name for entry in plans.evaluation.state] == list(plans.names.entries)
    assert names[:8] == [
        "calls", "mean", "frozen.weight", "frozen.bias", "unused.weight", "unused.bias", "head.weight",
        "head.bias",
    ]  # fmt: skip
    assert [entry.kind for entry in plans.training.state if entry.name.startswith("loss.")] == ["constant"]
    assert plans.state["head.weight"].data_ptr() == net.head.weight.data_ptr()


@pytest.mark.parametrize("name", NETS)
def test_tracing_a_model_leaves_it_as_it_was(name):
    net, loss_fn, batches = make(name)
    net.train()
    next(net.children()).eval()
    before = {path: tensor.clone() for path, tensor in tensors_of(net).items()}
    objects = tensors_of(net)
    modes = [part.training for part in net.modules()]
    generator = torch.get_rng_state()
    trace_model(net, loss_fn, *batches[0])
    assert all(tensor is objects[path] for path, tensor in tensors_of(net).items())
    assert all(torch.equal(tensor, before[path]) for path, tensor in tensors_of(net).items())
    assert [part.training for part in net.modules()] == modes
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def jit_trace(net, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net, data, check_trace=False)


@pytest.mark.parametrize("name", ["mnist", "resnet18", "unet", "embedding", "lstm", "tied", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_a_jit_traced_module_trains_like_the_module_in_its_mode(name, training):
    net, loss_fn, batches = make(name)
    traced = jit_trace(net.train(training), batches[0][0])
    local = copy.deepcopy(net)  # after tracing, which counts a batch in batch norm
    plans = trace_model(traced, loss_fn, *batches[0])
    args = {"lr": 0.05}
    state = fresh(plans)
    result = train(
        through_bytes(plans.training), state, batches, optimizer="SGD", optimizer_args=args, seed=SEED
    )
    local.train = lambda mode=True: local  # its mode is frozen as traced
    loss = plain_loop(local, loss_fn, batches, torch.optim.SGD(local.parameters(), **args))
    assert result.loss == pytest.approx(loss, rel=1e-6)
    wanted = tensors_of(local)
    for index, tensor in zip(result.changed, result.state, strict=True):
        torch.testing.assert_close(tensor, wanted[plans.training.state[index].name], rtol=1e-5, atol=1e-6)


def test_a_scripted_module_that_branches_on_values_is_refused():
    class Branching(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Branching())
    with pytest.raises(TraceError, match=r"'Branching' .* reads the value .* pass the nn\.Module"):
        trace_model(scripted, F.mse_loss, torch.ones(2, 2), torch.ones(2, 2))


def test_output_and_loss_that_do_not_fit():
    data, target = torch.randn(4, 8), torch.randint(0, 3, (4,))
    with pytest.raises(
        TraceError, match=r"output float32\[4, 3\] does not fit the loss with the target float32"
    ):
        trace_model(nn.Linear(8, 3), F.cross_entropy, data, torch.randn(4, 7))
    with pytest.raises(TraceError, match=r"must be one number .* not float32\[4\]"):
        trace_model(nn.Linear(8, 3), lambda p, t: F.cross_entropy(p, t, reduction="none"), data, target)
    with pytest.raises(TraceError, match="the function failed on its example arguments"):
        trace_model(nn.Linear(9, 3), F.cross_entropy, data, target)
    with pytest.raises(TraceError, match="the example data must be a tensor, not list"):
        trace_model(nn.Linear(8, 3), F.cross_entropy, [data], target)


def toy():
    return trace_model(nn.Linear(8, 3), F.cross_entropy, torch.randn(4, 8), torch.randint(0, 3, (4,)))


@pytest.mark.parametrize(
    ("optimizer", "args", "message"),
    [
        ("Sgd", {}, "unknown optimizer 'Sgd': choose one of ASGD, "),
        ("SGD", {"learning_rate": 1.0}, "has no option 'learning_rate'; it has: lr, momentum"),
        ("SGD", {"params": 1.0}, "has no option 'params'"),
        ("SGD", {"lr": -1.0}, "does not accept these options: Invalid learning rate"),
        ("SGD", {"lr": torch.tensor(1.0)}, "must be a number"),
        ("Adam", {"betas": [0.9] * 9}, "must be a number"),
        ("Adam", {"betas": 3.0}, "does not accept these options"),
        ("SparseAdam", {}, "cannot train this plan"),
    ],
)
def test_options_of_optimizers_that_cannot_be_used(optimizer, args, message):
    plans = toy()
    with pytest.raises(OptionError, match=message):
        train(
            plans.training, fresh(plans), [(torch.randn(4, 8), torch.randint(0, 3, (4,)))],
            optimizer=optimizer, optimizer_args=args, seed=0,
        )  # fmt: skip


def test_options_that_came_as_lists_are_tuples():
    assert check_optimizer("Adam", {"betas": [0.9, 0.99], "amsgrad": True}) == {
        "betas": (0.9, 0.99),
        "amsgrad": True,
    }


def test_state_and_batches_that_do_not_fit():
    plans = toy()
    batch = (torch.randn(4, 8), torch.randint(0, 3, (4,)))
    with pytest.raises(
        PlanArgumentError, match=r"data of plan .* wanted float32\[\*, 8\], got float32\[4, 9\]"
    ):
        train(plans.training, fresh(plans), [(torch.randn(4, 9), batch[1])], optimizer="SGD", seed=0)
    with pytest.raises(PlanArgumentError, match=r"target of plan .* wanted int64\[\*\], got float32"):
        evaluate(plans.evaluation, fresh(plans), [(batch[0], torch.randn(4))])
    with pytest.raises(PlanArgumentError, match="has 2 state tensors, got 1"):
        train(plans.training, fresh(plans)[:1], [batch], optimizer="SGD", seed=0)
    wrong = [plans.state["weight"].T, plans.state["bias"]]
    with pytest.raises(
        PlanArgumentError, match=r"state 'weight': wanted float32\[3, 8\], got float32\[8, 3\]"
    ):
        train(plans.training, wrong, [batch], optimizer="SGD", seed=0)


def test_plans_that_cannot_train():
    from planrt.plans import trace

    batch = (torch.randn(4, 8), torch.randint(0, 3, (4,)))
    no_loss = trace(lambda x: x + 1, [batch[0]])
    with pytest.raises(PlanArgumentError, match="must take"):
        train(no_loss, [], [batch], optimizer="SGD", seed=0)
    frozen = nn.Linear(8, 3).requires_grad_(False)
    plans = trace_model(frozen, F.cross_entropy, *batch)
    with pytest.raises(PlanError, match="no trainable parameters"):
        train(plans.training, fresh(plans), [batch], optimizer="SGD", seed=0)

    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    plans = trace_model(Detached(8, 3), F.cross_entropy, *batch)
    with pytest.raises(PlanError, match="does not give a loss that depends on its parameters"):
        train(plans.training, fresh(plans), [batch], optimizer="SGD", seed=0)


def test_evaluation_without_samples_or_without_classes():
    plans = toy()
    empty = evaluate(plans.evaluation, fresh(plans), [], bins=2)
    assert math.isnan(empty.loss)
    assert (empty.samples, empty.correct, empty.histogram) == (0, 0, [0, 0])
    with pytest.raises(OptionError, match="bins must be at least 0"):
        evaluate(plans.evaluation, fresh(plans), [], bins=-1)
    regression = trace_model(nn.Linear(8, 3), F.mse_loss, torch.randn(4, 8), torch.randn(4, 3))
    with pytest.raises(PlanArgumentError, match="no classes to count"):
        evaluate(regression.evaluation, fresh(regression), [(torch.randn(4, 8), torch.randn(4, 3))], bins=3)


COUNTS = {
    "a class per pixel": (
        lambda p: p,
        torch.randn(4, 3, 2, 2),
        torch.zeros(4, 2, 2, dtype=torch.int64),
        "several",
    ),
    "one output for two classes": (
        lambda p: p,
        torch.randn(4, 1),
        torch.zeros(4, dtype=torch.int64),
        "logit",
    ),
    "one number": (lambda p: p[:, 0], torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), "logit"),
    "one-hot targets": (lambda p: p, torch.randn(4, 3), torch.zeros(4, 3), "class numbers"),
    "targets in a column": (
        lambda p: p,
        torch.randn(4, 3),
        torch.zeros(4, 1, dtype=torch.int64),
        "class numbers",
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_classes_are_counted_only_where_it_is_plain_what_they_are(name):
    output, data, target, says = COUNTS[name]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return output(x * self.scale)

    plans = trace_model(Net(), lambda p, t: p.sum() + t.sum() * 0.0, data, target)
    with pytest.raises(PlanArgumentError, match=f"no classes to count.*{says}.*bins=0"):
        evaluate(plans.evaluation, fresh(plans), [(data, target)], bins=3)
    assert evaluate(plans.evaluation, fresh(plans), [(data, target)]).samples == 4


def test_classes_outside_the_bins_are_in_no_histogram():
    plans = toy()
    batch = (torch.randn(64, 8), torch.arange(64) % 3)
    result = evaluate(plans.evaluation, fresh(plans), [batch], bins=2)
    assert result.target_histogram == [22, 21]
    assert sum(result.histogram) < 64


def test_the_data_is_never_changed():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 3))
    data, target = torch.randn(4, 8), torch.randint(0, 3, (4,))
    plans = trace_model(net, F.cross_entropy, data.clone(), target)
    before = data.clone()
    train(plans.training, fresh(plans), [(data, target)] * 2, optimizer="SGD", seed=0)
    evaluate(plans.evaluation, fresh(plans), [(data, target)], bins=3)
    assert torch.equal(data, before)


def test_evaluation_leaves_the_state_alone():
    net, loss_fn, batches = make("unet")
    plans = trace_model(net, loss_fn, *batches[0])
    state = fresh(plans)
    evaluate(plans.training, state, batches)  # traced in training mode: it updates batch norm
    assert all(torch.equal(a, b) for a, b in zip(state, plans.names.entries.values(), strict=True))
