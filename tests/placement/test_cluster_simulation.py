"""Laws of the cluster's simulation, on small made-up services and on the published model's plans."""

import itertools
from dataclasses import replace

import pytest
from comfyui_hywu.benchmarks.cluster_simulation import Pass, Service, rate, service_of, service_of_measured, simulate
from comfyui_hywu.hywu_core.placement import search
from comfyui_hywu.hywu_core.placement.devices import parse_devices
from comfyui_hywu.hywu_core.placement.memory import Task
from comfyui_hywu.hywu_core.placement.plan import plan
from comfyui_hywu.hywu_core.placement.request import Request, lengths


def service(stages: int = 3, tokens: int = 20, **changes) -> Service:
    """Everything takes something, no two things the same."""
    def passing(took: float) -> Pass:
        return Pass(tuple(took * (1 + number / 10) for number in range(stages)), 0.01)

    passes = [passing(took) for took in (0.5, 0.02, 0.4, 0.7, 0.3)]
    made = Service(*passes, tokens, 10, pictures=0.2, generate=1.2, decode=0.25, generator_on=stages, slices=4)
    return replace(made, **changes)


KINDS = ("prompt", "token", "encode", "first", "step")
SERVICES = {
    "three stages": service(), "one stage": service(1), "no thinking": service(tokens=0), "a token": service(tokens=1),
    "one step": service(steps=1), "generator beside a stage": service(generator_on=1),
    "the same pass for all": service(**dict.fromkeys(KINDS, Pass((0.1, 0.2, 0.1), 0.01)))}
every_service = pytest.mark.parametrize("made", SERVICES.values(), ids=SERVICES)


@every_service
@pytest.mark.parametrize("pause", (0.0, 7.0))
def test_one_user_gets_the_sum_of_the_phases(made, pause):
    found = simulate(made, 1, pause)
    assert found.mean_s == pytest.approx(made.solo) and found.p95_s == pytest.approx(made.solo)
    assert found.per_minute == pytest.approx(60 / (made.solo + pause), rel=0.02)


def test_the_sum_of_the_phases_counted_by_hand():
    passes = (0.5 + 20 * 0.02 + 0.4 + 0.7 + 9 * 0.3) * 3.3 + (1 + 20 + 1 + 1 + 9) * 3 * 0.01
    assert service().solo == pytest.approx(passes + 0.2 + 1.2 + 0.25)


def test_what_one_request_asks_of_every_device_is_what_it_keeps_busy():
    made, found = service(), simulate(service(), 1)
    assert found.utilisation == pytest.approx([load / made.solo for load in made.loads], rel=0.01)


@every_service
@pytest.mark.parametrize("users", (2, 5, 40))
@pytest.mark.parametrize("tokens_first", (False, True))
def test_never_more_than_the_busiest_device_can_do(made, users, tokens_first):
    found = simulate(made, users, tokens_first=tokens_first, edits=200)
    assert found.per_minute <= 60 / made.bottleneck * 1.0001
    # Little's law: who is not pausing is waiting for an edit.
    assert found.per_minute * found.mean_s / 60 == pytest.approx(users, rel=0.1)


def test_two_users_on_one_stage_share_what_it_can_do():
    made = Service(*[Pass((took,)) for took in (0.5, 0.02, 0.4, 0.7, 0.3)], 20, 10)
    alone, two = simulate(made, 1), simulate(made, 2, edits=100)
    assert made.bottleneck == pytest.approx(made.solo)
    assert two.per_minute == pytest.approx(alone.per_minute, rel=0.01)
    assert two.mean_s == pytest.approx(2 * alone.mean_s, rel=0.05)


@every_service
def test_many_users_keep_the_busiest_device_at_work(made):
    made = replace(made, most=1000)
    assert simulate(made, 60, tokens_first=True, spread=0.5).per_minute >= 0.95 * 60 / made.bottleneck


def test_in_order_of_arrival_tokens_wait_behind_steps():
    made = service(4, tokens=300, most=12)
    assert simulate(made, 40, spread=0.5).per_minute < simulate(made, 40, spread=0.5, tokens_first=True).per_minute


@pytest.mark.parametrize("memory", ({"most": 1}, {"free": (5, 9, 9), "request": (3, 3, 3)}))
def test_memory_for_one_request_lets_one_think_or_denoise(memory):
    made = service(pictures=0.0, generate=0.0, decode=0.0, encode=Pass((0.0,) * 3), generator_on=3, tower_on=4, **memory)
    assert made.at_once == 1
    assert simulate(made, 9, edits=50).per_minute == pytest.approx(60 / made.solo, rel=0.01)
    assert simulate(replace(made, most=2, free=(6, 9, 9), request=(3, 3, 3)), 9).per_minute > 1.5 * 60 / made.solo


