"""Tools: what a model may call, each an async function from text to text."""
