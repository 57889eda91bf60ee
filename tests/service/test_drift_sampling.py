"""Which prompts of a stream are looked at."""

from __future__ import annotations

from service.drift_sampling import MAX_SEEN, USER_SHARE, USER_WINDOW, Sampling, Skipped, new_salt

SALT = bytes(range(16))


def name(number: int) -> bytes:
    return f"prompt {number}".encode()


def test_a_prompt_counts_once() -> None:
    sampling = Sampling(SALT)
    assert [sampling.skips(name(n), None) for n in (1, 2, 1)] == [None, None, Skipped.DUPLICATE]


def test_what_is_remembered_is_bounded_and_the_least_recent_goes_first() -> None:
    sampling = Sampling(SALT)
    for number in range(MAX_SEEN):
        assert sampling.skips(name(number), None) is None
    assert sampling.skips(name(0), None) is Skipped.DUPLICATE
    sampling.skips(b"one more", None)
    assert sampling.skips(name(0), None) is Skipped.DUPLICATE, "it was asked again just now"
    assert sampling.skips(name(1), None) is None, "it was asked longest ago"


def test_one_end_user_gets_a_share_of_the_window_and_others_are_not_touched() -> None:
    sampling = Sampling(SALT)
    mine = [sampling.skips(name(number), "user:ann") for number in range(USER_WINDOW)]
    assert mine.count(None) == USER_SHARE and mine.count(Skipped.CAPPED) == USER_WINDOW - USER_SHARE
    assert sampling.skips(b"from another", "user:bob") is None
    assert sampling.skips(b"from nobody in particular", None) is None


def test_the_only_user_of_a_service_is_thinned_out_and_never_shut_out() -> None:
    sampling = Sampling(SALT)
    mine = [sampling.skips(name(number), "user:backend") for number in range(10 * USER_WINDOW)]
    late = mine[-2 * USER_WINDOW :]
    assert abs(late.count(None) - 2 * USER_SHARE) <= 2


def test_people_without_a_name_are_not_capped_together() -> None:
    sampling = Sampling(SALT)
    assert [sampling.skips(name(number), None) for number in range(USER_WINDOW)] == [None] * USER_WINDOW


def test_a_restored_one_goes_on_where_it_stood() -> None:
    sampling = Sampling(SALT)
    for number in range(USER_SHARE):
        sampling.skips(name(number), "user:ann")
    restored = Sampling(SALT, sampling.state())
    assert restored.state() == sampling.state()
    assert restored.skips(name(0), None) is Skipped.DUPLICATE
    assert restored.skips(b"new", "user:ann") is Skipped.CAPPED
    assert restored.skips(b"new, too", "user:bob") is None


def test_what_is_kept_holds_no_text_and_cannot_be_compared_between_streams() -> None:
    states = []
    for salt in (SALT, new_salt()):
        sampling = Sampling(salt)
        sampling.skips(b"my secret prompt", "user:ann")
        states.append(sampling.state())
    assert states[0][8:16] != states[1][8:16] and states[0][16:24] != states[1][16:24]
    assert not any(text in state for state in states for text in (b"secret", b"ann"))
