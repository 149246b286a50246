"""The stories of the demo: what happens as a function, what must come of it as a row."""

from paycore.cli.demo_scene import Scene, Story, take_footprint

BANK_A_S_WORD = "bank A's word"
BANK_B_S_WORD = "bank B's word"
SENT_BACK = "sent back"
QUARANTINE = "quarantine"


def pay_at_two_banks(scene: Scene) -> None:
    """Two pages are open; both get paid."""
    page_a, page_b = scene.pay("bank_a"), scene.pay("bank_b")
    scene.banks.pay(page_a)
    scene.see(BANK_A_S_WORD, scene.judged)
    scene.listen()
    scene.banks.pay(page_b)
    scene.see(BANK_B_S_WORD, scene.judged)
    scene.see(SENT_BACK, scene.sent_back)


def hear_it_three_times(scene: Scene) -> None:
    """The bank repeats itself, and so does whoever calls Notify."""
    page = scene.pay("bank_a")
    (capture,) = scene.banks.pay(page)
    scene.see("first time", scene.judged)
    before = take_footprint(scene)
    scene.listen()
    scene.banks.resend(page)
    scene.see("the bank sends again", scene.words)
    answer = scene.notify(page, capture)
    scene.see("handed over again", lambda: answer)
    scene.see("written for both", lambda: before.difference(take_footprint(scene)))


def pay_after_close(scene: Scene) -> None:
    """The merchant closes the payment while the user stands at the bank's page."""
    page = scene.pay("bank_a")
    scene.close()
    scene.see("after Close", scene.state)
    scene.banks.pay(page, take_after_close=True)
    scene.see(BANK_A_S_WORD, scene.judged)
    scene.see(SENT_BACK, scene.sent_back)


def pay_after_expiry(scene: Scene) -> None:
    """The validity passes before the user pays."""
    page = scene.pay("bank_b", validity_ms=2_000)
    scene.wait_for_expiry()
    scene.see("after expiry", scene.state)
    scene.banks.pay(page, take_after_close=True)
    scene.see(BANK_B_S_WORD, scene.judged)
    scene.see(SENT_BACK, scene.sent_back)


def pay_in_time_told_late(scene: Scene) -> None:
    """The bank says nothing of the payment until long after its validity has passed."""
    page = scene.pay("bank_a", validity_ms=2_000)
    scene.banks.pay(page, notify_held=True)
    scene.wait_for_expiry()
    scene.see("the bank asked at expiry", scene.state)
    scene.listen()
    scene.banks.release(page)
    scene.see("the late word", scene.judged)
    scene.see(SENT_BACK, scene.sent_back)


def hear_a_wrong_amount(scene: Scene) -> None:
    """The bank first tells another amount than it took, and the right one only after it was asked."""
    page = scene.pay("bank_b")
    scene.banks.pay(page, notify_held=True, notify_amount_minor=1, notify_wrong_amount_times=1)
    wrong, right = scene.banks.notification_ids(page)
    scene.banks.release(page, [wrong])
    scene.see("the wrong word", lambda: scene.heard("MISMATCH"))
    scene.see("the bank asked", scene.state)
    scene.see(QUARANTINE, scene.quarantine)
    scene.listen()
    scene.banks.release(page, [right])
    scene.see("the right word", scene.judged)


def hear_of_an_unknown_order(scene: Scene) -> None:
    """A user pays an order that another system opened under the same contract."""
    story = scene.story
    page = scene.add_page(scene.banks.open_foreign_order("bank_c", "OTHER-42", story.amount_minor, story.currency))
    scene.banks.pay(page)
    scene.see("bank C's word", scene.words)
    scene.banks.resend(page, times=2)
    scene.see("and twice again", scene.words)
    scene.see(QUARANTINE, lambda: scene.quarantine_of(page))


def pay_twice_on_one_page(scene: Scene) -> None:
    """One page takes the money twice, under two trade numbers."""
    page = scene.pay("bank_a")
    scene.banks.pay(page, pay_twice_on_page=True)
    scene.see("bank A's two words", scene.judged)
    scene.see("the bank asked", scene.sent_back)
    scene.see(QUARANTINE, scene.quarantine)


def kill_between_two_words(scene: Scene) -> None:
    """The server dies after it answered the first bank and before it hears the second."""
    page_a, page_b = scene.pay("bank_a"), scene.pay("bank_b")
    scene.banks.pay(page_a)
    scene.see(BANK_A_S_WORD, scene.judged)
    scene.banks.pay(page_b, notify_held=True)
    scene.kill_server()
    acknowledged = scene.banks.release(page_b)
    scene.see("bank B finds it dead", lambda: "acknowledged" if acknowledged else "not acknowledged")
    scene.stage.restart_server()
    scene.banks.resend(page_a)
    scene.see("after the restart", scene.judged)
    scene.see(SENT_BACK, scene.sent_back)
    scene.see("the stories above", scene.earlier_payments)


