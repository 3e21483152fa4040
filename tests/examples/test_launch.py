"""The launch scripts: accelerate reads its files, and a SLURM job goes on with a run until it is finished."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig

LAUNCH = Path(__file__).parents[2] / "examples" / "launch"
BIN = Path(sys.executable).parent

# What the script asks of SLURM. One task writes its number down, so that a test can send it the signal.
SRUN = """#!/bin/bash
shift
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1
echo $$ > "$FAKE_SLURM/pid"
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$FAKE_SLURM/requeued"; fi
"""


@pytest.mark.parametrize("file", ["one_node.yaml", "several_nodes.yaml"])
def test_accelerate_reads_its_files(file: str) -> None:
    config = ClusterConfig.from_yaml_file(str(LAUNCH / file))
    assert config.num_processes % config.num_machines == 0
    assert set(yaml.safe_load((LAUNCH / file).read_text())) <= set(config.to_dict()) | {"main_process_port"}


@pytest.mark.verify
def test_a_slurm_job_is_queued_again_until_it_is_finished(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{BIN}:{os.environ['PATH']}"
    place = {
        "FAKE_SLURM": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "here",
        "ACCELERATE_USE_CPU": "true",
    }
    settings = "--model toy --stage1_steps 150 --stage2_steps 0 --per_device_train_batch_size 8 --logging_steps 1"
    folder = tmp_path / "run"
    command = [str(LAUNCH / "slurm.sh"), str(folder), *settings.split(), "--report_to", "none", "--fake_updates", "1"]

    def begun() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=os.environ | place | {"PATH": path}, stderr=subprocess.PIPE, text=True)

    with begun() as job:
        log, ends = folder / "metrics.jsonl", time.monotonic() + 120
        while job.poll() is None and time.monotonic() < ends and not log.exists():
            time.sleep(0.02)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGUSR1)
        _, said = job.communicate(timeout=120)
    assert job.returncode == 138, said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    with begun() as job:
        _, said = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 151))
