"""The command line: `bigkit advise NAME`, `estimate-memory`, `plan`, `dry-run`, `calibrate`, `launch script.py`,
`models`, `machines`, `env`.

What takes more than a second says so on stderr if that is a terminal: a log or a pipe holds results and errors only.

Leaves out: anything that needs torch, unless a name must be looked up on the Hub or this machine asked for its GPUs.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__, _say_missing
from .devices import Device, read_device
from .maps.advise import TARGETS
from .maps.draft import ACCEPTANCE
from .maps.strategies import STRATEGIES
from .model.attention import KV_DTYPES
from .model.estimate import CLASSIC
from .model.precision import QUANTIZATIONS
from .units import counted, format_bytes

if TYPE_CHECKING:
    from torch import nn

    from .draw.canvas import Picture
    from .machine.hardware import Hardware
    from .maps.plan import Plan
    from .model.spec import ModelSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A wrong input is one line on stderr and status 2."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown[0])
    try:
        with nullcontext() if options.run is _launch else _progress(f"{options.parser.prog} is at work"):
            said = options.run(options)
        if getattr(options, "markdown", False):
            from .listings import as_markdown

            said = as_markdown(said)
        print(said.rstrip("\n"), flush=True)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has had enough; nothing is left to say at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError) as error:
        said = _say_missing(error, "this command") if isinstance(error, ImportError) else error
        print(f"bigkit: {said}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _progress(doing: str) -> Iterator[None]:
    """From the second second on, say on a terminal that something is done, and for how long."""
    if not sys.stderr.isatty():
        yield
        return
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(1):
            lasted = counted(round(time.monotonic() - start), "second")
            print(f"\r{doing}: {lasted}", end="", file=sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        if time.monotonic() - start >= 1:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Takes each option with hyphens too (`--num-processes` is `--num_processes`, which help shows), and says a mistake
    in one line."""

    def __init__(self, *args: Any, example: str = "", **options: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        options |= {"epilog": f"example: {example}", "formatter_class": formatter}
        super().__init__(*args, **options)
        self.set_defaults(parser=self)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help)\n")

    def refuse(self, unknown: str) -> NoReturn:
        """Say that an argument is unknown, and what it may have meant."""
        near = get_close_matches(unknown.partition("=")[0], self._option_string_actions, 1)
        self.error(f"unknown argument {unknown!r}" + (f", did you mean {near[0]}?" if near else ""))

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        hyphens = ["--" + name[2:].replace("_", "-") for name in names if name.startswith("--") and "_" in name]
        action = super().add_argument(*names, **options)
        if hyphens:
            hidden = {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            super().add_argument(*hyphens, **{**options, **hidden})
        return action


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="bigkit", description="Plan and run models too big for one device.",
                     example='bigkit advise llama-3.1-8b --hardware 4090')  # fmt: skip
    parser.add_argument("--version", action="version", version=f"bigkit {__version__}")
    parser.set_defaults(run=lambda options: parser.format_help())
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def command(name: str, about: str, example: str, run: Callable[[argparse.Namespace], str]) -> _Parser:
        added: _Parser = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.",
                                             example=f"bigkit {name} {example}".strip())  # fmt: skip
        added.set_defaults(run=run)
        return added

    advice = command("advise", "whether a model fits on a machine, how to store it, and how fast it is",
                     'llama-2-70b --hardware "2 x 4090"', _advise)  # fmt: skip
    _add_machine(advice)
    advice.add_argument("--target", choices=TARGETS, default="speed", help="what ranks first (%(default)s)")
    advice.add_argument("--draft", metavar="MODEL", help="a small model that guesses tokens for this one to check")
    advice.add_argument("--acceptance", type=float, default=ACCEPTANCE, help="share of guesses accepted (%(default)s)")
    _add_markdown(advice)

    estimate = command("estimate-memory", "how much memory a model takes to load, run and train",
                       "llama-3.1-8b --context 8192", _estimate)  # fmt: skip
    _add_model(estimate)
    estimate.add_argument("--dtypes", nargs="+", default=list(CLASSIC), metavar="DTYPE",
                          help=f"rows of the classic table ({' '.join(CLASSIC)})")  # fmt: skip
    _add_markdown(estimate)

    plan = command("plan", "which layer rests on which device",
                   "llama-2-7b --max_memory 0=10GiB cpu=64GiB", _plan)  # fmt: skip
    _add_plan(plan)
    plan.add_argument("--code", action="store_true", help="print Python that makes the plan")
    plan.add_argument("--hosts", nargs="+", metavar="MACHINE", help='a process on each: "RTX 4090" "2 x L4"')
    plan.add_argument("--network", default="Ethernet 10G", help="the line between hosts (%(default)s)")

    dry = command("dry-run", "run a model on GPUs that do not exist: memory and time",
                  'gpt2-xl --hardware "2 x T4" --context 512', _dry_run)  # fmt: skip
    _add_plan(dry)
    dry.add_argument("--new", type=int, default=4, help="tokens to generate after the prompt (%(default)s)")
    dry.add_argument("--graphs", action="store_true", help="generate within bigkit.graph_decode")
    dry.add_argument("--expert_cache", default=0, metavar="SIZE", help="memory of the GPUs for experts that stay there")
    dry.add_argument("--routing", metavar="FILE", help="which experts are chosen: what Routing.save has written")

    for what, about, example in (
        ("models", "the models that need no download", "llama 8b"),
        ("machines", "the machines and GPUs that --hardware knows", "rtx"),
    ):
        listing = command(what, about, example, _list)
        listing.set_defaults(what=what)
        listing.add_argument("words", nargs="*", help="only those with all of these words")
        _add_markdown(listing)

    measure = command("calibrate", "measure this machine, for predictions; takes about a minute",
                      "--folder /data", _calibrate)  # fmt: skip
    measure.add_argument("names", nargs="*", metavar="NAME", help="models whose host's pace is measured instead")
    measure.add_argument("--folder", help="on the disk that is to be measured (the temporary folder)")
    measure.add_argument("--json", action="store_true", help="print JSON")

    _add_launch(command("launch", "run a script in several processes, on one host or on several",
                        "--num_processes 2 script.py", _launch))  # fmt: skip
    config = command("config", "write the config file that launch takes if it is told no other", "default", _config)
    config.add_argument("kind", choices=("default",), help="for this machine: a process for each GPU")
    command("env", "versions and devices, to be copied into an issue", "", _env)
    said = "bigkit launch --example writes a script: if it runs under bigkit launch --num_processes 2, launching works"
    command("test", "how to try a launch", "", lambda options: said)
    return parser