STORIES = (
    Story(
        name="a: paid at bank A and at bank B",
        happens="The user opens two bank pages for one order and pays on both. The second payment goes back by itself.",
        amount_minor=12_800,
        currency="CNY",
        expected={
            BANK_A_S_WORD: "ACCEPTED, payment PAID at bank_a",
            BANK_B_S_WORD: "DUPLICATE, payment PAID at bank_a",
            SENT_BACK: "DUPLICATE: 128.00 CNY REFUNDED at bank_b",
        },
        keeps={"bank_a": 12_800, "bank_b": 0},
        play=pay_at_two_banks,
    ),
    Story(
        name="b: the same notification three times",
        happens="The bank sends its word again, and so do we. The answer is the same, and nothing is written.",
        amount_minor=4_990,
        currency="CNY",
        expected={
            "first time": "ACCEPTED, payment PAID at bank_a",
            "the bank sends again": "ACCEPTED replayed",
            "handed over again": "ACCEPTED replayed",
            "written for both": "nothing",
        },
        keeps={"bank_a": 4_990},
        play=hear_it_three_times,
    ),
    Story(
        name="c1: paid after Close",
        happens="The merchant closes the payment, and the bank takes the money all the same. It goes back.",
        amount_minor=8_800,
        currency="JPY",
        expected={
            "after Close": "CLOSED (MERCHANT)",
            BANK_A_S_WORD: "LATE, payment CLOSED (MERCHANT)",
            SENT_BACK: "LATE: 8800 JPY REFUNDED at bank_a",
        },
        keeps={"bank_a": 0},
        play=pay_after_close,
    ),
    Story(
        name="c2: paid after expiry",
        happens="The payment was valid for two seconds, then closed, at the bank too; the bank takes the money"
        " later all the same. It goes back.",
        amount_minor=1_999,
        currency="CNY",
        expected={
            "after expiry": "CLOSED (EXPIRED)",
            BANK_B_S_WORD: "LATE, payment CLOSED (EXPIRED)",
            SENT_BACK: "LATE: 19.99 CNY REFUNDED at bank_b",
        },
        keeps={"bank_b": 0},
        play=pay_after_expiry,
    ),
    Story(
        name="d: paid in time, and the bank says nothing",
        happens="The user pays in time, and no word comes. Before it closes the payment paycore asks the bank, and"
        " keeps it. The word that comes in the end tells nothing new.",
        amount_minor=12_345,
        currency="KWD",
        expected={
            "the bank asked at expiry": "PAID at bank_a",
            "the late word": "ACCEPTED replayed, payment PAID at bank_a",
            SENT_BACK: "nothing",
        },
        keeps={"bank_a": 12_345},
        play=pay_in_time_told_late,
    ),
    Story(
        name="e: a wrong amount first, the right word later",
        happens="The bank took 99.00 and first tells 0.01. The wrong word goes to quarantine, and the bank is asked.",
        amount_minor=9_900,
        currency="CNY",
        expected={
            "the wrong word": "MISMATCH",
            "the bank asked": "PAID at bank_b",
            QUARANTINE: "empty",
            "the right word": "ACCEPTED replayed, payment PAID at bank_b",
        },
        keeps={"bank_b": 9_900},
        play=hear_a_wrong_amount,
    ),
    Story(
        name="f: an order that nobody knows",
        happens="A bank tells three times of an order that is not paycore's. It is kept once, for a person to look at.",
        amount_minor=7_700,
        currency="CNY",
        expected={
            "bank C's word": "UNKNOWN",
            "and twice again": "UNKNOWN x3",
            QUARANTINE: "1 kept, came 3 times",
        },
        keeps={"bank_c": 7_700},
        play=hear_of_an_unknown_order,
    ),
    Story(
        name="g: paid twice on one bank page",
        happens="One page took the money twice. Some banks tell two numbers of one payment, so the bank is asked: it"
        " has taken both, and the second goes back.",
        amount_minor=3_300,
        currency="CNY",
        expected={
            "bank A's two words": "ACCEPTED, SECOND_CAPTURE, payment PAID at bank_a",
            "the bank asked": "SECOND_CAPTURE: 33.00 CNY REFUNDED at bank_a",
            QUARANTINE: "empty",
        },
        keeps={"bank_a": 3_300},
        play=pay_twice_on_one_page,
    ),
    Story(
        name="h: kill -9 between two notifications",
        happens="Paid at two banks; the server dies between their words and comes back. Nothing is lost or doubled.",
        amount_minor=25_000,
        currency="CNY",
        expected={
            BANK_A_S_WORD: "ACCEPTED, payment PAID at bank_a",
            "bank B finds it dead": "not acknowledged",
            "after the restart": "ACCEPTED replayed, DUPLICATE, payment PAID at bank_a",
            SENT_BACK: "DUPLICATE: 250.00 CNY REFUNDED at bank_b",
            "the stories above": "unchanged",
        },
        keeps={"bank_a": 25_000, "bank_b": 0},
        play=kill_between_two_words,
    ),
)
