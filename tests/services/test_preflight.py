"""What the machine lacks is said before anything starts: what is needed, what is there, what to do."""

import re
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

from cluster.engines.choice import Hardware
from cluster.home import open_home
from services import resources, supervisor
from services.preflight import (
    Demand,
    Machine,
    check_disk,
    check_models,
    check_port,
    check_resources,
    demands,
    explain,
    read_machine,
)
from services.ray_config import RayConfig, load_ray_config, parse_ray_config
from services.resources import GIB, MIB, Resources
from services.setup_errors import StartRefused
from services.up_options import UpOptions

FILE = Path(__file__).resolve().parents[2] / "ray_config.yaml"
LAPTOP = Machine(num_cpus=2, num_gpus=0, total_memory=8 * GIB, free_memory=6 * GIB)


def demand(replicas: int = 1, *, cpus: float = 0.5, memory: int = GIB, gpus: float = 0.0) -> list[Demand]:
    return [Demand("llm-tiny", "ModelServer", replicas, Resources(cpus, memory, gpus))]


def failed(wanted: list[Demand], machine: Machine = LAPTOP) -> str:
    return explain(check_resources(wanted, machine))


def test_what_fits_is_no_finding() -> None:
    assert failed(demand()) == ""


def test_too_few_cpus_says_needed_and_there() -> None:
    text = failed(demand(6))
    assert "cpu: 3 CPUs are asked for (llm-tiny/ModelServer 3), the machine has 2" in text


def test_too_little_memory_says_needed_and_there() -> None:
    text = failed(demand(memory=7 * GIB))
    assert "memory: 8.0 GiB are asked for" in text
    assert "6.0 of 8.0 GiB are free" in text


def test_a_missing_gpu_is_said() -> None:
    assert "1 GPUs are asked for, the machine has 0" in failed(demand(gpus=1))


@pytest.mark.parametrize(
    ("scaling", "replicas"),
    [("min_replicas: 0", 1), ("min_replicas: 2", 2), ("min_replicas: 1, initial_replicas: 3", 3)],
)
def test_a_scaled_model_needs_room_for_its_first_replicas(scaling: str, replicas: int, tmp_path: Path) -> None:
    policy = "policy: {policy_function: 'services.scaling:ScaleByNeed'}"
    text = FILE.read_text(encoding="utf-8").replace(
        "num_replicas: 1             # copies of the model (",
        f"autoscaling_config: {{{scaling}, max_replicas: 4, {policy}}} # (",
    )
    wanted = demands(parse_ray_config(text, FILE), tmp_path)
    assert [each.replicas for each in wanted if each.deployment == "ModelServer"] == [replicas]


def test_a_taken_port_is_said_with_a_free_one() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        finding = check_port(("127.0.0.1", other.getsockname()[1]))
    assert not finding.is_ok
    assert "windfarm up --port" in finding.fix


def test_disk_is_looked_at_where_the_folder_will_be(tmp_path: Path) -> None:
    assert check_disk(tmp_path / "not" / "yet").is_ok


def test_too_little_disk_says_needed_and_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100 * MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    finding = check_disk(tmp_path)
    assert not finding.is_ok
    assert "0.1 GiB are free" in finding.text
    assert "0.5 GiB are needed" in finding.text


def test_how_the_embedding_model_will_run_is_said_with_the_reason(tmp_path: Path) -> None:
    text = FILE.read_text(encoding="utf-8").replace("source: embed ", "source: embet ")
    *_, good = check_models(load_ray_config(FILE), tmp_path)
    assert good.is_ok
    assert re.match(r"embed, runs as llamacpp.*: the processor", good.text)
    *_, bad = check_models(parse_ray_config(text, FILE), tmp_path)
    assert not bad.is_ok
    assert "Did you mean 'embed'?" in bad.text


def with_actor_options(application: str, options: str) -> RayConfig:
    """The default file with `ray_actor_options` for the first deployment of this application."""
    text = FILE.read_text(encoding="utf-8")
    at = text.index("      - name:", text.index(f"- name: {application}"))
    end = text.index("\n", at) + 1
    return parse_ray_config(f"{text[:end]}        ray_actor_options: {options}\n{text[end:]}", FILE)


def test_a_model_on_a_gpu_whose_own_amounts_name_no_gpu_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would start a second replica on the same card."""
    monkeypatch.setattr(resources, "detect_hardware", lambda: Hardware(has_gpu=True, has_vllm=True))
    without, named, none = (
        next(iter(check_models(with_actor_options("llm-tiny", f"{{num_cpus: 1, memory: 8.0e+9{more}}}"), tmp_path)))
        for more in ("", ", num_gpus: 0.5", ", num_gpus: 0")
    )
    assert not without.is_ok
    assert "Add num_gpus: 1 there" in without.fix
    assert named.is_ok
    assert none.is_ok, "said explicitly"


def test_an_embedding_model_that_is_given_a_gpu_runs_there(tmp_path: Path) -> None:
    config = with_actor_options("embed", "{num_cpus: 1, memory: 4.0e+9, num_gpus: 0.2}")
    *_, finding = check_models(config, tmp_path)
    assert finding.is_ok
    assert "a GPU is there" in finding.text or not find_spec("torch")


def test_this_machine_has_cpus_and_memory() -> None:
    machine = read_machine()
    assert machine.num_cpus >= 1
    assert 0 < machine.free_memory <= machine.total_memory


def test_up_refuses_a_machine_that_is_too_small(tmp_path: Path) -> None:
    options = UpOptions(tmp_path, load_ray_config(FILE))
    with pytest.raises(StartRefused, match=r"memory: .* are asked for"):
        supervisor.refuse_unless_fit(options, Machine(1, 0, GIB, GIB))


def test_a_second_start_on_a_data_folder_is_refused(tmp_path: Path) -> None:
    home = open_home(tmp_path)
    lock = supervisor._lock(home)
    assert lock > 0
    with pytest.raises(StartRefused, match=r"runs on .* already"):
        supervisor._lock(home)
