"""The TrainConfig job of the 0.2 era: send, fit on and on, evaluate, model_ptr; what it is told wrongly."""

import asyncio
import copy
import functools
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from planrt.errors import LocalError, OptionError, RemoteError, TraceError, UnknownDatasetError
from planrt.fl import RoundScheduler, TrainConfig, federated_avg
from planrt.loop import on_loop
from planrt.torch_hook import TorchHook
from planrt.workers import BaseDataset, VirtualWorker
from planrt.workers.wire import messages as m
from tests.models import classification_data, seeded_classifier


@pytest.fixture
def alice(make_worker):
    return make_worker("alice", {"d": classification_data(1)})


def net():
    torch.manual_seed(2)
    return nn.Linear(6, 3)


def local(model, passes, *, batch_size=60, optimizer=torch.optim.SGD, **options):
    """A plain loop in order over the data of `alice`."""
    model = copy.deepcopy(model).train()
    stepper = optimizer(model.parameters(), **options)
    data = classification_data(1)
    losses = []
    for _ in range(passes):
        for start in range(0, 60, batch_size):
            rows = slice(start, start + batch_size)
            stepper.zero_grad()
            loss = F.cross_entropy(model(data.data[rows]), data.targets[rows])
            loss.backward()
            stepper.step()
        losses.append(loss.item())
    return model, losses