def test_no_memory_is_an_error():
    made = service(free=(2,), request=(3,))
    assert made.at_once == 0 and made.bottleneck == float("inf")
    with pytest.raises(ValueError, match="0 fit"):
        simulate(made, 1)


@pytest.mark.parametrize("pause", (0.0, 20.0))
def test_more_users_never_get_less_done(pause):
    made = service(tokens=100)
    rates = [simulate(made, users, pause, spread=0.5, tokens_first=True, edits=150).per_minute
             for users in (1, 2, 3, 5, 8, 20, 50)]
    assert all(more >= 0.97 * fewer for fewer, more in itertools.pairwise(rates))


@every_service
@pytest.mark.parametrize("most", (1, 4, 100))
def test_equal_users_get_equal_numbers_of_edits(made, most):
    finished = simulate(replace(made, most=most), 7, edits=140).finished
    assert sum(finished) == 147 and max(finished) - min(finished) <= 1


def test_who_sends_much_at_once_takes_nobody_s_turn():
    finished = simulate(service(most=2), (1, 1, 1, 12), edits=200).finished
    assert max(finished[:3]) - min(finished[:3]) <= 1
    assert finished[3] <= 1.5 * min(finished[:3])


def test_one_core_for_all_does_one_thing_at_a_time():
    made = service(cores=1)
    assert made.bottleneck == pytest.approx(sum(made.loads))
    found = simulate(made, 12, edits=100)
    assert 0.95 * 60 / sum(made.loads) <= found.per_minute <= 1.02 * 60 / sum(made.loads)
    assert simulate(service(cores=2), 12).per_minute > 1.5 * found.per_minute
    assert simulate(service(cores=9), 12).per_minute == simulate(service(), 12).per_minute


def test_a_longer_or_shorter_thinking_is_as_much_work():
    made = service(1, tokens=100)
    assert simulate(made, 1, edits=200, spread=0.5).mean_s == pytest.approx(made.solo, rel=0.01)


def test_a_measured_service_alone_takes_what_was_measured():
    stages = {"token": (0.01, 0.02), "encode": (0.1, 0.1), "step": (0.3, 0.2)}
    trips = {"token": 0.05, "encode": 0.25, "step": 0.56}
    made = service_of_measured(stages, trips, desk=0.005, tokens=8, steps=4, at_once=3, pictures=0.1, generate=0.7, decode=0.2)
    assert made.solo == pytest.approx(0.1 + 2 * 0.25 + 8 * 0.05 + 0.7 + 4 * 0.56 + 0.2)
    assert simulate(made, 1).mean_s == pytest.approx(made.solo)
    assert made.devices == 5 and made.loads[0] == pytest.approx(0.005 * (2 + 8 + 4)) and made.at_once == 3


@pytest.mark.parametrize("line, form", (("4xh100", "bf16"), ("2xh100", "fp8"), ("8x4090", "int4")))
def test_a_plan_s_service_takes_the_plan_s_seconds(sizes, generator, line, form):
    """But for the waves that a plan may have, which are one user's only, and for hops."""
    devices, request = parse_devices(line), Request()
    task = Task(sizes, generator, request, lengths(sizes.config, request), devices)
    made = service_of(task, search.find(task, form, "none"), generator)
    planned = plan(sizes, devices, request, format=form, generator=generator, streaming="none")
    think = sum(made.prompt.stages) + made.tokens * sum(made.token.stages)
    assert think == pytest.approx(planned.seconds["think"])
    assert sum(made.encode.stages) == pytest.approx(planned.seconds["encode"])
    assert made.pictures == pytest.approx(planned.seconds["pictures"])
    assert made.generate == pytest.approx(planned.seconds["generate"])
    assert made.decode == pytest.approx(planned.seconds["decode"])
    denoise = sum(made.first.stages) + (made.steps - 1) * sum(made.step.stages)
    if planned.waves:
        assert denoise > planned.seconds["denoise"]
    else:
        assert denoise == pytest.approx(planned.seconds["denoise"])


def test_a_generator_on_a_card_of_its_own_takes_nothing_from_a_stage(sizes, generator):
    task = Task(sizes, None, Request(), lengths(sizes.config, Request()), parse_devices("4xh100"))
    own = service_of(task, search.find(task, "bf16", "none"), generator)
    beside = replace(task, generator=generator)
    beside = service_of(beside, search.find(beside, "bf16", "none"), generator)
    assert own.devices == 5 and beside.devices == 4 and own.generate == pytest.approx(beside.generate)
    assert own.loads[-1] == own.generate and max(own.loads) < max(beside.loads)
    assert own.free[beside.generator_on] - beside.free[beside.generator_on] >= generator.total


def test_users_are_spread_over_equal_services():
    made = service(tokens=0)
    assert rate(made, 4, 8, 0.0) == pytest.approx(4 * rate(made, 1, 2, 0.0))
    assert rate(made, 8, 1, 0.0) == pytest.approx(rate(made, 1, 1, 0.0))
