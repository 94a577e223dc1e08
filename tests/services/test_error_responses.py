"""Errors keep what clients need on their way through processes, and tell nothing internal."""

import pickle

import pytest
from ray.exceptions import RayTaskError
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError

from cluster.errors import ContextTooLong, EngineBusy, EngineDead, EngineFailed
from rag.errors import ParseError, StoreLocked
from services.error_responses import error_body, error_event, error_headers, is_expected, to_api_error
from services.errors import ApiError, unavailable


def test_an_api_error_keeps_its_fields_through_pickling() -> None:
    error = pickle.loads(pickle.dumps(ApiError(409, "conflict_error", "taken", "It is taken.", "name", 3)))
    assert (error.status, error.type, error.code, error.message, error.param, error.retry_after_s) == (
        409,
        "conflict_error",
        "taken",
        "It is taken.",
        "name",
        3,
    )
    assert str(error) == "It is taken."


def test_an_api_error_from_another_process_is_found_inside_rays_wrapper() -> None:
    cause = ApiError(404, "not_found_error", "unknown_collection", "No such collection.")
    wrapped = RayTaskError("search", "traceback", cause).as_instanceof_cause()
    found = to_api_error(wrapped)
    assert (found.status, found.code, found.message) == (404, "unknown_collection", "No such collection.")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextTooLong("too long"), 400, "context_length_exceeded"),
        (EngineBusy("busy"), 503, "engine_busy"),
        (EngineDead("dead"), 503, "engine_dead"),
        (EngineFailed("failed"), 500, "generation_failed"),
        (ParseError("encrypted", code="encrypted"), 422, "encrypted"),
        (StoreLocked("locked"), 503, "store_unavailable"),
    ],
)
def test_errors_of_the_other_folders_get_a_status_and_a_stable_code(error: Exception, status: int, code: str) -> None:
    found = to_api_error(error)
    assert (found.status, found.code, found.message) == (status, code, str(error))
    assert is_expected(error)


def test_busy_engines_say_when_to_come_back() -> None:
    assert error_headers(to_api_error(EngineBusy("busy"))) == {"retry-after": "1"}
    assert error_headers(unavailable("starting", code="starting", retry_after_s=5)) == {"retry-after": "5"}


def test_a_bug_of_ours_shows_the_request_id_and_nothing_internal() -> None:
    error = KeyError("/secret/path")
    found = to_api_error(error, "req_1")
    assert found.status == 500
    assert "req_1" in found.message
    assert "secret" not in found.message
    assert not is_expected(error)


def test_a_database_error_does_not_show_its_statement() -> None:
    error = OperationalError("SELECT * FROM users WHERE name='x'", {}, Exception("database or disk is full"))
    found = to_api_error(error)
    assert (found.status, found.code) == (503, "database_unavailable")
    assert "disk is full" in found.message
    assert "SELECT" not in found.message


def test_a_damaged_database_is_told_and_a_wrong_statement_is_a_bug() -> None:
    damaged = DatabaseError("SELECT", {}, Exception("database disk image is malformed"))
    assert (to_api_error(damaged).status, to_api_error(damaged).code) == (503, "database_unavailable")
    assert to_api_error(IntegrityError("INSERT", {}, Exception("UNIQUE"))).code == "internal_error"


def test_a_provider_that_says_when_to_come_back_is_repeated() -> None:
    assert error_headers(to_api_error(EngineBusy("busy", retry_after_s=7))) == {"retry-after": "7"}


def test_errors_have_openais_shape_in_bodies_and_streams() -> None:
    error = ApiError(400, "invalid_request_error", "invalid_value", "Größe fehlt.", "size")
    assert error_body(error) == {
        "error": {
            "message": "Größe fehlt.",
            "type": "invalid_request_error",
            "param": "size",
            "code": "invalid_value",
        }
    }
    assert error_event(error).startswith(b'data: {"error": {"message": "Gr')
    assert error_event(error).endswith(b"}}\n\n")
