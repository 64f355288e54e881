"""Calls that pause: one runs at a time, in what order one likes, and none is left behind."""

import gc
import weakref
from contextvars import ContextVar
from functools import partial

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from wanda_lightning.calibration.resumable import Resumable, pause


def steps(name, said, number=3):
    for step in range(number):
        said.append((name, step))
        pause(f"{name}{step}")
    return f"{name} is through"


def test_they_take_turns():
    said = []
    a, b = (Resumable(lambda name=name: steps(name, said)) for name in "ab")
    answers = [a.resume(), b.resume(), b.resume(), a.resume()]
    assert said == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert answers == ["a0", "b0", "b1", "a1"]
    assert a.resume() == "a2"
    assert not a.is_done
    assert a.resume() is None
    assert a.is_done
    assert not b.is_done
    assert a.take_result() == "a is through"
    assert a.take_result() is None
    b.give_up()
    assert b.is_done


def test_an_error_reaches_who_resumed():
    def fails():
        pause(1)
        raise RuntimeError("in the middle")

    call = Resumable(fails)
    call.resume()
    with pytest.raises(RuntimeError, match="in the middle"):
        call.resume()
    assert call.is_done


def test_giving_up_unwinds_and_frees():
    closed = []

    def waits():
        tensor = torch.zeros(4)
        kept.append(weakref.ref(tensor))
        try:
            pause(None)
        finally:
            closed.append(True)

    kept: list = []
    call = Resumable(waits)
    call.resume()
    assert kept[0]() is not None
    call.give_up()
    call.give_up()  # twice will do
    assert closed == [True]
    del call
    gc.collect()
    assert kept[0]() is None


def test_giving_up_what_never_began():
    call = Resumable(lambda: pause(None))
    call.give_up()
    assert not call.is_done


def test_each_has_its_own_gradients_and_autocast():
    """What one of them switches on around a pause is not seen by the others, nor by who resumes them."""

    def with_modes():
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            pause(None)
            inside.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        pause(None)
        inside.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    inside: list = []
    with torch.no_grad():
        first, second = Resumable(with_modes), Resumable(with_modes)
        for call in (first, second, second, first):
            call.resume()
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
        first.resume()
    assert inside == [(True, True), (True, True), (False, False)]
    second.give_up()


def test_each_has_its_own_data_type_of_autocast():
    def within(dtype):
        with torch.autocast("cpu", dtype):
            pause(None)
            return torch.ones(2, 2).mm(torch.ones(2, 2)).dtype

    dtypes = [torch.float16, torch.bfloat16]
    calls = [Resumable(partial(within, dtype)) for dtype in dtypes]
    for call in [*calls, *calls]:
        call.resume()
    assert [call.take_result() for call in calls] == dtypes


def test_each_has_its_own_gpu(monkeypatch):
    """Layers of Nemotron-H's own code, for example, are within ``torch.cuda.stream`` of the GPU that they are on."""
    current = ["of the first GPU"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))

    def on_the_second():
        before = torch.cuda.current_stream()
        torch.cuda.set_stream("of the second GPU")
        pause(None)
        inside.append(torch.cuda.current_stream())
        torch.cuda.set_stream(before)

    inside, outside = [], []
    for call in [Resumable(on_the_second) for _ in range(2)] * 2:
        call.resume()
        outside.append(torch.cuda.current_stream())
    assert inside == ["of the second GPU"] * 2
    assert outside == ["of the first GPU"] * 4


def test_variables_of_the_context_are_those_of_who_made_it():
    """Such as one that a model's code reads, and its owner has set around the pruning."""
    precision = ContextVar("precision", default="high")
    token = precision.set("low")
    call = Resumable(lambda: pause(precision.get()))
    assert call.resume() == "low"
    call.give_up()
    precision.reset(token)


def device_of_new_tensors():
    return torch.zeros(1).device.type


def on_meta():
    with torch.device("meta"):
        pause(device_of_new_tensors())
        pause(device_of_new_tensors())


@pytest.fixture
def paused():
    """Two calls that pause within a mode of functions."""
    calls = [Resumable(on_meta) for _ in range(2)]
    for call in calls:
        call.resume()
    yield calls
    for call in calls:
        call.give_up()


def test_modes_of_functions_are_not_seen_outside(paused):
    assert device_of_new_tensors() == "cpu"


def test_modes_of_functions_are_there_again(paused):
    with torch.device("cpu"):  # of who resumes it, and is not in it when it pauses again
        assert paused[0].resume() == "meta"


def test_modes_of_who_resumes_are_seen_within():
    call = Resumable(lambda: pause(device_of_new_tensors()))
    with torch.device("meta"):
        assert call.resume() == "meta"
    call.give_up()


def test_giving_up_leaves_the_modes_of_functions_alone(paused):
    with torch.device("cpu"):
        paused[1].give_up()
        assert len(_get_current_function_mode_stack()) == 1
