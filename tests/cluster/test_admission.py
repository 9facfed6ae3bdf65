"""Who may begin: room on every stage, turns of users, nobody overtaken, nothing held after any end."""

import threading
import time

import pytest
from comfyui_hywu.hywu_core.cluster.admission import Admission
from comfyui_hywu.hywu_core.errors import RequestError


class Visitor(threading.Thread):
    """Asks for room, notes that it is in, and stays until it is told to go."""

    def __init__(self, admission: Admission, user: str, need: tuple[int, ...], entered: list[str]):
        super().__init__(daemon=True)
        self.admission, self.user, self.need, self.entered = admission, user, need, entered
        self.go, self.places, self.cancel = threading.Event(), [], False
        self.start()

    def run(self):
        def on_place(place: int) -> None:
            self.places.append(place)
            if self.cancel:
                raise InterruptedError

        try:
            with self.admission.admitted(self.user, self.need, on_place):
                self.entered.append(self.user)
                self.go.wait(10)
        except InterruptedError:
            pass


def until(true) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_room_is_counted_on_every_stage():
    admission, entered = Admission((10, 4), 8), []
    first = Visitor(admission, "a", (2, 3), entered)
    until(lambda: len(entered) == 1)
    second = Visitor(admission, "b", (2, 2), entered)
    until(lambda: second.places == [1] * len(second.places) and second.places)
    assert admission.held == [2, 3] and entered == ["a"] and admission.waiting() == 1
    first.go.set()
    until(lambda: entered == ["a", "b"])
    assert admission.held == [2, 2] and admission.running == 1
    second.go.set()
    until(lambda: admission.held == [0, 0] and admission.running == 0)


def test_users_take_turns_and_see_their_places():
    admission, entered = Admission((1,), 1), []
    visitors = []
    for user in ("a", "a", "a", "b", "c"):
        visitors.append(Visitor(admission, user, (1,), entered))
        until(lambda: admission.waiting() + len(entered) == len(visitors))
    assert entered == ["a"]
    # a has had a turn: b and c are before its other two.
    until(lambda: [visitor.places[-1:] for visitor in visitors[1:]] == [[3], [4], [1], [2]])
    for count in range(1, 5):
        until(lambda count=count: len(entered) == count)
        next(visitor for visitor in visitors if visitor.user == entered[-1] and not visitor.go.is_set()).go.set()
    until(lambda: entered == ["a", "b", "c", "a", "a"])


def test_new_names_do_not_keep_an_old_one_waiting():
    admission, entered = Admission((1,), 1), []
    first = Visitor(admission, "known", (1,), entered)
    until(lambda: entered == ["known"])
    again = Visitor(admission, "known", (1,), entered)
    until(lambda: again.places)
    visitors = [first, again]
    for number in range(4):  # a new name comes for everyone who leaves
        visitors.append(Visitor(admission, f"new{number}", (1,), entered))
        until(lambda: visitors[-1].places)
        next(visitor for visitor in visitors if visitor.user == entered[-1] and not visitor.go.is_set()).go.set()
        until(lambda number=number: len(entered) == number + 2)
    assert entered[:3] == ["known", "new0", "known"]
    for visitor in visitors:
        visitor.go.set()


def test_a_large_request_is_not_overtaken():
    admission, entered = Admission((10,), 8), []
    small = Visitor(admission, "a", (6,), entered)
    until(lambda: entered == ["a"])
    large = Visitor(admission, "b", (8,), entered)
    until(lambda: large.places)
    tiny = Visitor(admission, "c", (1,), entered)
    until(lambda: tiny.places)
    assert entered == ["a"]
    small.go.set()
    until(lambda: len(entered) == 3)
    assert entered == ["a", "b", "c"]
    large.go.set()
    tiny.go.set()


def test_cancelled_while_waiting_leaves_the_queue():
    admission, entered = Admission((1,), 8), []
    first, second, third = (Visitor(admission, user, (1,), entered) for user in "abc")
    until(lambda: len(entered) == 1 and admission.waiting() == 2)
    waiting = [visitor for visitor in (first, second, third) if visitor.user not in entered]
    waiting[0].cancel = True
    until(lambda: admission.waiting() == 1)
    next(visitor for visitor in (first, second, third) if visitor.user in entered).go.set()
    until(lambda: len(entered) == 2)
    waiting[1].go.set()
    until(lambda: admission.held == [0])


def test_no_more_than_so_many_at_once_however_little_they_hold():
    admission, entered = Admission((100,), 2), []
    visitors = [Visitor(admission, user, (0,), entered) for user in "abcd"]
    until(lambda: len(entered) == 2 and admission.waiting() == 2)
    time.sleep(0.25)
    assert len(entered) == 2
    for visitor in visitors:
        visitor.go.set()
    until(lambda: admission.running == 0 and len(entered) == 4)


def test_what_never_fits_is_refused_at_once_with_both_numbers():
    with pytest.raises(RequestError, match=r"5\.00 GB on stage 1.*2\.00 GB"):
        with Admission((10**10, 2 * 10**9), 1).admitted("a", (1, 5 * 10**9), lambda place: None):
            pass
