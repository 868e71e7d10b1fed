"""What `help` shows of planrt's coroutines: the arguments that they take."""

import importlib
import inspect
import pkgutil

import pytest
import torch

import planrt


def modules():
    """Every module of planrt."""
    names = (found.name for found in pkgutil.walk_packages(planrt.__path__, "planrt."))
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def on_loop_coroutines():
    """Every coroutine function that `on_loop` or `bounded` wraps, by the name under which it is found."""
    found = {}
    for module in modules():
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        for holder in (module, *(one for one in classes if one.__module__ == module.__name__)):
            for name, value in vars(holder).items():
                code = getattr(value, "__code__", None)
                if code is not None and code.co_qualname.startswith(("on_loop.", "bounded.<locals>.awaited")):
                    found[f"{holder.__name__}.{name}"] = value
    return found


COROUTINES = on_loop_coroutines()


def test_there_are_some_to_walk():
    assert {"planrt.fl.utils.fit_model_on_worker", "RoundScheduler.run_round"} <= COROUTINES.keys()
    assert len(COROUTINES) > 25


@pytest.mark.parametrize("name", COROUTINES)
def test_a_coroutine_shows_its_signature_and_module(name):
    coroutine = COROUTINES[name]
    written = inspect.unwrap(coroutine)
    assert written is not coroutine
    assert inspect.iscoroutinefunction(coroutine)
    assert inspect.signature(coroutine) == inspect.signature(written)
    assert not any(
        parameter.kind is inspect.Parameter.VAR_POSITIONAL
        and parameter.name == "args"
        and "P." in str(parameter)
        for parameter in inspect.signature(coroutine).parameters.values()
    )
    assert coroutine.__module__ == written.__module__ != "planrt.loop"


def test_help_of_a_round_names_its_arguments():
    from planrt.fl import RoundScheduler

    text = inspect.getdoc(RoundScheduler.run_round)
    assert text
    assert list(inspect.signature(RoundScheduler.run_round).parameters)[:2] == ["self", "round_number"]


def awaited_forms():
    """Every ``async_name`` beside a ``name``, in planrt and where it adds methods to torch's classes, inherited ones
    too: (the blocking one, the one to be awaited)."""
    planrt.TorchHook(torch)
    holders = [torch.Tensor, torch.nn.Module, torch.optim.Optimizer]
    for module in modules():
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        holders += [module, *(one for one in classes if one.__module__ == module.__name__)]
    return {
        f"{holder.__name__}.{name}": (blocking, getattr(holder, name))
        for holder in holders
        for name in dir(holder)
        if name.startswith("async_")
        and inspect.isroutine(blocking := getattr(holder, name.removeprefix("async_"), None))
    }


AWAITED = awaited_forms()


def test_there_are_some_awaited_forms():
    assert {
        "planrt.vertical.linear.async_linear_regression",
        "TrainedRun.async_fit",
        "Tensor.async_send",
        "Module.async_move",
        "Plan.async_send",
        "PointerTensor.async_move",
        "MultiPointerTensor.async_get",
        "VirtualWorker.async_search",
    } <= AWAITED.keys()


@pytest.mark.parametrize("name", AWAITED)
def test_the_form_to_be_awaited_takes_the_same_arguments(name):
    blocking, awaited = AWAITED[name]
    assert inspect.signature(awaited).parameters == inspect.signature(blocking).parameters
