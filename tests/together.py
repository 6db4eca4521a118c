"""Scripts of the tests as two processes of one JAX program, with `jfed.launch`."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def two_processes(script, *arguments, devices_per_process, timeout=300):
    """Runs it in two processes to their end."""
    command = [sys.executable, "-m", "jfed.launch", "-n", "2", "--devices-per-process", str(devices_per_process)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    launcher = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = launcher.communicate(timeout=timeout)
    except BaseException:
        launcher.terminate()  # it ends its processes
        said, _ = launcher.communicate()
        print(said)
        raise
    assert launcher.returncode == 0, said
