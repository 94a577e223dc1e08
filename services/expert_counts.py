"""Counts of a model's experts over all of its copies, as records and as the JSON of the public API.

The endpoint writes this JSON, the command line reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import LoadError
from cluster.expert_load import ExpertLoad, sum_loads


@dataclass(frozen=True, slots=True)
class Silence:
    """A replica that gave no counts, and why."""

    replica_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class GangCounts:
    """One copy of the model: the ranks of a gang, or one replica that holds it whole."""

    name: str
    replica_ids: tuple[str, ...]
    load: ExpertLoad


@dataclass(frozen=True, slots=True)
class ModelExperts:
    """Counts of all copies of one model. No `gangs`: it has no experts, or nobody could tell (`has_experts` is `None`
    then, and `silent` says why)."""

    model: str
    has_experts: bool | None
    checkpoint: str = ""
    gangs: tuple[GangCounts, ...] = ()
    silent: tuple[Silence, ...] = ()

    @property
    def total(self) -> ExpertLoad:
        """All copies together, with the placement of the first one."""
        first = self.gangs[0].load
        loads = [
            replace(gang.load, rank_of=first.rank_of, num_ranks=first.num_ranks, is_balanced=first.is_balanced)
            for gang in self.gangs
        ]
        return sum_loads(loads)

    def minus(self, earlier: ModelExperts) -> ModelExperts:
        """What came after an earlier reading; copies that were not there then count whole."""
        before = {gang.name: gang.load for gang in earlier.gangs}
        gangs = [
            replace(gang, load=gang.load.minus(before[gang.name])) if gang.name in before else gang
            for gang in self.gangs
        ]
        return replace(self, gangs=tuple(gangs))


def experts_json(experts: ModelExperts) -> dict[str, Any]:
    """`tokens`, `shares` are [layer][expert], `pairs` [layer][expert][expert], `rank_tokens` [layer][rank]; each gang
    has its own counts, the first ones are of all gangs together. Where vLLM moves experts between ranks
    (`is_balanced`), `rank_tokens` and `imbalance` are empty and `mean_imbalance` is null."""
    answer: dict[str, Any] = {"model": experts.model, "has_experts": experts.has_experts}
    missing = [{"replica": silence.replica_id, "reason": silence.reason} for silence in experts.silent]
    if experts.has_experts is False:
        return answer | {"reason": f"The model '{experts.model}' is dense: it has no experts."}
    if not experts.gangs:
        return answer | {"reason": experts.silent[0].reason, "missing": missing}
    total = experts.total
    return answer | {
        "checkpoint": experts.checkpoint,
        "since": total.since,
        "until": total.until,
        "num_layers": total.num_layers,
        "num_experts": total.num_experts,
        "experts_per_token": total.experts_per_token,
        "num_tokens": total.num_tokens,
        "tokens": total.tokens.tolist(),
        "shares": [[round(share, 6) for share in layer] for layer in total.shares().tolist()],
        "pairs": total.pairs.tolist(),
        "gangs": [_gang_json(gang) for gang in experts.gangs],
        "missing": missing,
    }


def _gang_json(gang: GangCounts) -> dict[str, Any]:
    imbalance = gang.load.imbalance()
    return {
        **gang.load.to_json(),
        "gang": gang.name,
        "replicas": list(gang.replica_ids),
        "rank_tokens": gang.load.rank_tokens().tolist(),
        "imbalance": [round(value, 6) for value in imbalance.tolist()],
        "mean_imbalance": round(float(imbalance.mean()), 6) if len(imbalance) else None,
    }


def experts_from_json(answer: Mapping[str, Any]) -> ModelExperts:
    """Reads `experts_json` back. Raises `LoadError`."""
    try:
        return ModelExperts(
            model=str(answer["model"]),
            has_experts=answer["has_experts"],
            checkpoint=str(answer.get("checkpoint", "")),
            gangs=tuple(
                GangCounts(str(gang["gang"]), tuple(gang["replicas"]), ExpertLoad.from_json(gang))
                for gang in answer.get("gangs", ())
            ),
            silent=tuple(Silence(str(entry["replica"]), str(entry["reason"])) for entry in answer.get("missing", ())),
        )
    except (KeyError, TypeError) as error:
        raise LoadError(f"The endpoint's counts of experts cannot be read ({error!r}).") from error
