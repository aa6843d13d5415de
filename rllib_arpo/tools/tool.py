"""What a tool is: an async call from text to text, and a fork of its state."""

from typing import Protocol, Self, runtime_checkable


@runtime_checkable
class Tool(Protocol):
    """A tool in the hands of one trajectory.

    A tool with state (variables, a session) keeps it between calls of the same
    object; `fork` gives a branch its own copy. A stateless tool returns itself.

    Attributes:
        name: the tag that calls it, `<name>...</name>`.
        description: one or two sentences that the model may read.
    """

    name: str
    description: str

    async def call(self, arguments: str) -> str:
        """Run once and return what the model will read.

        The environment enforces the deadline, the retries and the token cap.

        Raises:
            ToolError: the call failed; the message becomes the observation.
        """
        ...

    def fork(self) -> Self:
        """A copy that shares no state with this one; must be cheap."""
        ...
