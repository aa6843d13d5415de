"""Every error that this package raises on purpose.

ARPOError
├── ConfigError        a setting, flag or model folder that cannot work
├── DataError          a row or file that is wrong: names file, row and field
│   └── RowError           ... a row, with its place as attributes
├── CheckpointError    a checkpoint or file cannot be written, or is not whole
├── LearnerError       a learner died
├── DivergenceError    gradients stay infinite or NaN
├── EngineError        text generation failed
│   └── WeightSyncError    the sampler does not hold the learner's weights
├── ToolError          a tool call failed; shown to the model, never fatal
│   └── ToolTimeoutError   ... because its deadline passed
├── ToolOutageError    so many tool calls fail that training must stop
└── RewardError        a reward function raised or returned nonsense
"""


class ARPOError(Exception):
    """Base of all errors raised by `rllib_arpo`."""


class ConfigError(ARPOError, ValueError):
    """A setting, flag or model folder cannot work; the message names the cure."""


class DataError(ARPOError, ValueError):
    """A row or file is wrong; the message names file, row and field."""


class RowError(DataError):
    """A row is wrong.

    Args:
        file: as its reader named it.
        row: from 0.
        field: dotted; empty when the row as a whole is meant.
        problem: what is wrong with it.
    """

    def __init__(self, file: str, row: int, field: str, problem: str) -> None:
        super().__init__(file, row, field, problem)
        self.file = file
        self.row = row
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        place = f"{self.file}, row {self.row}"
        return (
            f"{place}, `{self.field}`: {self.problem}"
            if self.field
            else (f"{place}: {self.problem}")
        )


class CheckpointError(ARPOError, RuntimeError):
    """A checkpoint or file cannot be written, or is not whole; names the place."""


class LearnerError(ARPOError, RuntimeError):
    """A learner died; training can go on from the last checkpoint."""


class DivergenceError(ARPOError, RuntimeError):
    """Too many optimizer steps in a row had a gradient that is not finite."""


class EngineError(ARPOError, RuntimeError):
    """Text generation failed."""


class WeightSyncError(EngineError):
    """The sampler does not hold the weights that the learner sent."""


class ToolError(ARPOError, RuntimeError):
    """A tool call failed. The environment turns it into an observation.

    Args:
        message: one line that the model reads.
        retryable: whether the same call may succeed if made again.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


class ToolTimeoutError(ToolError):
    """A tool call ran past its deadline."""


class ToolOutageError(ARPOError, RuntimeError):
    """Too large a share of an iteration's tool calls failed."""


class RewardError(ARPOError, RuntimeError):
    """A reward function raised, or returned something that is not a number."""
