"""Training of students in the background, in a process that ends with the kernel."""

import atexit
import itertools
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kdlib

# First line of an exception as Python and papermill print it: its class, then its message.
_RAISED = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Iteration)(?::.*)?")


class BackgroundTraining:
    """Commands that run one after another in the background; they end with the kernel.

    Attributes: code, the first exit code that is not 0, or 0 at the end; None before. stopped.
    """

    def __init__(
        self,
        commands: list[list[str]],
        log: Path,
        progress: Callable[[list[str]], Any],
        end: Callable,
    ) -> None:
        """Start.

        Args:
            log: File of what they print.
            progress: Called twice a second with the log's lines.
            end: Called with this training when all is over.
        """
        self.commands, self.log, self.progress, self.end = commands, log, progress, end
        self.code: int | None = None
        self.stopped, self._process = False, None
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")  # before anybody reads it
        atexit.register(self.stop)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        code = 0
        with open(self.log, "w") as log:
            for command in self.commands:
                if self.stopped or code:
                    break
                try:  # in a new session: an interrupt of the cell does not reach it
                    self._process = subprocess.Popen(
                        command, cwd=Path(kdlib.__file__).parents[1], stdin=subprocess.DEVNULL,
                        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                except OSError as error:
                    log.write(f"{type(error).__name__}: {error}")
                    code = 1
                    break
                code = None
                while code is None:
                    try:
                        code = self._process.wait(timeout=0.5)
                    except subprocess.TimeoutExpired:
                        self.progress(self.lines())
        self.code = code
        atexit.unregister(self.stop)
        self.end(self)

    def lines(self) -> list[str]:
        """The lines printed so far, without colours."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        return re.split(r"\r?\n|\r", text)

    def last_line(self) -> str:
        """The last line printed so far that is not empty."""
        return next((line for line in reversed(self.lines()) if line.strip()), "")

    def error(self) -> str:
        """The error: class and message of the last exception in the log, in one line; where no
        exception is printed, the exit code and the last line."""
        lines = self.lines()
        starts = [i for i, line in enumerate(lines) if _RAISED.fullmatch(line.strip())]
        if not starts:
            how = f"exit code {self.code}" if self.code > 0 else f"signal {-self.code}"
            return f"the process ended with {how}; its last line: {self.last_line() or 'none'}"
        message = itertools.takewhile(str.strip, lines[starts[-1] :])
        return " ".join(line.strip() for line in message)

    def stop(self) -> None:
        """End the running command by an interrupt; papermill takes its kernel down on one."""
        self.stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            threading.Timer(10, self._process.kill).start()
