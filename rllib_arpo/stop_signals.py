"""SIGINT and SIGTERM during a training: the first asks it to end, the second ends it.

1. An iteration runs to its end: in the middle of an update no state is worth a save.
2. Who sends SIGTERM (Slurm, Kubernetes, a spot market) kills a little later. Where
   that is before the end of the iteration, the checkpoint before it is left.
3. A signal that was ignored, as in a script's background job, stays ignored.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2
SAID = (
    b"\nEnds after this iteration, with a checkpoint. A second Ctrl-C or SIGTERM ends "
    b"at once, without one.\n"
)


class Stopped(KeyboardInterrupt):
    """A signal ended a training.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """That of a process which the signal ended, as shells count."""
        return 128 + self.number


@dataclass(slots=True)
class StopRequest:
    """What was asked for so far.

    Attributes:
        number: of the last signal that came; None: none did.
    """

    number: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note the first signal, and interrupt at the second.

    It is to be entered when Ray runs, which sets a handler of its own. Outside of the
    main thread, which alone gets signals, nothing is ever asked for.

    Raises:
        Stopped: the second signal came, or something else interrupted.
    """
    request = StopRequest()

    def stop(number: int, _: object) -> None:
        is_second = request.number is not None
        request.number = number
        if is_second:
            raise KeyboardInterrupt
        # Not by `print`, which may be what the signal interrupted.
        with suppress(OSError):
            os.write(STDERR, SAID)

    is_main = threading.current_thread() is threading.main_thread()
    before = {one: signal.getsignal(one) for one in SIGNALS if is_main}
    heard = {one: h for one, h in before.items() if h is not signal.SIG_IGN}
    try:
        for one in heard:
            signal.signal(one, stop)
        yield request
    except Stopped:
        raise
    except KeyboardInterrupt:
        # Ray raises one of its own in place of what a handler raised.
        raise Stopped(request.number or signal.SIGINT) from None
    finally:
        for one, handler in heard.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
