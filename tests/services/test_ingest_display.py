"""What `windfarm ingest` shows while it works: bars on a terminal, one line per file elsewhere."""

import re

import pytest

from services.cli.ingest_display import IngestDisplay

SUMMARY = {"num_bytes": 300, "seconds_left": 10.0, "tokens_per_s": 1234.4, "files_per_s": 2.5}


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")  # a bar is as long as it is full; with colours it only changes its colour
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """Standard error without colours and movements of the cursor; nothing may be on standard output."""
    out, err = capsys.readouterr()
    assert out == ""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)


def test_a_terminal_shows_the_file_its_state_and_what_it_waits_for(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with IngestDisplay(2, 400) as display:
        assert display.is_shown
        display.progress("handbook.pdf", "embedding", 0.25, "memory")
    text = shown(capsys)
    assert "handbook.pdf embedding" in text
    assert "waiting: memory" in text


def test_a_terminal_shows_files_speed_and_the_time_left_for_files_that_were_not_sent_yet_too(
    terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with IngestDisplay(4, 400) as display:
        display.finished("one.txt", "added", "", 100)
        display.speed(SUMMARY)  # 200 of the 300 bytes that were sent take 10 s, so the 300 that are left take 15 s
    text = shown(capsys)
    assert "added      one.txt" in text
    assert "1/4, 1234 tokens/s, 2.5 files/s, 0:15 left" in text


def test_the_bar_follows_the_bytes_of_finished_files(terminal: None, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = []
    for num_bytes in (100, 300, 398):
        with IngestDisplay(2, 398) as display:
            display.finished("one.txt", "added", "", num_bytes)
            display.finished("two.txt", "failed", "damaged")
        (*_, line) = (line for line in shown(capsys).splitlines() if "all files" in line)
        assert "2/2" in line
        lengths.append(line.count("━") / 40)
    assert lengths == pytest.approx([102 / 400, 302 / 400, 1], abs=1 / 40)


def test_elsewhere_there_is_one_line_for_each_file_with_the_reason_of_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with IngestDisplay(2, 10) as display:
        assert not display.is_shown
        display.progress("one.txt", "embedding", 0.5)
        display.speed(SUMMARY)
        display.finished("one.txt", "added", "", 10)
        display.finished("[two].pdf", "failed", "it is encrypted")
    assert shown(capsys) == "added      one.txt\nfailed     [two].pdf: it is encrypted\n"
