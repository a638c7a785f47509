"""Run the script as a user would, but within the tests' process: in half a second instead of five."""

import contextlib
import gc
import io
import json
import runpy
import signal
import sys
from collections import namedtuple
from unittest import mock

import pytest
from conftest import ROOT, start

Shown = namedtuple("Shown", "status out err")


def run_inside(folder, flags, script=ROOT / "heft_finetuning.py"):
    """What the script shows, run in `folder` with flags (a list): its exit status, stdout and stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers, screen = [signal.getsignal(kind) for kind in kinds], (sys.stdout, sys.stderr)
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "argv", [str(script), *map(str, flags)]),
            pytest.raises(SystemExit) as end,
        ):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        for kind, handler in zip(kinds, handlers):
            signal.signal(kind, handler)
        sys.stdout, sys.stderr = screen  # which the script may have replaced
        gc.collect()  # closes the run's locks, as the end of a process does
    return Shown(end.value.code or 0, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def run_process(folder, flags, **environment):
    """The same of a process of its own."""
    process = start(folder, flags, **environment)
    out, err = process.communicate(timeout=300)
    return Shown(process.returncode, out, err)


def refused(shown, *words, status=2):
    """Assert that the run ended with this status and one line that holds all the words. Returns the line."""
    assert shown.status == status, shown
    assert shown.err.startswith("heft: error: ") and shown.err.count("\n") == 1, shown.err
    assert len(shown.err) < 900 and "Traceback" not in shown.out + shown.err
    assert all(word in shown.err for word in words), shown.err
    return shown.err


def result_of(work, pattern="*"):
    """(result, predictions) of the only result in the folder of a run, or the only one with such a name."""
    (file,) = (work / "results").glob(f"{pattern}.json")
    lines = file.with_suffix(".predictions.jsonl").read_text().splitlines()
    return json.loads(file.read_text()), [json.loads(line) for line in lines]


def outcome(work):
    """(losses of both stages, generated texts) of the only result."""
    result, predictions = result_of(work)
    return result["loss"], [row["text"] for row in predictions]
