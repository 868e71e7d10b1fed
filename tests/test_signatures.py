"""What `help` shows of planrt's coroutines: the arguments that they take."""

import importlib
import inspect
import pkgutil

import pytest

import planrt
import planrt.vertical


def on_loop_coroutines():
    """Every coroutine function that `on_loop` or `bounded` wraps, by the name under which it is found."""
    found = {}
    for module_info in pkgutil.walk_packages(planrt.__path__, "planrt."):
        if module_info.name.endswith("__main__"):
            continue
        module = importlib.import_module(module_info.name)
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
    """Every ``async_name`` of planrt.vertical beside a ``name``: (the blocking one, the one to be awaited)."""
    found = {}
    for module_info in pkgutil.walk_packages(planrt.vertical.__path__, "planrt.vertical."):
        module = importlib.import_module(module_info.name)
        classes = [value for value in vars(module).values() if inspect.isclass(value)]
        for holder in (module, *(one for one in classes if one.__module__ == module.__name__)):
            for name, value in vars(holder).items():
                blocking = vars(holder).get(name.removeprefix("async_"))
                if name.startswith("async_") and inspect.isfunction(value) and inspect.isfunction(blocking):
                    found[f"{holder.__name__}.{name}"] = (blocking, value)
    return found


AWAITED = awaited_forms()


def test_there_are_some_awaited_forms():
    assert {"planrt.vertical.linear.async_linear_regression", "TrainedRun.async_fit"} <= AWAITED.keys()


@pytest.mark.parametrize("name", AWAITED)
def test_the_form_to_be_awaited_takes_the_same_arguments(name):
    blocking, awaited = AWAITED[name]
    assert inspect.signature(awaited).parameters == inspect.signature(blocking).parameters
