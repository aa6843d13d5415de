"""What waits for MLflow on disk: bounded, and whole after a kill or a full disk."""

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from rllib_arpo.tracking.mlflow_outbox import Outbox

MIB = 1 << 20
Open = Callable[..., Outbox]


@pytest.fixture
def open_outbox(tmp_path: Path) -> Iterator[Open]:
    """Opens the folder's outbox; all are closed at the end."""
    with ExitStack() as opened:

        def open_one(**limits: int) -> Outbox:
            outbox = Outbox(tmp_path, **limits)
            opened.callback(outbox.close)
            return outbox

        yield open_one


def line(number: int) -> bytes:
    return b"%07d\n" % number


def drain(outbox: Outbox) -> list[int]:
    """Send all that waits."""
    numbers: list[int] = []
    while True:
        lines, end = outbox.read()
        if not lines:
            return numbers
        numbers += map(int, lines)
        outbox.mark_sent(end)


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / "outbox").iterdir())


def test_lines_are_read_in_order_and_only_the_newest_file_of_what_is_sent_stays(
    open_outbox, tmp_path
) -> None:
    outbox = open_outbox(max_file_bytes=80)
    for number in range(100):
        outbox.append(line(number))
    assert outbox.pending_bytes == 800
    assert drain(outbox) == list(range(100))
    assert outbox.pending_bytes == 0
    assert disk_bytes(tmp_path) == 80
    # For ever, and by whoever comes next.
    for turn in range(1, 20):
        outbox.close()
        outbox = open_outbox(max_file_bytes=80)
        for number in range(100):
            outbox.append(line(100 * turn + number))
        assert drain(outbox) == list(range(100 * turn, 100 * turn + 100))
        assert disk_bytes(tmp_path) == 80


def test_what_was_sent_in_part_goes_on_in_the_middle_of_a_file(
    open_outbox, tmp_path
) -> None:
    outbox = open_outbox(max_file_bytes=80)
    for number in range(25):
        outbox.append(line(number))
    (_, end), (first, _) = outbox.read(), outbox.read()
    assert list(map(int, first)) == list(range(10))
    outbox.mark_sent(end + 3 * 8)
    assert drain(open_outbox()) == list(range(13, 25))


def test_what_another_outbox_has_sent_meanwhile_is_left_out(open_outbox) -> None:
    first = open_outbox(max_file_bytes=80)
    for number in range(25):
        first.append(line(number))
    first.close()
    second = open_outbox(max_file_bytes=80)
    second.append(line(25))
    assert drain(first) == list(range(25))
    second.catch_up()
    assert drain(second) == [25]


def test_memory_does_not_grow_with_what_waits(open_outbox, tmp_path) -> None:
    outbox = open_outbox(max_file_bytes=64 * MIB)
    for _ in range(64):
        outbox.append(b"x" * (MIB // 2 - 1) + b"\n")
        outbox.append(b"y" * (MIB // 2 - 1) + b"\n")
    tracemalloc.start()
    try:
        opened = open_outbox()
        lines, _ = opened.read()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert opened.pending_bytes == 64 * MIB
    assert len(lines) == 1  # longer than a batch, but one there must be
    assert peak < 4 * MIB


@pytest.mark.parametrize("torn", [b"", b"0000", b"0" * 200_000])
def test_what_a_kill_left_of_a_last_line_is_dropped(
    open_outbox, tmp_path, torn
) -> None:
    outbox = open_outbox()
    outbox.append(line(0))
    (file,) = (tmp_path / "outbox").iterdir()
    with file.open("ab") as opened:
        opened.write(torn)
    outbox = open_outbox()
    outbox.append(line(1))
    assert drain(outbox) == [0, 1]


def test_a_power_cut_that_took_sent_lines_takes_no_later_ones(
    open_outbox, tmp_path
) -> None:
    outbox = open_outbox()
    for number in range(10):
        outbox.append(line(number))
    assert drain(outbox) == list(range(10))
    (file,) = (tmp_path / "outbox").iterdir()
    file.write_bytes(line(0) + b"00")
    outbox = open_outbox()
    for number in range(10, 20):
        outbox.append(line(number))
    assert drain(outbox) == list(range(10, 20))


def test_no_more_waits_than_is_allowed(open_outbox, tmp_path) -> None:
    outbox = open_outbox(max_bytes=24)
    for number in range(3):
        outbox.append(line(number))
    with pytest.raises(OSError, match="24 bytes wait already"):
        outbox.append(line(3))
    assert drain(outbox) == [0, 1, 2]
    outbox.append(line(4))
    assert drain(outbox) == [4]


FULL_DISK = """
import resource, sys
from pathlib import Path
from rllib_arpo.tracking.mlflow_outbox import Outbox

outbox = Outbox(Path(sys.argv[1]))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))  # 2 lines and a half
failed = []
for number in range(5):
    try:
        outbox.append(b"%07d\\n" % number)
    except OSError:
        failed.append(number)
assert failed == [2, 3, 4], failed
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
outbox.append(b"%07d\\n" % 5)
"""


def test_a_line_that_a_full_disk_cuts_leaves_no_trace(open_outbox, tmp_path) -> None:
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], check=True)
    assert drain(open_outbox()) == [0, 1, 5]


# Forks, as an import of ours for each kill would take seconds. The child appends
# numbers and says so on a pipe, while its other thread sends to a file.
KILLS = """
import os, random, signal, sys, threading
from pathlib import Path
from rllib_arpo.tracking.mlflow_outbox import Outbox

folder, num_kills = Path(sys.argv[1]), int(sys.argv[2])

def work(first, said):
    outbox = Outbox(folder, max_file_bytes=400)
    received = os.open(folder / "received", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def send():
        while True:
            lines, end = outbox.read()
            if lines:
                os.write(received, b"".join(lines))
                outbox.mark_sent(end)
    threading.Thread(target=send, daemon=True).start()
    number = first
    while True:
        outbox.append(b"%07d\\n" % number)
        os.write(said, b".")
        number += 1

random.seed(0)
for kill in range(num_kills):
    first = kill * 1_000_000
    hears, said = os.pipe()
    child = os.fork()
    if child == 0:
        work(first, said)
    os.close(said)
    wanted = random.randrange(1, 600)
    heard = 0
    while heard < wanted:
        heard += len(os.read(hears, wanted - heard))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    heard += sum(map(len, iter(lambda: os.read(hears, 4096), b"")))
    os.close(hears)
    print(first, heard, flush=True)
"""
NUM_KILLS = 25


def test_kills_at_any_moment_lose_nothing_and_reorder_nothing(
    open_outbox, tmp_path
) -> None:
    words = [sys.executable, "-W", "ignore", "-c", KILLS, str(tmp_path), str(NUM_KILLS)]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    received = [int(text) for text in (tmp_path / "received").read_text().split()]
    received += drain(open_outbox())
    once = list(dict.fromkeys(received))
    assert once == sorted(once)
    rounds = [tuple(map(int, words.split())) for words in said.splitlines()]
    assert len(rounds) == NUM_KILLS
    for first, acknowledged in rounds:
        got = [number for number in once if first <= number < first + 1_000_000]
        assert got == list(range(first, first + len(got)))
        # The last line may be there though the kill came before its word.
        assert len(got) - acknowledged in (0, 1)
    assert disk_bytes(tmp_path) <= 408
