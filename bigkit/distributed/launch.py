"""`bigkit launch`: a script in several processes, on this host or on several; torchrun by Accelerate's option names.

    bigkit launch --num_processes 2 script.py --its --own --options
    bigkit launch --config_file my_config.yaml script.py
    bigkit launch --example

Settings come from the command line, else from the config file (Accelerate's default one, if no other is named), else
from the machine: one process for each GPU, or one. The torchrun command is printed, and then takes this process's
place: signals and the exit status are its own. A config file is JSON or YAML with the keys of Accelerate's: how a
model is trained, or spread over processes, is refused, and one line says what else has no effect here. A script that
makes a PartialState ends within a second of its launcher, even if that is killed.

Leaves out: starting the command on the other hosts, and notebooks (`notebook.py`).
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

EXAMPLES = ("inference", "diffusion")
_KINDS = {"script": (), "module": ("-m",), "program": ("--no-python",)}
# Keys of Accelerate's config files, and options of its command line, that have no effect here.
IGNORED = (
    "command_file", "commands", "debug", "downcast_bf16", "dynamo_backend", "dynamo_config", "dynamo_mode",
    "enable_cpu_affinity", "main_training_function", "max_restarts", "mixed_precision", "monitor_interval",
    "multi_gpu", "quiet", "same_network", "tpu_name", "tpu_zone",
)  # fmt: skip
_NOTHING_SAID: tuple[Any, ...] = (None, False, "no", "NO", "main", {})  # what they hold where nobody has chosen
_SILENT = ("multi_gpu", "same_network")  # nothing to say: GPUs are used anyway, and hosts meet where they are told


@dataclass(frozen=True)
class Settings:
    """How to start a script.

    Args:
        num_processes: how many processes to start on all hosts together; None: one for each GPU, or one on each host.
        num_machines: how many hosts there are.
        machine_rank: the number of this host, from 0.
        main_process_ip, main_process_port: where process 0 is, as all hosts see it; needed with several hosts.
        rdzv_backend: "static": the hosts meet at main_process_ip. For another one use torchrun itself.
        use_cpu: whether the processes compute on the CPU although there are GPUs.
        gpu_ids: the GPUs of this host to use, "all" or as in "0,2".
        num_cpu_threads_per_process: OMP_NUM_THREADS; None: as it is set, or the cores shared out.

    Raises:
        ValueError: a value that makes no sense, by its name.

    >>> Settings(num_processes=4).torchrun(["script.py", "--its", "own"])
    ['--standalone', '--nproc-per-node', '4', 'script.py', '--its', 'own']
    """

    num_processes: int | None = None
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    rdzv_backend: str = "static"
    use_cpu: bool = False
    gpu_ids: str = "all"
    num_cpu_threads_per_process: int | None = None

    def __post_init__(self) -> None:
        threads = self.num_cpu_threads_per_process
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"num_cpu_threads_per_process is {threads!r}: expected a whole number, at least 1")
        for name, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0), ("main_process_port", 0)):
            value = getattr(self, name)
            if value is None and name in ("num_processes", "main_process_port"):
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}: expected a whole number, at least {least}")
        if not isinstance(self.use_cpu, bool):
            raise ValueError(f"use_cpu is {self.use_cpu!r}: expected true or false")
        if self.rdzv_backend != "static":
            raise ValueError(f"rdzv_backend is {self.rdzv_backend!r}: expected static, or use torchrun itself")
        if self.gpu_ids != "all" and not all(part.strip().isdigit() for part in str(self.gpu_ids).split(",")):
            raise ValueError(f"gpu_ids is {self.gpu_ids!r}: expected all, or numbers as in 0,2")
        machines = self.num_machines
        if self.machine_rank >= machines:
            raise ValueError(f"machine_rank is {self.machine_rank}: the {machines} machines are numbered from 0")
        if self.num_processes is not None and self.num_processes % machines:
            raise ValueError(f"num_processes is {self.num_processes}, which {machines} machines cannot share evenly")
        for name in ("main_process_ip", "main_process_port"):
            if machines > 1 and not getattr(self, name):
                raise ValueError(f"{name} is missing: {machines} machines must know where to meet")

    def torchrun(self, command: Sequence[str], kind: str = "script") -> list[str]:
        """The arguments of torchrun for a script, a "module" or a "program" and its own arguments."""
        port = ["--master-port", str(self.main_process_port)] if self.main_process_port else []
        count = ["--nproc-per-node", str(self._processes_here())]
        script = [*_KINDS[kind], *command]
        if self.num_machines == 1:
            return [*(port or ["--standalone"]), *count, *script]
        address = ["--node-rank", str(self.machine_rank), "--master-addr", str(self.main_process_ip), *port]
        return ["--nnodes", str(self.num_machines), *count, *address, *script]

    def environment(self) -> dict[str, str]:
        """The variables to set for it. Without OMP_NUM_THREADS torchrun would give each process one thread."""
        variables = {}
        if self.use_cpu:
            variables["BIGKIT_USE_CPU"] = "1"
        elif self.gpu_ids != "all":
            variables["CUDA_VISIBLE_DEVICES"] = str(self.gpu_ids).replace(" ", "")
        if self.num_cpu_threads_per_process:
            variables["OMP_NUM_THREADS"] = str(self.num_cpu_threads_per_process)
        elif "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self._processes_here()))
        return variables

    def _processes_here(self) -> int:
        """How many processes to start on this host; by default one for each of its GPUs, or one."""
        if self.num_processes is not None:
            return self.num_processes // self.num_machines
        if self.use_cpu:
            return 1
        if self.gpu_ids != "all":
            return len(str(self.gpu_ids).split(","))
        import torch

        return max(1, torch.cuda.device_count())


def default_config() -> Path:
    """Where `accelerate config` writes its config file, and `bigkit config default` too."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    return Path(home, "accelerate", "default_config.yaml").expanduser()


