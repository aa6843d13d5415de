"""A password in the address of a store is shown to nobody."""

import logging
import logging.handlers
import queue
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rllib_arpo.errors import ConfigError
from rllib_arpo.tracking import mlflow_buffer
from rllib_arpo.tracking.mlflow import MLflowCallback
from rllib_arpo.tracking.mlflow_buffer import Buffer, RunSpec
from rllib_arpo.tracking.mlflow_facts import parameters
from rllib_arpo.tracking.mlflow_store import without_passwords
from rllib_arpo.tracking.registry import register_model
from tests.mlflow_server import MLFLOWS_WARNINGS
from tests.models import save_tiny_model
from tests.tiny_runs import arpo_config

LIMIT_S = 120
# Nothing listens on port 1.
URI = "http://me:secret@127.0.0.1:1"
pytestmark = MLFLOWS_WARNINGS


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("postgresql://me:pw@host/db", "postgresql://me:***@host/db"),
        (
            "postgresql+psycopg2://me:p/w#@host/db",
            "postgresql+psycopg2://me:***@host/db",
        ),
        ("mysql://me:p@w@host:3306/db", "mysql://me:***@host:3306/db"),
        ("https://:pw@host", "https://:***@host"),
        ("postgresql://host/db?user=me&password=pw", None),
        (f"API request to {URI}/api failed", None),
        *(
            (uri, uri)
            for uri in (
                "http://127.0.0.1:5000",
                "https://me@host:5000/x",
                "sqlite:////home/me/a:b@c.db",
                "databricks://profile",
                "models:/almanac@champion",
            )
        ),
    ],
)
def test_the_password_alone_is_hidden(said, shown) -> None:
    if shown is None:
        shown = said.replace("=pw", "=***").replace("secret", "***")
    assert without_passwords(said) == shown


def test_warnings_of_a_store_that_is_away_hide_it_and_only_the_owner_can_read_it(
    tmp_path,
) -> None:
    said: queue.Queue[logging.LogRecord] = queue.Queue()
    handler = logging.handlers.QueueHandler(said)
    logging.getLogger(mlflow_buffer.__name__).addHandler(handler)
    try:
        buffer = Buffer(tmp_path, RunSpec(uri=URI))
        buffer.tags({"a": "b"})
        warned = [said.get(timeout=LIMIT_S)]
        assert not buffer.close(0.0)
        while "waits in" not in warned[-1].getMessage():
            warned.append(said.get(timeout=LIMIT_S))
    finally:
        logging.getLogger(mlflow_buffer.__name__).removeHandler(handler)
    for record in warned:
        assert "http://me:***@127.0.0.1:1" in record.getMessage()
        assert "secret" not in record.getMessage()
    file = tmp_path / "run.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert URI in file.read_text()
    again = Buffer(tmp_path)
    assert again.spec.uri == URI
    assert not again.close(0.0)


def test_an_error_of_the_registry_hides_it(tmp_path) -> None:
    model = save_tiny_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="cannot be registered") as raised:
        register_model(model, "tiny", uri=URI)
    assert "secret" not in str(raised.value)


def test_a_runs_parameters_do_not_hold_the_address(almanac_model: str) -> None:
    callback: Any = partial(MLflowCallback, folder=Path("x"), uri=URI)
    config = arpo_config(almanac_model).callbacks([callback])
    assert "lr" in parameters(config)
    assert "secret" not in str(parameters(config))
