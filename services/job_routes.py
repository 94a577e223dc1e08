"""Routes of jobs: list, look at, pause, resume, cancel. The store does the work; here it is addressed."""

from __future__ import annotations

from typing import Any

from services.calls import Calls
from services.errors import invalid
from services.job_list import MAX_LISTED
from services.routing import Answer, Call, Handler, Route, json_answer, list_answer

_ACTIONS = ("pause", "resume", "cancel")


class JobRoutes:
    def __init__(self, store: Calls) -> None:
        self._store = store

    def routes(self) -> list[Route]:
        of_collection = "/v1/collections/{name}/jobs"
        return [
            Route("GET", "/v1/jobs", self.find),
            Route("GET", "/v1/jobs/{id}", self.get),
            Route("GET", of_collection, self.list_of_collection),
            *(Route("POST", f"/v1/jobs/{{id}}/{action}", self._change_one(action)) for action in _ACTIONS),
            *(Route("POST", f"{of_collection}/{action}", self._change_all(action)) for action in _ACTIONS),
        ]

    async def find(self, call: Call) -> Answer:
        """Jobs of all collections that the actor may change, the newest first, and a summary of all of them.
        `?collection=`, `?batch=` and `?state=` (several, with commas) choose; `?limit=` bounds the list."""
        unknown = call.query.keys() - {"collection", "batch", "state", "limit"}
        if unknown:
            raise invalid(
                f"'{min(unknown)}' is not known here. Known are: batch, collection, limit, state.",
                param=min(unknown),
                code="unknown_parameter",
            )
        states = [state for state in call.query.get("state", "").split(",") if state]
        found = await self._store.call(
            "find_jobs",
            call.actor.user_id,
            collection=call.query.get("collection"),
            batch=call.query.get("batch"),
            states=states,
            limit=_limit(call),
        )
        return json_answer(found)

    async def get(self, call: Call) -> Answer:
        return json_answer(await self._store.call("job", call.parameters["id"], call.actor.user_id))

    async def list_of_collection(self, call: Call) -> Answer:
        return list_answer(await self._store.call("jobs", call.parameters["name"], call.actor.user_id))

    def _change_one(self, action: str) -> Handler:
        async def change(call: Call) -> Answer:
            job = await self._store.call("change_job", call.parameters["id"], action, call.actor.user_id)
            return json_answer(job)

        return change

    def _change_all(self, action: str) -> Handler:
        async def change(call: Call) -> Answer:
            """With `?batch=` only the jobs of that batch."""
            name, batch = call.parameters["name"], call.query.get("batch")
            num_jobs = await self._store.call("change_jobs", name, batch, action, call.actor.user_id)
            answer: dict[str, Any] = {"object": "jobs.changed", "action": action, "collection": name, "batch": batch}
            return json_answer(answer | {"num_jobs": num_jobs})

        return change


def _limit(call: Call) -> int:
    text = call.query.get("limit", "100")
    if not (text.isascii() and text.isdecimal() and int(text) <= MAX_LISTED):
        raise invalid(f"'limit' is '{text}', but a number from 0 to {MAX_LISTED} is expected.", param="limit")
    return int(text)