def write_default_config() -> Path:
    """Write a config file for this machine, one process for each GPU, as Accelerate reads it.

    Raises:
        FileExistsError: it is there already; nothing is overwritten.
    """
    import torch
    import yaml

    path, gpus = default_config(), torch.cuda.device_count()
    if path.exists():
        raise FileExistsError(f"{path} is there already: edit it, or remove it first")
    content = {
        "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "MULTI_GPU" if gpus > 1 else "NO",
        "machine_rank": 0, "mixed_precision": "no", "num_machines": 1, "num_processes": max(1, gpus),
        "use_cpu": not gpus,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def say_ignored(given: Mapping[str, Any]) -> None:
    """Say on one line of stderr which options or keys have no effect here."""
    ignored = [
        f"{name} ({value})"
        for name, value in given.items()
        if name in IGNORED and name not in _SILENT and value not in _NOTHING_SAID
    ]
    if ignored:
        print(f"bigkit launch ignores {', '.join(ignored)}", file=sys.stderr)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a config file says about starting processes: names and values for `Settings`.

    Raises:
        ValueError: a key or a value that is not understood, or that would change what is computed; it is named.
        FileNotFoundError: there is no such file.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "my_config.json")
    >>> _ = path.write_text('{"distributed_type": "MULTI_CPU", "num_processes": 2}')
    >>> read_config(path)
    {'num_processes': 2, 'use_cpu': True}
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    text = path.read_text(encoding="utf-8")
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        content = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected keys and values")
    try:
        values = _read_keys(content)
        Settings(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    say_ignored(content)
    return values


def _read_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """The values for `Settings` in a config of ours or of Accelerate's.

    Raises:
        ValueError: a key that is none of theirs, or a value by which something else would be computed.
    """
    names = [field.name for field in fields(Settings)]
    values = {name: content[name] for name in names if content.get(name) is not None}
    environment = content.get("compute_environment", "LOCAL_MACHINE")
    if environment != "LOCAL_MACHINE":
        raise ValueError(f"compute_environment is {environment!r}: expected LOCAL_MACHINE")
    kind = content.get("distributed_type")
    if kind is False or kind == "NO":  # YAML reads NO as false
        if values.get("num_processes", 1) != 1:
            raise ValueError(f"distributed_type is NO, but num_processes is {values['num_processes']}")
    elif kind == "MULTI_CPU":
        values["use_cpu"] = True
    elif kind not in (None, "MULTI_GPU"):
        expected = "NO, MULTI_CPU, MULTI_GPU, since bigkit runs inference, by whole layers"
        raise ValueError(f"distributed_type is {kind!r}: expected {expected}")
    if type(values.get("gpu_ids")) in (int, list):  # YAML may hold 0 or [0, 2] instead of "0,2"
        values["gpu_ids"] = str(values["gpu_ids"]).strip("[]")
    for name, value in content.items():
        if name in (*names, *IGNORED, "compute_environment", "distributed_type"):
            continue
        if meant := difflib.get_close_matches(str(name), names, 1):
            raise ValueError(f"unknown key {name!r}: is {meant[0]} meant? bigkit launch reads {', '.join(names)}")
        if value:  # as deepspeed_config or fsdp_config; an empty one does no harm
            raise ValueError(f"{name} is set, and bigkit launch cannot honour it: remove the key")
    return values


def command_line(settings: Settings, command: Sequence[str], kind: str = "script") -> str:
    """The command that does the same without bigkit.

    >>> command_line(Settings(2, use_cpu=True), ["script.py"]).replace("OMP_NUM_THREADS=1 ", "")
    'BIGKIT_USE_CPU=1 torchrun --standalone --nproc-per-node 2 script.py'
    """
    variables = [f"{name}={shlex.quote(value)}" for name, value in settings.environment().items()]
    return " ".join([*variables, "torchrun", shlex.join(settings.torchrun(command, kind))])


def launch(settings: Settings, command: Sequence[str], kind: str = "script") -> int:
    """Print the torchrun command and become it; on Windows, run it.

    Args:
        settings: how many processes, and where.
        command: the script and its arguments.
        kind: "script", "module" (its name, as for `python -m`), or "program" that needs no Python.

    Raises:
        FileNotFoundError: there is no such script.
    """
    if not command:
        raise ValueError("bigkit launch needs a script: write one to start from with `bigkit launch --example`")
    if kind == "script" and not Path(command[0]).is_file():
        raise FileNotFoundError(f"there is no script {command[0]}")
    print(command_line(settings, command, kind), file=sys.stderr, flush=True)
    os.environ.update(settings.environment())
    line = [sys.executable, "-m", "torch.distributed.run", *settings.torchrun(command, kind)]
    if sys.platform == "win32":  # there exec would let the shell go on at once
        return subprocess.call(line)
    os.execv(line[0], line)


def write_example(kind: str, folder: str | os.PathLike[str] = ".") -> Path:
    """Write a script to start from: "inference" or "diffusion".

    Raises:
        FileExistsError: it is there already; nothing is overwritten.
        ValueError: there is no such example.
    """
    if kind not in EXAMPLES:
        raise ValueError(f"there is no example {kind!r}: expected {' or '.join(EXAMPLES)}")
    path = Path(folder, f"distributed_{kind}.py")
    if path.exists():
        raise FileExistsError(f"{path} is there already: move it away first")
    shutil.copyfile(Path(__file__).parents[1] / "examples" / path.name, path)
    return path
