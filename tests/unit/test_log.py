"""One logger: on stderr by itself, and where a program configured logging, there and once."""

import logging
import sys

import pytest

from gemma_tuner.log import announce, logger


def test_what_is_said_goes_to_stderr(capsys):
    announce("cpu, because")
    logger.warning("%s is damaged", "it")
    printed = capsys.readouterr()
    assert printed.err == "gemma_tuner: cpu, because\ngemma_tuner: it is damaged\n"
    assert not printed.out


def test_a_program_that_logs_to_the_console_reads_it_once(capsys):
    handler = logging.StreamHandler(sys.stderr)
    logging.root.addHandler(handler)
    try:
        announce("said once")
    finally:
        logging.root.removeHandler(handler)
    assert capsys.readouterr().err == "said once\n"


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR])
def test_it_can_be_silenced(capsys, caplog, level):
    with caplog.at_level(level, "gemma_tuner"):
        announce("nobody hears this")
    assert capsys.readouterr().err == ""


def test_a_terminal_that_is_gone_costs_the_message_alone(monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    announce("nobody reads this")
