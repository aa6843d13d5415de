"""Lines on disk that wait to be sent, in files of a bounded size.

    outbox/000000000000000.jsonl    named by the place of its first byte
           000000001048576.jsonl    the newest, which grows
    sent                            the place up to which all is sent

1. Places count from the first line of the run and files are only appended to and, once
   sent as a whole, deleted: what a kill leaves is what was there before the step that
   it interrupted, or after it.
2. A line is sent before that is noted: after a kill some are sent again, none is left
   out.
3. A line is with the operating system when `append` returns. It outlasts the process,
   and a power cut if that is asked for.
"""

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from rllib_arpo.storage import write_whole

OUTBOX, SENT = "outbox", "sent"
MAX_BYTES = 1 << 30
MAX_FILE_BYTES = 1 << 20
MAX_BATCH_BYTES = 256 * 1024
CHUNK_BYTES = 64 * 1024


class Outbox:
    """The lines of one folder. One thread appends while another reads.

    Nothing else may append: another outbox would cut off what seems half a line.

    Args:
        folder: it is there.
        max_bytes: that may wait.
        max_file_bytes: a file that has as many is followed by a new one.

    Raises:
        OSError: the folder cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int = MAX_BYTES,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes
        self._lock = threading.Lock()
        (folder / OUTBOX).mkdir(exist_ok=True)
        starts = self._starts()
        self._sent = max(self._noted(), *starts[:1], 0)
        self._start = starts[-1] if starts else self._sent
        self._end = self._start + _cut_to_lines(self._file(self._start))
        if self._end < self._sent:  # a power cut took lines that were sent
            self._start = self._end = self._sent
        self._opened = self._file(self._start).open("ab", buffering=0)

    @property
    def end(self) -> int:
        """The place after the last line."""
        return self._end

    @property
    def sent(self) -> int:
        """The place up to which all is sent."""
        return self._sent

    @property
    def pending_bytes(self) -> int:
        """What is not sent."""
        return self._end - self._sent

    def append(self, line: bytes, *, sync: bool = False) -> None:
        r"""Add a line, or leave all as it was.

        Args:
            line: ends with "\n".
            sync: return when it would outlast a power cut.

        Raises:
            OSError: the disk is full, or too much waits already.
        """
        with self._lock:
            if self.pending_bytes + len(line) > self._max_bytes:
                raise OSError(errno.EDQUOT, f"{self.pending_bytes} bytes wait already")
            if self._end - self._start >= self._max_file_bytes:
                following = self._file(self._end).open("ab", buffering=0)
                self._opened.close()
                self._opened, self._start = following, self._end
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[self._opened.write(rest) :]
                if sync:
                    os.fsync(self._opened.fileno())
            except OSError:
                self._opened.truncate(self._end - self._start)
                raise
            self._end += len(line)

    def read(self) -> tuple[list[bytes], int]:
        """The next lines to be sent, and the place where they end.

        Returns:
            `MAX_BATCH_BYTES` of lines at most, though one line if there is one.
        """
        with self._lock:
            end = self._end
        for start, following in pairwise([*self._starts(), end]):
            if following > self._sent:
                skipped = max(self._sent - start, 0)
                lines = _lines(self._file(start), skipped, following - start)
                if lines:
                    return lines, start + skipped + sum(map(len, lines))
        return [], self._sent

    def mark_sent(self, place: int) -> None:
        """Note that all up to a place is sent, and delete what lies before it.

        Raises:
            CheckpointError: the disk is full. It is noted in memory all the same.
        """
        self._sent = place
        for start, following in pairwise(self._starts()):
            if following <= place:
                self._file(start).unlink(missing_ok=True)
        write_whole(self._folder / SENT, str(place))

    def catch_up(self) -> None:
        """Leave out what another outbox of the folder, no longer read, has sent."""
        self._sent = max(self._sent, self._noted())

    def close(self) -> None:
        """Append no more."""
        with self._lock:
            self._opened.close()

    def _noted(self) -> int:
        with suppress(FileNotFoundError):
            return int((self._folder / SENT).read_text())
        return 0

    def _starts(self) -> Sequence[int]:
        return sorted(
            int(file.stem) for file in (self._folder / OUTBOX).glob("*.jsonl")
        )

    def _file(self, start: int) -> Path:
        return self._folder / OUTBOX / f"{start:015d}.jsonl"


def _lines(file: Path, start: int, end: int) -> list[bytes]:
    """Whole lines between two places of a file, see `Outbox.read`."""
    lines: list[bytes] = []
    place = start
    with file.open("rb") as opened:
        opened.seek(start)
        for line in opened:
            place += len(line)
            if place > end or not line.endswith(b"\n"):
                break
            if lines and place - start > MAX_BATCH_BYTES:
                break
            lines.append(line)
    return lines


def _cut_to_lines(file: Path) -> int:
    """Cut off a last line without an end, which a kill left; the bytes that stay."""
    if not file.exists():
        return 0
    whole = place = 0
    with file.open("rb+") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            last = chunk.rfind(b"\n")
            if last >= 0:
                whole = place + last + 1
            place += len(chunk)
        opened.truncate(whole)
    return whole
