"""Ready means proved by what runs now; what Serve says of the rest is told in one sentence."""

import asyncio
import json
from dataclasses import asdict

from services.errors import ApiError
from services.model_status import ApplicationState, DeploymentState, ServeStates, read_application
from services.readiness import Readiness
from tests.services.harness import wait_until


class Proof:
    def __init__(self) -> None:
        self.num_runs = 0
        self.error: Exception | None = None
        self.dependencies: tuple[str, ...] | None = ("r1",)
        self.readiness = Readiness(lambda: self.dependencies, self._run)

    async def _run(self) -> None:
        self.num_runs += 1
        if self.error:
            raise self.error


async def test_one_proof_lasts_until_a_dependency_changes() -> None:
    proof = Proof()
    assert not proof.readiness.is_ready
    proof.readiness.start()
    await wait_until(lambda: proof.readiness.is_ready)
    assert proof.num_runs == 1
    proof.dependencies = ("r2",)
    assert not proof.readiness.is_ready
    await wait_until(lambda: proof.readiness.is_ready)
    assert proof.num_runs == 2
    proof.dependencies = None
    assert not proof.readiness.is_ready
    await proof.readiness.stop()


async def test_a_failed_proof_says_why_and_is_tried_again() -> None:
    proof = Proof()
    proof.error = ApiError(503, "service_unavailable", "engine_busy", "All slots are taken.")
    proof.readiness.start()
    await wait_until(lambda: proof.num_runs == 1)
    await asyncio.sleep(0)
    assert proof.readiness.last_failure == "All slots are taken."
    proof.error = None
    await wait_until(lambda: proof.readiness.is_ready)
    await proof.readiness.stop()


PENDING = DeploymentState("ModelServer", "UPDATING", "It needs 4 CPUs, 2 are there.", {"STARTING": 1})


async def test_configured_models_are_the_applications_of_models() -> None:
    known = {name: ApplicationState(name, "RUNNING") for name in ("llm-tiny", "llm-a.b", "store", "platform")}
    states = ServeStates(lambda: known)
    await states.refresh()
    assert states.configured_models() == ["a.b", "tiny"]


async def test_a_model_that_waits_is_explained_with_serves_words() -> None:
    states = ServeStates(lambda: {"llm-big": ApplicationState("llm-big", "DEPLOYING", "", (PENDING,))})
    await states.refresh()
    assert states.why_not_ready("big") == (
        "The model 'big' is not ready: its application 'llm-big' is DEPLOYING. "
        "Ray Serve says: It needs 4 CPUs, 2 are there."
    )
    assert "does not know it yet" in states.why_not_ready("other")


def test_what_serve_says_of_a_model_that_scales_to_zero_can_be_told_as_json() -> None:
    """Shaped as Serve's `ServeInstanceDetails`."""

    def details(**deployment_config: object) -> dict[str, object]:
        replicas = [{"state": "RUNNING"}, {"state": "RUNNING"}, {"state": "STARTING"}]
        deployment = {"status": "HEALTHY", "message": "", "replicas": replicas, "deployment_config": deployment_config}
        return {"status": "RUNNING", "message": "", "deployments": {"ModelServer": deployment}}

    state = read_application("llm-tiny", details(autoscaling_config={"min_replicas": 0}))
    assert state.starts_on_demand
    assert json.loads(json.dumps(asdict(state)))["deployments"][0]["replicas"] == {"RUNNING": 2, "STARTING": 1}
    assert not read_application("llm-tiny", details(autoscaling_config={"min_replicas": 1})).starts_on_demand
    assert not read_application("llm-tiny", details(num_replicas=0)).starts_on_demand
    failed = details(autoscaling_config={"min_replicas": 0}) | {"status": "DEPLOY_FAILED"}
    assert not read_application("llm-tiny", failed).starts_on_demand


async def test_when_serve_does_not_answer_the_last_state_stays() -> None:
    answers = iter([{"llm-tiny": ApplicationState("llm-tiny", "RUNNING")}])

    def read() -> dict[str, ApplicationState]:
        try:
            return next(answers)
        except StopIteration:
            raise ConnectionError("the controller restarts") from None

    states = ServeStates(read)
    await states.refresh()
    await states.refresh()
    assert states.configured_models() == ["tiny"]


async def test_an_application_that_served_is_changing_while_serve_deploys_its_next_version() -> None:
    running = DeploymentState("Store", "HEALTHY", "", {"RUNNING": 1})
    told: list[ApplicationState] = []
    states = ServeStates(lambda: {"store": told[-1]})

    async def is_changing(status: str, deployment: DeploymentState) -> bool:
        told.append(ApplicationState("store", status, "", (deployment,)))
        await states.refresh()
        return states.is_changing("store")

    assert not states.is_changing("store")
    assert not await is_changing("DEPLOYING", PENDING), "it starts for the first time"
    assert not await is_changing("RUNNING", running)
    assert await is_changing("DEPLOYING", PENDING)
    assert not await is_changing("UNHEALTHY", PENDING), "it has crashed"
    assert not await is_changing("DEPLOYING", running), "the old one still serves"


async def test_what_has_just_answered_runs_whatever_serve_said_before() -> None:
    """After a crash the one request that waited for the next replica is answered before Serve is asked again."""
    told = [ApplicationState("embed", "UNHEALTHY", "", (PENDING,))]
    states = ServeStates(lambda: {"embed": told[-1]})
    await states.refresh()
    assert not states.has_running_replica("embed")
    states.note_answer("embed")
    assert states.has_running_replica("embed")
    await states.refresh()
    assert not states.has_running_replica("embed"), "what Serve says later is newer"
    assert not states.has_running_replica("unknown")


def test_an_old_replica_that_still_runs_beside_a_new_one_counts() -> None:
    both = DeploymentState("Store", "UPDATING", "", {"RUNNING": 1, "STARTING": 1})
    assert ApplicationState("store", "DEPLOYING", "", (both,)).has_running_replica
    assert not ApplicationState("store", "DEPLOYING", "", (PENDING,)).has_running_replica
