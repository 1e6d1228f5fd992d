"""Where the data of one of two processes are bad, both skip the step."""

from tests.multiprocess.processes import finish, free_address, start


def test_both_processes_skip_what_is_bad_on_one(tmp_path):
    coordinator = free_address()
    processes = [start("multiprocess.bad_worker", coordinator, index, tmp_path / "run") for index in range(2)]
    ended = finish(*processes)
    first, second = (output.splitlines()[-1].split() for output, _ in ended)  # after what gloo says
    assert first[:2] == ["3", "1"]
    assert first == second
    for _, errors in ended:
        assert "step 2 is skipped, 1 in a row: loss nan" in errors
