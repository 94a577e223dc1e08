"""What comes from the machine is read in one place, and a wrong value is an error with the variable's name."""

from pathlib import Path

import pytest

from services.config import ListenConfig
from services.environment import data_folder, database_url, public_url, read_environment, url_of
from services.setup_errors import ConfigError

GIVEN = {"WINDFARM_HOME": "/data", "WINDFARM_INTERNAL_SECRET": "s"}


def test_the_data_folder_is_below_the_users_data_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WINDFARM_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/users/data")
    assert data_folder() == Path("/users/data/windfarm")


def test_the_database_is_a_file_in_the_data_folder_unless_a_url_is_given() -> None:
    assert database_url(GIVEN) == "sqlite:////data/windfarm.db"
    assert database_url({**GIVEN, "WINDFARM_DATABASE_URL": "postgresql://host/db"}) == "postgresql://host/db"


def test_without_a_secret_nothing_starts() -> None:
    with pytest.raises(ConfigError, match="WINDFARM_INTERNAL_SECRET is not set"):
        read_environment({"WINDFARM_HOME": "/data"})


@pytest.mark.parametrize(
    ("name", "value"), [("WINDFARM_PORT", "0"), ("WINDFARM_PORT", "http"), ("WINDFARM_THREADS", "-1")]
)
def test_a_wrong_number_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        read_environment({**GIVEN, name: value})


def test_the_environment_wins_over_the_file() -> None:
    environment = read_environment({**GIVEN, "WINDFARM_PORT": "9000", "WINDFARM_HOST": "0.0.0.0"})
    assert public_url(ListenConfig(port=8000), environment) == "http://127.0.0.1:9000"


def test_the_file_counts_where_the_environment_says_nothing() -> None:
    assert public_url(ListenConfig(port=8123), read_environment(GIVEN)) == "http://127.0.0.1:8123"


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert url_of("::1", 8000) == "http://[::1]:8000"
