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


def test_internal_ports_are_on_loopback_unless_the_environment_names_an_address() -> None:
    assert read_environment(GIVEN).internal_host == "127.0.0.1"
    opened = {**GIVEN, "WINDFARM_INTERNAL_HOST": "10.0.0.7", "WINDFARM_INTERNAL_SECRET": 32 * "s"}
    assert read_environment(opened).internal_host == "10.0.0.7"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "node-1", "10.0.0.7:80"])
def test_an_internal_address_that_others_cannot_connect_to_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=f"WINDFARM_INTERNAL_HOST={host}"):
        read_environment({**GIVEN, "WINDFARM_INTERNAL_HOST": host, "WINDFARM_INTERNAL_SECRET": 32 * "s"})


def test_internal_ports_are_not_opened_to_the_network_with_a_short_secret() -> None:
    with pytest.raises(ConfigError, match="shorter than 32 characters"):
        read_environment({**GIVEN, "WINDFARM_INTERNAL_HOST": "10.0.0.7"})
    assert read_environment({**GIVEN, "WINDFARM_INTERNAL_HOST": "127.0.0.2"}).internal_host == "127.0.0.2"


def test_the_page_may_find_the_endpoint_elsewhere() -> None:
    environment = read_environment({**GIVEN, "WINDFARM_PUBLIC_URL": "http://windfarm:8000/"})
    assert public_url(ListenConfig(port=8000), environment) == "http://windfarm:8000"


@pytest.mark.parametrize("name", ["WINDFARM_PUBLIC_URL", "WINDFARM_QDRANT_URL"])
def test_what_is_no_url_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=qdrant:6333 is no URL"):
        read_environment({**GIVEN, name: "qdrant:6333"})