def scripted(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(function)


def named_loss(target, pred):
    return F.cross_entropy(input=pred, target=target)


class Weighted:
    """A loss that is an object."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, prediction, target):
        return F.cross_entropy(prediction, target, weight=self.weights)


LOSSES = {
    "a partial": lambda: functools.partial(F.cross_entropy, label_smoothing=0.0),
    "an object": lambda: Weighted(torch.ones(3)),
    "plain": lambda: F.cross_entropy,
    "by name": lambda: named_loss,
    "scripted": lambda: scripted(named_loss),
    "a module": lambda: nn.CrossEntropyLoss(),
}


@pytest.mark.filterwarnings("ignore:plan 'Linear' captured 1 tensor")  # the object's weights
@pytest.mark.parametrize("loss", LOSSES)
def test_five_fits_keep_learning_there(alice, loss):
    model = net()
    before = copy.deepcopy(model.state_dict())
    config = TrainConfig(model=model, loss_fn=LOSSES[loss](), batch_size=60, optimizer_args={"lr": 0.5})
    config.send(alice)
    losses = [alice.fit(dataset_key="d").loss for _ in range(5)]
    expected, wanted = local(model, 5, lr=0.5)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert losses[-1] < losses[0]
    pointer = config.model_ptr
    trained = pointer.get().obj
    assert type(trained) is nn.Linear
    torch.testing.assert_close(trained.weight, expected.weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert alice.objects_count() == 0
    with pytest.raises(LocalError, match="taken back already"):
        pointer.get()
    with pytest.raises(LocalError, match="send the TrainConfig again"):
        alice.fit("d")


def test_the_optimizer_goes_on_like_the_model(alice):
    model = net()
    config = TrainConfig(
        model, F.cross_entropy, batch_size=60, optimizer="adam", optimizer_args={"lr": 0.05}
    ).send(alice)
    for _ in range(4):
        alice.fit("d")
    expected, _ = local(model, 4, optimizer=torch.optim.Adam, lr=0.05)
    torch.testing.assert_close(config.model_ptr.get().obj.weight, expected.weight, rtol=1e-4, atol=1e-5)


def test_buffers_and_dropout_go_on_there_too(alice):
    config = TrainConfig(seeded_classifier(), F.nll_loss, batch_size=10)
    config.send(alice)
    for _ in range(3):
        alice.fit("d")
    trained = config.model_ptr.get().obj
    assert trained.norm.num_batches_tracked.item() == 18


def test_a_traced_config_and_one_that_is_not_train_alike(alice):
    example = (torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))
    found = []
    for options in ({}, {"example": example}):
        config = TrainConfig(net(), F.cross_entropy, batch_size=7, **options)
        config.send(alice)
        alice.fit("d")
        alice.fit("d")
        found.append(config.model_ptr.get().obj.weight)
    assert torch.equal(*found)


def test_a_job_stays_as_it_was_sent(alice):
    model = net()
    config = TrainConfig(model, F.cross_entropy, batch_size=60)
    config.send(alice)
    first = alice.fit("d").loss
    with torch.no_grad():
        model.weight.zero_()
    config.batch_size = 1
    again = alice.fit("d")
    assert again.loss < first
    assert again.batches == 1
    config = TrainConfig(model, F.cross_entropy)
    config.send(alice)
    model.requires_grad_(False)
    with pytest.raises(LocalError, match="was changed after it was sent"):
        alice.fit("d")


def test_tied_weights_stay_tied_there(make_worker):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x))

    tokens = torch.arange(7)
    carol = make_worker("carol", {"d": BaseDataset(tokens, tokens.flip(0))})
    model = Tied()
    config = TrainConfig(model, F.cross_entropy, batch_size=7, optimizer_args={"lr": 1.0})
    config.send(carol)
    assert carol.objects_count() == 1
    for _ in range(2):
        carol.fit("d")
    trained = config.model_ptr.get().obj
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), tokens.flip(0)).backward()
        optimizer.step()
    assert trained.out.weight is trained.embed.weight
    torch.testing.assert_close(trained.embed.weight, model.embed.weight)


def test_a_fit_that_fails_leaves_the_model_as_it_was(make_worker):
    data = classification_data(0)
    bad = BaseDataset(data.data, torch.where(torch.arange(60) < 50, data.targets, 9))
    dave = make_worker("dave", {"bad": bad, "good": data})
    model = net()
    config = TrainConfig(model, F.cross_entropy, batch_size=10, shuffle=False)
    config.send(dave)
    with pytest.raises(RemoteError, match="out of bounds"):
        dave.fit("bad")
    assert torch.equal(config.model_ptr.get().obj.weight, model.weight)


def test_return_ids_and_the_async_forms(alice):
    config = TrainConfig(net(), F.cross_entropy, batch_size=30)

    async def job():
        await config.async_send(alice)
        one = await alice.async_fit(dataset_key="d", return_ids=[0], device="cpu")
        two = await alice.async_fit("d", "cpu")
        figures = await alice.async_evaluate("d", device=torch.device("cpu"))
        return one, two, figures, (await config.model_ptr.async_get()).obj

    one, two, figures, trained = asyncio.run(job())
    assert isinstance(one, torch.Tensor)
    assert one.dim() == 0
    assert float(two) == two.item() == two.loss < one
    assert figures.loss < two.loss
    assert not torch.equal(trained.weight, net().weight)
    assert config.loss_fn_ptr.get().obj is F.cross_entropy


def test_evaluate_as_a_mapping(alice):
    model = net()
    TrainConfig(model, F.cross_entropy, batch_size=7).send(alice)
    result = alice.evaluate(
        dataset_key="d", return_histograms=True, nr_bins=3, return_loss=True, return_raw_accuracy=True, device="cpu"
    )  # fmt: skip
    data = classification_data(1)
    output = model(data.data)
    assert set(result) == {
        "loss", "nr_correct_predictions", "nr_predictions", "histogram_predictions", "histogram_target"
    }  # fmt: skip
    assert result["loss"] == pytest.approx(F.cross_entropy(output, data.targets).item(), rel=1e-5)
    right = (output.argmax(1) == data.targets).sum().item()
    assert (result["nr_correct_predictions"], result["nr_predictions"]) == (right, 60)
    assert np.array_equal(result["histogram_target"], np.bincount(data.targets.numpy(), minlength=3))
    assert np.array_equal(result["histogram_predictions"], np.bincount(output.argmax(1).numpy(), minlength=3))
    assert result.accuracy == right / 60
    assert (result.correct, result.samples) == (right, 60)
    plain = alice.evaluate("d")
    assert dict(plain) == {key: result[key] for key in ("loss", "nr_correct_predictions", "nr_predictions")}
    assert set(alice.evaluate("d", return_loss=False)) == {"nr_correct_predictions", "nr_predictions"}
    assert set(alice.evaluate("d", return_raw_accuracy=False)) == {"loss"}
    assert alice.evaluate("d", bins=3).histogram == result.histogram
    with pytest.raises(OptionError, match="nr_bins=10"):
        alice.evaluate("d", return_histograms=True)
    for name in ("return_histograms", "return_loss", "return_raw_accuracy"):
        with pytest.raises(OptionError, match=f"{name} must be True or False, got 'no'"):
            alice.evaluate("d", nr_bins=3, **{name: "no"})


def test_what_has_no_classes_is_evaluated_without(make_worker):
    eve = make_worker("eve", {"d": BaseDataset(torch.randn(6, 2), torch.randn(6, 1))})
    TrainConfig(nn.Linear(2, 1), F.mse_loss).send(eve)
    for _ in range(2):
        assert set(eve.evaluate("d")) == {"loss"}
    assert eve.evaluate("d").accuracy is None


def test_scripted_models_train_and_come_back_scripted(alice):
    model = scripted(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.0), nn.Linear(8, 3)))
    config = TrainConfig(model, scripted(named_loss), batch_size=60, optimizer_args={"lr": 0.5})
    config.send(alice)
    losses = [alice.fit("d").loss for _ in range(3)]
    trained = config.model_ptr.get().obj
    assert isinstance(trained, torch.jit.ScriptModule)
    data = classification_data(1)
    assert named_loss(data.targets, trained(data.data)).item() < losses[-1] < losses[0]


def test_texts():
    assert str(TrainConfig(model=None, loss_fn=None, id=9, batch_size=2)) == (
        "<TrainConfig id:9 owner:me epochs: 1 batch_size: 2 optimizer_args: {'lr': 0.1}>"
    )
    hook = TorchHook(torch)
    assert TrainConfig().owner is hook.local_worker
    assert BaseDataset(torch.ones(1), torch.ones(1)).owner is hook.local_worker
    config = TrainConfig(net(), F.cross_entropy, id=1, optimizer=torch.optim.AdamW)
    assert repr(config).startswith(
        "<TrainConfig id:1 owner:me model: Linear loss_fn: cross_entropy optimizer: AdamW"
    )


@pytest.mark.parametrize("given", ["AdamW", "adamw", torch.optim.AdamW])
def test_optimizers_by_class_and_in_any_case(given):
    assert TrainConfig(net(), F.cross_entropy, optimizer=given).optimizer == "AdamW"


NUMBERS = {
    "numpy": (np.int64(8), np.float32(0.25)),
    "tensors": (torch.tensor(8), torch.tensor(0.25)),
    "python": (8, 0.25),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_of_other_libraries_are_numbers(alice, kind):
    whole, rate = NUMBERS[kind]
    config = TrainConfig(
        net(), F.cross_entropy, batch_size=whole, max_nr_batches=whole, optimizer_args={"lr": rate},
        epochs=np.int32(2),
    )  # fmt: skip
    scheduler = RoundScheduler([alice], config, dataset_key="d", seed=whole)

    async def job():
        await scheduler.prepare()
        return await scheduler.run_round(whole, config.state, lr=rate)

    assert asyncio.run(job()).workers["alice"].samples == 60
    config.send(alice)
    assert alice.fit("d", seed=whole).batches == 8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": 4.0}, r"batch_size must be a whole number of at least 1, got 4\.0: write 4"),
        ({"drop_last": "no"}, "drop_last must be True or False, got 'no'"),
        ({"shuffle": 2}, "shuffle must be True or False"),
        ({"example": torch.zeros(2, 6)}, r"example must be a batch \(data, target\), not a Tensor"),
        ({"optimizer": type("SGD", (torch.optim.SGD,), {})}, r"SGD is not torch\.optim's"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"batch_size": True}, "batch_size"),
        ({"batch_size": "8"}, "batch_size"),
        ({"epochs": -1}, "epochs"),
        ({"epochs": None}, "epochs"),
        ({"max_nr_batches": np.float64(2.5)}, "max_nr_batches"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg': choose one of"),
        ({"optimizer": nn.Linear}, "unknown optimizer 'Linear'"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)}, "write optimizer='SGD'"),
        ({"optimizer_args": {"lr": -1}}, "lr must be a number of at least 0"),
        ({"optimizer_args": {"lr": "0.1"}}, "lr must be a number"),
        ({"optimizer_args": {"lr": float("nan")}}, "lr must be a number"),
        ({"optimizer_args": {"lr": lambda epoch: 0.1}}, "not a function: call your schedule yourself"),
        ({"optimizer_args": {"lr": 0.1, "beta": 3}}, "SGD has no option 'beta'"),
        ({"optimizer_args": {"lr": 0.1, "momentum": -1}}, "does not accept these options: .*momentum"),
        (
            {"optimizer": "Adam", "optimizer_args": {"betas": (2.0, 0.9)}},
            "does not accept these options: .*beta",
        ),
        ({"optimizer_args": 0.1}, "optimizer_args must be a dict"),
    ],
)
def test_wrong_options_are_found_when_they_are_given(options, says):
    with pytest.raises(OptionError, match=says):
        TrainConfig(net(), F.cross_entropy, **options)


def test_wrong_calls_say_what_to_write(alice):
    config = TrainConfig(net(), F.cross_entropy)
    scheduler = RoundScheduler([alice], config, dataset_key="d", seed=1)
    with pytest.raises(
        LocalError, match=r"await scheduler\.prepare\(\) first, or give TrainConfig an example="
    ):
        _ = config.state
    asyncio.run(scheduler.prepare())
    schedule = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1), 1)
    for arguments, options, says in [
        ((config.state, 1), {}, r"run_round\(1, state\)"),
        ((1, net()), {}, r"pass model\.state_dict\(\)"),
        ((1, {}), {}, "it lacks 'weight', 'bias'"),
        ((1.5, config.state), {}, "round_number"),
        ((1, config.state), {"lr": lambda number: 0.1}, "call your schedule yourself"),
        ((1, config.state), {"lr": schedule}, r"scheduler\.get_last_lr\(\)\[0\]"),
        ((1, config.state), {"lr": -0.1}, "lr must be"),
    ]:
        with pytest.raises(OptionError, match=says):
            asyncio.run(scheduler.run_round(*arguments, **options))
    with pytest.raises(OptionError, match="runs on workers, not on str"):
        RoundScheduler(["alice"], config, dataset_key="d", seed=1)
    with pytest.raises(OptionError, match="seed must be a whole number"):
        RoundScheduler([alice], config, dataset_key="d", seed=1.5)
    with pytest.raises(OptionError, match="federated_avg takes models by worker id"):
        federated_avg(net())
    with pytest.raises(OptionError, match="'a' is a int"):
        federated_avg({"a": 1})
    with pytest.raises(OptionError, match="not 'x'"):
        federated_avg({"a": net()}, {"a": "x"})
    with pytest.raises(OptionError, match=r"not the class Linear: write Linear\(\)"):
        TrainConfig(nn.Linear, F.cross_entropy)
    with pytest.raises(LocalError, match="send takes a worker"):
        config.send("alice")
    with pytest.raises(OptionError, match="no device"):
        alice.fit("d", device="gpu0")
    TrainConfig(None, None).send(alice)
    with pytest.raises(LocalError, match="no model or no loss"):
        alice.fit("d")
    config.send(alice)
    with pytest.raises(UnknownDatasetError, match="it has: d"):
        alice.fit("nothing")
    with pytest.raises(TraceError, match="takes 'target' first.*name its parameters pred and target"):
        TrainConfig(net(), lambda target, output: output.sum(), example=(torch.zeros(2, 6), torch.zeros(2)))


def test_a_model_on_a_worker_is_refused(alice):
    TorchHook(torch)
    config = TrainConfig(net().send(alice), F.cross_entropy)
    for ask in (lambda: config.send(alice), lambda: config.trace_for(alice, "d")):
        with pytest.raises(
            LocalError, match=r"'weight' of the model is on worker 'alice': get\(\) the model"
        ):
            ask()


def test_a_plan_trains_the_sessions_own_readable_tensors_only(make_worker):
    """Whatever ids a message names: others' objects, private ones and plans are no state, nor are too few."""
    TorchHook(torch)
    worker = VirtualWorker(
        "clinic", datasets={"d": classification_data(1)}, users={"ann": "a", "ben": "b"}, token="a"
    )
    ben = worker.connect_as("b")
    mine = TrainConfig(net(), F.cross_entropy)
    plan = mine.trace_for(worker, "d").training
    asyncio.run(on_loop(worker.workplace.put_plan)(plan))
    weight, bias = (one.detach().clone().send(worker) for one in mine.model.parameters())
    secret = torch.zeros(3).send(worker, allowed_users=["ben"])
    theirs = torch.zeros(3).send(ben)

    def fit(*objects, tensors=()):
        body = m.Fit(plan.hash, "d", 60, 1, -1, False, "SGD", {"lr": 0.5}, False, 0, objects=list(objects))
        return asyncio.run(worker.ask(m.Fitted, body, tensors))

    def evaluate(*objects):
        return asyncio.run(worker.ask(m.Evaluated, m.Evaluate(plan.hash, "d", 60, 0, list(objects))))

    ids = [weight.id_at_location, bias.id_at_location]
    for objects, says in [
        ([ids[0], secret.id_at_location], "is private: it cannot be the state"),
        ([ids[0], theirs.id_at_location], "no object"),
        ([ids[0], 12345], "no object"),
        (ids[:1], "state"),
        (ids[::-1], "wanted"),
        ([ids[0]] * 2, "wanted"),
    ]:
        for ask in (fit, evaluate):
            with pytest.raises(RemoteError, match=says):
                ask(*objects)
    with pytest.raises(RemoteError, match="not as both"):
        fit(*ids, tensors=[torch.zeros(3, 6), torch.zeros(3)])
    before = weight.copy().get()
    fitted, tensors = fit(*ids)
    assert tensors == []
    assert fitted.samples == 60
    assert not torch.equal(weight.get(), before)


def test_a_target_that_comes_first_is_not_given_the_prediction(make_worker):
    frank = make_worker("frank", {"d": BaseDataset(torch.ones(4, 1), torch.full((4, 1), 5.0))})

    def loss_fn(target, pred):
        return (target - 0 * pred).mean()

    TrainConfig(nn.Linear(1, 1), loss_fn).send(frank)
    assert frank.fit("d").loss == 5.0


def test_the_last_batch_can_be_dropped(alice):
    whole = TrainConfig(net(), F.cross_entropy, batch_size=16, drop_last=True)
    none = TrainConfig(net(), F.cross_entropy, batch_size=64, drop_last=True)

    async def job(config):
        scheduler = RoundScheduler([alice], config, dataset_key="d", seed=1)
        await scheduler.prepare()
        return await scheduler.run_round(1, config.state)

    assert asyncio.run(job(whole)).workers["alice"].samples == 48
    result = asyncio.run(job(none))
    assert result.workers["alice"].samples == 0
    assert torch.equal(result.state["weight"], none.model.weight)


def test_a_worker_with_no_items_does_not_count(make_worker):
    full = make_worker("full", {"d": classification_data(1)})
    empty = make_worker("empty", {"d": BaseDataset(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))})
    config = TrainConfig(net(), F.cross_entropy)

    async def job(workers):
        scheduler = RoundScheduler(workers, config, dataset_key="d", seed=1)
        await scheduler.prepare()
        return await scheduler.run_round(1, config.state)

    both, alone = asyncio.run(job([full, empty])), asyncio.run(job([full]))
    assert torch.equal(both.state["weight"], alone.state["weight"])
    assert both.workers["empty"].samples == 0
    config.send(empty)
    assert np.isnan(empty.evaluate("d").loss)
