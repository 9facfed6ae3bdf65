"""Turns at a part: single tokens first, but nobody waits for ever; and the digest of the code."""

import threading
import time

from comfyui_hywu.hywu_core.cluster.part import URGENT_IN_A_ROW, Turn, code_digest


def entering(turn: Turn, plan: list[bool]) -> list[int]:
    """In which order those of ``plan`` (urgent or not), who come one after the other while it is taken, are let in."""
    order, threads = [], []

    def come(number: int, urgent: bool) -> None:
        with turn.taken(urgent):
            order.append(number)

    with turn.taken():
        for number, urgent in enumerate(plan):
            threads.append(threading.Thread(target=come, args=(number, urgent)))
            threads[-1].start()
            while sum(map(len, turn._lines)) <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    return order


def test_urgent_first_and_equals_in_their_order():
    assert entering(Turn(), [False, True, False, True]) == [1, 3, 0, 2]


def test_others_come_in_between():
    many = [False, False] + [True] * (2 * URGENT_IN_A_ROW)
    order = entering(Turn(), many)
    assert order.index(0) == URGENT_IN_A_ROW and order.index(1) == 2 * URGENT_IN_A_ROW + 1 and len(order) == len(many)


def test_a_turn_ends_with_an_error_too():
    turn = Turn()
    try:
        with turn.taken():
            raise ValueError
    except ValueError:
        pass
    assert entering(turn, [True]) == [0]


def test_the_digest_names_the_code():
    assert len(code_digest()) == 12 and int(code_digest(), 16) >= 0