def _add_markdown(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown")


# Options of `accelerate launch` by which something else would be computed.
_REFUSED = ("tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "use_parallelism_config")


def _add_launch(launch: argparse.ArgumentParser) -> None:
    launch.description = "Run a script in several processes: a front of torchrun, whose command is printed first."
    launch.usage = "bigkit launch [options] script.py [its own options]\n       bigkit launch --example [KIND]"
    add = launch.add_argument
    add("--num_processes", type=int, help="on all hosts together (one for each GPU, or one)")
    add("--num_machines", type=int, help="hosts (1)")
    add("--machine_rank", type=int, help="which of them this is, from 0 (0)")
    add("--main_process_ip", help="where process 0 is, as all hosts see it; needed with several")
    add("--main_process_port", type=int, help="a port that is free there; needed with several")
    add("--gpu_ids", help="GPUs of this host to use, as in 0,2 (all)")
    add("--cpu", "--use_cpu", dest="use_cpu", action="store_true", default=None, help="leave GPUs alone")
    add("--num_cpu_threads_per_process", type=int, help="OMP_NUM_THREADS (the cores, shared out)")
    add("--rdzv_backend", choices=("static",), help="only static: for another one use torchrun itself")
    add("--config_file", help="JSON or YAML with these names as keys, or one of Accelerate's; options overrule it "
        "(Accelerate's default_config.yaml, if it is there)")  # fmt: skip
    kind = launch.add_mutually_exclusive_group()
    kind.add_argument("-m", "--module", dest="kind", action="store_const", const="module", default="script",
                      help="the script is a module's name, as for python -m")  # fmt: skip
    kind.add_argument("--no_python", "--no-python", dest="kind", action="store_const", const="program",
                      help="the script is a program that needs no Python")  # fmt: skip
    for name in ("--debug", "--enable_cpu_affinity", "--multi_gpu", "--quiet", "--same_network"):
        add(name, action="store_true", help="for Accelerate's users; no effect")
    for name in ("--dynamo_backend", "--dynamo_mode", "--max_restarts", "--monitor_interval"):
        add(name, help="for Accelerate's users; no effect")
    add("--mixed_precision", help="no effect: a model computes in the dtype that it is loaded in")
    for name in _REFUSED:
        add(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    add("--show", action="store_true", help="print the torchrun command and stop")
    add("--example", nargs="?", const="inference", metavar="KIND",
        help="write distributed_KIND.py to start from: inference or diffusion (inference)")  # fmt: skip
    add("command", nargs=argparse.REMAINDER, metavar="script.py ...", help="the script and its own options")


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="a shipped name (`bigkit models`), Hub id, Hub URL, timm name, folder or GGUF file")
    add("--library_name", choices=("transformers", "timm", "bigkit"), help="found out if left out")
    add("--trust_remote_code", action="store_true", help="run model code from the Hub")
    add("--batch", type=int, default=1, help="sequences at once (%(default)s)")
    add("--context", type=int, default=2048, help="tokens of each (%(default)s)")
    add("--kv_dtype", choices=KV_DTYPES, help="of keys and values in the cache (as the model computes)")
    add("--json", action="store_true", help="print JSON")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--hardware",
        help='a machine: 4090, "2 x H100", "RTX 4090, 128GB RAM", or GPUs of your own, "2 x 24GiB" (this machine)',
    )
    parser.add_argument("--svg", nargs="?", const="-", metavar="FILE", help="write the picture (without FILE: print)")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_machine(parser)
    add = parser.add_argument
    add("--max_memory", nargs="+", metavar="DEVICE=SIZE", help="budgets, as in 0=24GiB cpu=64GiB (all of the machine)")
    add("--experts_on_cpu", type=int, metavar="BLOCKS", help="of so many blocks the experts rest in RAM (as needed)")
    add("--on_cpu", action="store_true", help="the CPU computes MLPs in RAM, if that pays on this machine (no)")
    add("--strategy", choices=STRATEGIES, default="auto", help="where to cut the model (%(default)s)")
    add("--dtype", help="cast floating weights to this")
    add("--quantization", choices=QUANTIZATIONS, help="of the linear layers; a dry run of it needs bitsandbytes")


def _say(options: argparse.Namespace, thing: Any, topic: str, text: Callable[[], str]) -> str:
    """What was asked for: JSON, the picture that `draw/` has for the topic, or text."""
    if options.json:
        return str(thing.to_json())
    if not options.svg:
        return text()
    picture: Picture = getattr(import_module(f".draw.{topic}", __package__), f"{topic}_figure")(thing)
    if options.svg == "-":
        return picture.svg
    try:
        Path(options.svg).write_text(picture.svg, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"the picture cannot be written to {options.svg}: {error.strerror}") from error
    return f"the picture is in {options.svg}"


def _describe(options: argparse.Namespace) -> ModelSpec:
    from .api import describe

    return describe(options.model, options.library_name, trust_remote_code=options.trust_remote_code)


def _estimate(options: argparse.Namespace) -> str:
    from .api import estimate_memory

    estimate = estimate_memory(
        options.model, options.dtypes, options.library_name,
        batch=options.batch, context=options.context, kv_dtype=options.kv_dtype,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    return estimate.to_json() if options.json else str(estimate)


def _budgets(items: Sequence[str] | None) -> dict[Device, int | str] | None:
    if not items:
        return None
    budgets: dict[Device, int | str] = {}
    for item in items:
        name, equals, size = item.partition("=")
        if not equals:
            raise ValueError(f"--max_memory takes DEVICE=SIZE, such as 0=24GiB or cpu=64GiB, not {item!r}")
        if size.replace(".", "").isdigit() and float(size):
            raise ValueError(f"--max_memory {item} has no unit: write {item}GiB, or {item}B for bytes")
        budgets[read_device(name)] = size
    return budgets


def _plan_of(options: argparse.Namespace, hardware: Hardware | str | None, context: int) -> Plan:
    from .api import described, plan

    model = described(options.model, options.library_name, options.dtype, trust_remote_code=options.trust_remote_code)
    return plan(
        model, _budgets(options.max_memory), options.strategy, dtype=options.dtype,
        quantization=options.quantization, batch=options.batch, context=context, hardware=hardware,
        experts_on_cpu=options.experts_on_cpu, kv_dtype=options.kv_dtype, on_cpu=options.on_cpu,
    )  # fmt: skip


def _plan_hosts(options: argparse.Namespace) -> str:
    from .api import plan_hosts

    if options.max_memory or options.hardware:
        raise ValueError("--hosts names the machines: leave --max_memory and --hardware out")
    plan = plan_hosts(
        _describe(options), options.hosts, options.network, dtype=options.dtype, quantization=options.quantization,
        batch=options.batch, context=options.context, experts_on_cpu=options.experts_on_cpu, kv_dtype=options.kv_dtype,
    )  # fmt: skip
    return _say(options, plan, "hosts", plan.to_code if options.code else plan.explain)


def _plan(options: argparse.Namespace) -> str:
    if options.hosts:
        return _plan_hosts(options)
    plan = _plan_of(options, options.hardware, options.context)
    if options.svg and not hasattr(plan, "layers"):
        raise ValueError("there is no picture of a pipeline's plan: leave --svg out")
    return _say(options, plan, "plan", plan.to_code if options.code else plan.explain)


def _dry_run(options: argparse.Namespace) -> str:
    from . import zoo
    from .dryrun.run import dry_run
    from .machine.hardware import machine_of

    machine = machine_of(options.hardware)
    if not machine.gpus:
        where = machine.name.partition(":")[0]
        raise ValueError(f'{where} has no GPU to rehearse on: name one, as in --hardware "RTX 4090"')
    plan = _plan_of(options, machine, options.context + options.new)
    if not hasattr(plan, "layers"):
        raise ValueError("a pipeline has no dry run: `bigkit plan` counts what each of its phases takes")
    dtype = options.dtype or plan.dtype

    def build() -> nn.Module:
        return zoo.empty_model(
            options.model, options.library_name, dtype=dtype, trust_remote_code=options.trust_remote_code
        )

    more = {"expert_cache": options.expert_cache, "routing": options.routing, "graphs": options.graphs}
    run = dry_run(build, plan, options.batch, options.context, options.new, machine, dtype=dtype, **more)
    run = replace(run, model=options.model)
    return _say(options, run, "dryrun", lambda: f"{plan.explain()}\n\n{run}")


def _advise(options: argparse.Namespace) -> str:
    from .api import advise

    advice = advise(
        _describe(options), options.hardware, options.batch, options.context, options.target,
        kv_dtype=options.kv_dtype, draft=options.draft, acceptance=options.acceptance,
    )  # fmt: skip
    return _say(options, advice, "advice", advice.explain)


def _calibrate(options: argparse.Namespace) -> str:
    import json
    from dataclasses import asdict

    from .machine.ledger import ledger_path
    from .measure.calibrate import calibrate

    calibrations = [calibrate(options.folder, model=name) for name in options.names or [None]]
    calibration = calibrations[-1]
    if options.json:
        return json.dumps(asdict(calibration), indent=1)
    return f"{calibration.explain()}\nkept in {ledger_path()}"


def _launch(options: argparse.Namespace) -> str:
    from .distributed import launch

    if options.example:
        path = launch.write_example(options.example)
        return f"{path} is there. Start it with: bigkit launch --num_processes 2 {path}"
    if refused := [name for name in _REFUSED if getattr(options, name)]:
        raise ValueError(f"bigkit launch cannot do --{refused[0]}: it runs inference, by whole layers")
    launch.say_ignored(vars(options))
    content = _launch_config(options.config_file)
    flags = {field.name: getattr(options, field.name, None) for field in fields(launch.Settings)}
    settings = launch.Settings(**{**content, **{name: value for name, value in flags.items() if value is not None}})
    if options.show:
        return launch.command_line(settings, options.command, options.kind)
    sys.exit(launch.launch(settings, options.command, options.kind))


def _launch_config(path: str | None) -> dict[str, Any]:
    """The settings of a config file. What Accelerate's default one says of training does not stop a launch."""
    from .distributed.launch import default_config, read_config

    if path is not None:
        return read_config(path)
    try:
        return read_config(default_config()) if default_config().is_file() else {}
    except ValueError as error:
        print(f"bigkit launch ignores {error}", file=sys.stderr)
        return {}


def _config(options: argparse.Namespace) -> str:
    from .distributed.launch import write_default_config

    return f"{write_default_config()} is there: `bigkit launch` and `accelerate launch` read it"


def _list(options: argparse.Namespace) -> str:
    from . import listings

    said: str = getattr(listings, options.what)(options.words)
    return said


def _env(options: argparse.Namespace) -> str:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from .distributed.launch import default_config
    from .machine.hardware import Hardware

    said = {"bigkit": __version__, "Python": platform.python_version(), "system": platform.platform()}
    for package in ("torch", "transformers", "bitsandbytes", "accelerate"):
        try:
            said[package] = version(package)
        except PackageNotFoundError:
            said[package] = "not installed"
    try:
        machine = Hardware.detect()
        said["machine"] = f"{machine.name}, {format_bytes(machine.ram)} of RAM"
    except ImportError:
        said["machine"] = "unknown without torch"
    said["config of launch"] = str(default_config()) if default_config().is_file() else "none"
    return "\n".join(f"- {name}: {value}" for name, value in said.items())


if __name__ == "__main__":
    sys.exit(main())
