"""One pass of a synchronisation: list, compare, send what is new or changed, delete what is gone.

Everything is idempotent: a pass that was interrupted anywhere is simply repeated. Whatever goes wrong with one file is
reported and stops no other; where the source itself cannot be listed, nothing is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.sync.connector import Connector, ConnectorError, Item, Skipped
from services.sync.plan import SyncPlan, make_plan

_AHEAD = 8
_POLL_S = 0.15
_FINAL = ("done", "failed", "cancelled")


class Client(Protocol):
    """What of windfarm's API a synchronisation needs."""

    def documents(self, collection: str) -> list[dict[str, Any]]: ...
    def upload(self, collection: str, content: Any, name: str, **about: str | None) -> dict[str, Any]: ...
    def job(self, job_id: str) -> dict[str, Any]: ...
    def delete_document(self, collection: str, document_id: str) -> None: ...


@dataclass(slots=True)
class SyncReport:
    """What a pass did. `problems`: files that could not be read or sent, with the reason; they are tried again."""

    new: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    num_unchanged: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    problems: list[Skipped] = field(default_factory=list)


Tell = Callable[[str, str, str], None]
"""Called with what became of a file: `added`, `changed`, `removed`, `failed`, its name, and the reason."""


class Synchronisation:
    def __init__(
        self,
        client: Client,
        connector: Connector,
        collection: str,
        *,
        failed_error: type[Exception],
        tell: Tell = lambda _state, _name, _reason: None,
    ) -> None:
        """`failed_error`: what the client raises for one request that failed and is no reason to stop."""
        self._client = client
        self._connector = connector
        self._collection = collection
        self._failed_error = failed_error
        self._tell = tell
        self._hopeless: dict[str, str | None] = {}
        """Name and hash of files that cannot be read: sent again only when they have changed."""

    def plan(self) -> tuple[SyncPlan, list[Skipped]]:
        """What a pass would do now, and what the source leaves out. Raises `ConnectorError`."""
        listing = self._connector.list_items()
        documents = self._client.documents(self._collection)
        return make_plan(listing.items, documents, self._connector.source), list(listing.skipped)

    def plan_for_nothing(self) -> tuple[SyncPlan, list[Skipped]]:
        """The same for a collection that is not there yet."""
        listing = self._connector.list_items()
        return make_plan(listing.items, [], self._connector.source), list(listing.skipped)

    def run_once(self, batch: str, *, may_empty: bool = False) -> SyncReport:
        """Raises `ConnectorError` where the source cannot be listed, or is empty and everything would be deleted."""
        plan, skipped = self.plan()
        if plan.removed and not (plan.new or plan.changed or plan.unchanged) and not may_empty:
            raise ConnectorError(
                f"{self._connector.source} is empty now, so all its {len(plan.removed)} documents would be deleted. "
                "Check that it is the right place and mounted; if it is meant so, add --allow-empty."
            )
        report = SyncReport(num_unchanged=len(plan.unchanged), skipped=[*skipped, *plan.conflicts])
        # Deletions first: a file that was renamed should not answer twice.
        for document in plan.removed:
            self._remove(document, report)
        new = {item.name for item in plan.new}
        for item, problem in self._send_all([*plan.new, *plan.changed], batch):
            state = "added" if item.name in new else "changed"
            if problem is None:
                (report.new if item.name in new else report.changed).append(item.name)
                self._tell(state, item.name, "")
            else:
                report.problems.append(Skipped(item.name, problem))
                self._tell("failed", item.name, problem)
        return report

    def _remove(self, document: Any, report: SyncReport) -> None:
        name = str(document["name"])
        try:
            self._client.delete_document(self._collection, str(document["id"]))
        except self._failed_error as error:
            report.problems.append(Skipped(name, str(error)))
            self._tell("failed", name, str(error))
            return
        report.removed.append(name)
        self._tell("removed", name, "")

    def _send_all(self, items: list[Item], batch: str) -> Iterator[tuple[Item, str | None]]:
        """Some are sent ahead, so that the server always has work. (item, why not) in the order of the items."""
        remaining = iter(item for item in items if not self._is_hopeless(item))
        waiting: list[tuple[Item, dict[str, Any] | str]] = []
        while True:
            while len(waiting) < _AHEAD and (item := next(remaining, None)) is not None:
                waiting.append((item, self._send(item, batch)))
            if not waiting:
                return
            item, sent = waiting.pop(0)
            yield item, sent if isinstance(sent, str) else self._outcome(item, sent)

    def _is_hopeless(self, item: Item) -> bool:
        mark = item.content_sha256 or (item.origin if item.origin_is_exact else None)
        return mark is not None and self._hopeless.get(item.name) == mark

    def _send(self, item: Item, batch: str) -> dict[str, Any] | str:
        try:
            content = self._connector.content(item)
            about = {"batch": batch, "source": self._connector.source, "origin": item.origin}
            about |= {"parse_as": content.parse_as} if content.parse_as else {}
            return self._client.upload(self._collection, content.data, item.name, **about)
        except (ConnectorError, OSError, self._failed_error) as error:
            return str(error)

    def _outcome(self, item: Item, job: dict[str, Any]) -> str | None:
        while job["state"] not in _FINAL:
            time.sleep(_POLL_S)
            job = self._client.job(job["id"])
        if job["state"] == "done":
            self._hopeless.pop(item.name, None)
            return None
        self._hopeless[item.name] = item.content_sha256 or (item.origin if item.origin_is_exact else None)
        return str((job.get("error") or {}).get("message") or f"The job was {job['state']}.")
