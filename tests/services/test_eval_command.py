"""`windfarm eval retrieval` as people and scripts call it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.home import Home, open_home
from cluster.weights.prepare import prepare
from services.cli import main
from services.cli.commands import app

DATA = Path(__file__).parents[1] / "data" / "multilingual-qa-mini"
CONFIG = Path(__file__).parents[2] / "ray_config.yaml"
WIDE = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


def test_help_names_settings_and_options() -> None:
    answer = CliRunner().invoke(app, ["eval", "retrieval", "--help"], env=WIDE)
    assert answer.exit_code == 0
    wanted = ("--config", "--against", "--home", "--json", "dense_weight", "chunk_tokens")
    assert [name for name in wanted if name not in answer.output] == []
    assert "retrieval" in CliRunner().invoke(app, ["eval", "--help"], env=WIDE).output


def start(*arguments: str, temporary: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "services.cli", "eval", "retrieval", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "windfarm: nowhere is not a folder. A test set has corpus.jsonl"),
        ([str(DATA)], "corpus.jsonl is missing. A test set has"),
        ([str(DATA / "en"), "--config", "fuson=rrf"], "There is no setting 'fuson'. Did you mean fusion?"),
        ([str(DATA / "en"), "--against", "fusion=best"], "fusion=best: input should be 'rrf', 'minmax' or 'dbsf'"),
        ([str(DATA / "en"), "--against", "fusion=dbsf"], "--config and --against say the same"),
        ([str(DATA / "en"), "--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    ],
)
def test_what_is_wrong_is_said_in_one_message(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("WINDFARM_CONFIG", raising=False)
    monkeypatch.setattr(sys, "argv", ["windfarm", "eval", "retrieval", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert message in said.err
    assert said.err.count("windfarm: ") == 1 and said.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "windfarm: nowhere is not a folder"),
        ([str(DATA / "en"), "--config", "fusion=rrf"], "single settings belong to `eval retrieval`"),
        ([str(DATA / "en"), "--model", "huge"], "There is no chat model 'huge' in the configuration. There are: "),
        ([str(DATA / "en"), "--limit", "5", "--skip", "5"], "--skip 5 leaves none of 5 questions"),
    ],
)
def test_answers_cannot_be_measured_so(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WINDFARM_CONFIG", raising=False)
    monkeypatch.setattr(sys, "argv", ["windfarm", "eval", "answers", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert message in said.err
    assert said.err.count("windfarm: ") == 1 and said.out == ""


def test_a_set_without_reference_answers_is_told_apart(
    small_set: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["windfarm", "eval", "answers", str(small_set)])
    with pytest.raises(SystemExit):
        main()
    assert "answers.jsonl cannot be read" in capsys.readouterr().err


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A data folder of its own, with the embedding model that is prepared already."""
    prepare("embed", "gguf", open_home())
    own = open_home(tmp_path / "home")
    own.models.rmdir()
    own.models.symlink_to(open_home().models)
    return own.root


@pytest.fixture
def small_set(tmp_path: Path) -> Path:
    """A few French paragraphs with their questions."""
    folder = tmp_path / "set"
    folder.mkdir()
    corpus = (DATA / "fr" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    known = {json.loads(line)["_id"] for line in corpus}
    pairs = [line.split("\t") for line in (DATA / "fr" / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    pairs = [pair for pair in pairs if pair[1] in known][:10]
    asked = {pair[0] for pair in pairs}
    queries = (DATA / "fr" / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    queries = [line for line in queries if json.loads(line)["_id"] in asked]
    (folder / "corpus.jsonl").write_text("\n".join(corpus), encoding="utf-8")
    (folder / "queries.jsonl").write_text("\n".join(queries), encoding="utf-8")
    (folder / "qrels.tsv").write_text("\n".join("\t".join(pair) for pair in pairs), encoding="utf-8")
    return folder


@pytest.mark.integration
def test_a_set_is_measured_with_the_real_model_and_nothing_else_running(
    small_set: Path, home: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start(
        str(small_set), "--home", str(home), "--config", "precision=gguf", "--json",
        "--against", "precision=gguf", "--against", "fusion=rrf", temporary=temporary,
    )  # fmt: skip
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    answer = json.loads(output)
    assert errors == "", "quiet with --json"
    assert answer["num_documents"] == 12 and answer["num_queries"] == 10
    assert answer["embedding_model"].startswith("intfloat/multilingual-e5-small@")
    for leg in ("dense", "fused"):
        assert answer[leg]["recall@100"] == 1.0, "the meaning leg gives each of a dozen paragraphs a rank"
        assert answer[leg]["ndcg@10"] > 0.7
    assert 0.5 < answer["sparse"]["recall@100"] <= 1.0
    assert 0 < answer["difference"]["fused"]["ndcg@10"]["p_value"] <= 1
    assert answer["against"]["config"]["fusion"] == "rrf"
    assert list(temporary.iterdir()) == []
    assert list(Home(home).qdrant.iterdir()) == [], "the user's vector store is not touched"
    assert not Home(home).database.exists()


@pytest.mark.integration
def test_answers_of_the_real_model_are_measured_with_nothing_else_running(
    small_set: Path, home: Path, tmp_path: Path
) -> None:
    (small_set / "answers.jsonl").write_text((DATA / "fr" / "answers.jsonl").read_text("utf-8"), "utf-8")
    prepare("tiny", "gguf", open_home())
    config = tmp_path / "gguf.yaml"
    config.write_text(CONFIG.read_text("utf-8").replace("precision: auto", "precision: gguf"), "utf-8")
    arguments = [str(small_set), "--home", str(home), "--far", str(DATA / "it"), "--limit", "3", "--max-tokens", "12"]
    arguments += ["--config", str(config)]
    ended = subprocess.run(
        [sys.executable, "-m", "services.cli", "eval", "answers", *arguments, "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    assert answer["num_questions"] == 3 and answer["refusals"]["num_far"] == 3
    assert answer["citations"]["num_spans_that_exist"] == answer["citations"]["num_spans"]
    assert 0 <= answer["refusals"]["wrong_refusals"] <= 1
    assert list(Home(home).qdrant.iterdir()) == []


@pytest.mark.integration
def test_an_end_from_outside_leaves_no_temporary_folder(home: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    process = start(str(DATA / "en"), "--home", str(home), "--config", "precision=gguf", temporary=temporary)
    try:
        deadline = time.monotonic() + 120
        while not list(temporary.glob("windfarm-eval-*/vectors/evaluation")):
            assert process.poll() is None and time.monotonic() < deadline, "indexing never began"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode not in (0, -signal.SIGKILL)
    assert "Traceback" not in errors and output == ""
    assert list(temporary.iterdir()) == []
