"""The command line, as a process."""

import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import bigkit
from bigkit import describe, estimate_memory, format_bytes, zoo
from bigkit.cli import _parser, main
from bigkit.machine.hardware import GPUS, HARDWARE, machine_of


def run(*arguments):
    code = (
        "import sys; from bigkit.cli import main; status = main();"
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_estimate_prints_the_table_without_torch():
    done = run("estimate-memory", "bert-base-cased")
    assert done.returncode == 0 and done.stderr == "False\n"
    assert "413.18 MB" in done.stdout and "1.61 GB" in done.stdout


def test_python_can_be_asked_for_it():
    done = subprocess.run(
        [sys.executable, "-m", "bigkit", "models", "xyz"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and done.stderr.startswith("bigkit: nothing that ships with bigkit has 'xyz'")


def test_estimate_json(capsys):
    assert main(["estimate-memory", "resnet50.a1_in1k", "--dtypes", "float32", "bf16", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["dtype"] for row in data["rows"]] == ["float32", "bfloat16"]


def test_plan_text_json_and_code(capsys):
    budgets = ["--max_memory", "0=24GiB", "1=24GiB", "cpu=64GiB"]
    assert main(["plan", "llama-2-7b", *budgets, "--dtype", "float16", "--strategy", "exact"]) == 0
    assert "Every device is within its budget." in capsys.readouterr().out
    assert main(["plan", "llama-2-7b", *budgets, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "llama-2-7b"
    assert main(["plan", "llama-2-7b", *budgets, "--code"]) == 0
    assert "from bigkit import plan" in capsys.readouterr().out


def test_plan_over_hosts(capsys, tmp_path):
    words = ["plan", "llama-2-7b", "--hosts", "RTX 4090", "L4", "--network", "WLAN", "--dtype", "float16"]
    assert main([*words, "--json"]) == 0
    found = bigkit.HostsPlan.from_json(capsys.readouterr().out)
    assert found == bigkit.plan_hosts("llama-2-7b", ["RTX 4090", "L4"], "WLAN", dtype="float16", context=2048)
    assert main(words) == 0 and capsys.readouterr().out.strip() == found.explain()
    assert main([*words, "--code"]) == 0 and "'1 x RTX 4090 | 1 x L4',\n    'WLAN'" in capsys.readouterr().out
    assert main([*words, "--svg", str(tmp_path / "hosts.svg")]) == 0
    assert "process 1" in (tmp_path / "hosts.svg").read_text() and "is in" in capsys.readouterr().out
    assert main([*words, "--hardware", "L4"]) == 2 and "--hosts names the machines" in capsys.readouterr().err


def test_plan_for_a_machine_has_its_budgets_and_overhead(capsys):
    assert main(["plan", "llama-2-70b", "--hardware", "1 x RTX 4090", "--dtype", "float16", "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["shares"]
    assert shares[0]["budget"] == 24564 * 2**20 and shares[0]["overhead"] == HARDWARE["1 x RTX 4090"].overhead
    apart = ["plan", "mixtral-8x7b", "--max_memory", "0=80GiB", "cpu=80GiB", "--dtype", "float16"]
    assert main([*apart, "--experts-on-cpu", "9"]) == 0 and "--n-cpu-moe 9" in capsys.readouterr().out
    assert main(["plan", "gpt2", "--hardware", "PS5"]) == 2
    assert "unknown hardware 'PS5'" in capsys.readouterr().err


def test_a_reader_who_closes_the_pipe_is_no_error():
    code = "import sys, time; time.sleep(1); from bigkit.cli import main; sys.exit(main())"
    asked = [sys.executable, "-c", code, "plan", "gpt2", "--max_memory", "0=1GiB"]
    process = subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(timeout=60) == 0 and process.stderr.read() == ""
    process.stderr.close()


def test_a_dry_run_builds_the_model_that_was_planned(monkeypatch, capsys):
    from bigkit import zoo

    asked = []
    for name in ("describe", "empty_model"):
        real = getattr(zoo, name)
        monkeypatch.setattr(zoo, name, lambda model, library=None, real=real, **options: asked.append(
            (library, options["trust_remote_code"])) or real(model, library, **options))  # fmt: skip
    command = ["dry-run", "pygpt", "--hardware", "T4", "--context", "32", "--new", "1", "--library_name", "bigkit",
               "--trust_remote_code", "--json"]  # fmt: skip
    assert main(command) == 0
    assert asked == [("bigkit", True)] * 2 and json.loads(capsys.readouterr().out)["model"] == "pygpt"


def test_dry_run_text_json_and_picture(capsys):
    asked = ["dry-run", "gpt2", "--hardware", "2 x T4", "--dtype", "float16", "--context", "64", "--new", "1"]
    assert main(asked) == 0
    assert "Every device is within its budget." in (said := capsys.readouterr().out) and "tokens/s" in said
    assert main([*asked, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["devices"]) == {"0", "1"}
    assert main([*asked, "--svg", "--max_memory", "0=8GiB"]) == 0
    assert capsys.readouterr().out.startswith("<svg")


def test_a_dry_run_by_graphs(monkeypatch):
    import bigkit.dryrun.run as module

    asked, real = [], module.dry_run
    monkeypatch.setattr(
        module, "dry_run", lambda *args, **more: asked.append(more.pop("graphs")) or real(*args, **more)
    )
    for more in ([], ["--graphs"]):
        assert main(["dry-run", "pygpt", "--hardware", "T4", "--context", "32", "--new", "1", *more]) == 0
    assert asked == [False, True]


def test_advise_needs_no_torch(capsys):
    done = run("advise", "deepseek-v3", "--hardware", "8 x H100-80GB")
    assert done.returncode == 0 and done.stderr == "False\n" and "waits for" in done.stdout
    assert main(["advise", "llama-2-7b", "--hardware", "T4", "--target", "quality", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"][0]["stored"] == "float16"


def test_pictures_go_to_a_file(capsys, tmp_path):
    path = tmp_path / "picture.svg"
    for asked in (
        ["plan", "llama-2-7b", "--max_memory", "0=24GiB", "--dtype", "float16"],
        ["dry-run", "pygpt", "--hardware", "T4", "--context", "32", "--new", "1"],
        ["advise", "llama-2-7b", "--hardware", "T4"],
    ):
        path.unlink(missing_ok=True)
        assert main([*asked, "--svg", str(path)]) == 0
        assert capsys.readouterr().out == f"the picture is in {path}\n"
        assert path.read_text().startswith("<svg") and 'role="img"' in path.read_text()
        assert main([*asked, "--svg"]) == 0 and capsys.readouterr().out.startswith("<svg")
        assert main([*asked, "--svg", str(tmp_path / "no" / "folder.svg")]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_quantized_dry_run(capsys):
    pytest.importorskip("bitsandbytes")
    asked = ["dry-run", "gpt2", "--hardware", "T4", "--context", "32", "--new", "1", "--json"]
    assert main(asked) == 0
    whole = json.loads(capsys.readouterr().out)["devices"]["0"]["at_peak"]["weights"]
    assert main([*asked, "--quantization", "nf4"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"]["0"]["at_peak"]["weights"] < 0.4 * whole


def test_calibrate_keeps_what_it_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("BIGKIT_LEDGER", str(tmp_path / "ledger.json"))
    monkeypatch.setattr("bigkit.measure.calibrate.BLOCK", 2**24)
    assert main(["calibrate", "--folder", str(tmp_path)]) == 0
    assert "RAM" in (said := capsys.readouterr().out) and "ledger.json" in said
    assert main(["calibrate", "--folder", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disk_warm"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dry-run", "gpt2", "--hardware", "no such GPU"], "unknown hardware 'no such GPU'"),
        (["dry-run", "gpt2", "--hardware", "Binder"], "Binder has no GPU"),
        (["plan", "gpt2", "--max_memory", "24GiB"], "DEVICE=SIZE"),
        (["plan", "gpt2", "--max-memory", "0=10"], "0=10 has no unit: write 0=10GiB, or 0=10B for bytes"),
        (["plan", "gpt2", "--max_memory", "0=1GiB", "--svg", "/no/where.svg"], "cannot be written to /no/where.svg"),
        (["advise", "gpt2", "--hardware", "A100"], "it could be 'A100-40GB', 'A100-80GB'"),
        (["advise", "gpt2", "--hardware", "RTX 4080"], "'RTX 4090'"),
        (["advise", "llama 3.1", "--hardware", "T4"], "llama-3.1-8b"),
        (["machines", "TPU"], "nothing that ships"),
        (["plan", "gpt2", "--max_memory", "gpu=1GB"], "unknown device 'gpu'"),
        (["plan", "llama-2-7b", "--max_memory", "0=1MB", "disk=0"], "does not fit"),
        (["estimate-memory", "gpt2", "--dtypes", "float12"], "unknown dtype"),
        (["estimate-memory", "no-such-model-at-all"], "no-such-model-at-all"),
        (["calibrate", "--folder", "/no/such/folder"], "there is no folder '/no/such/folder'"),
    ],
)
def test_errors_are_one_line_and_status_two(arguments, says, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("bigkit: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "gpt2", "--max-memry", "0=1GiB"], "unknown argument '--max-memry', did you mean --max-memory?"),
        (["bogus"], "'machines'"),
    ],
)
def test_what_is_no_command_or_option_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and error.count("\n") == 1 and "--help)" in error


def test_no_command_shows_the_commands(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "estimate-memory" in said and "example: bigkit advise" in said


def test_help_names_each_option_once(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    said = capsys.readouterr().out
    assert "--max_memory" in said and "--max-memory" not in said
    options = _parser().parse_args(["plan", "gpt2", "--max-memory", "0=1GiB", "--kv-dtype", "int8"])
    assert options.max_memory == ["0=1GiB"] and options.kv_dtype == "int8" and options.experts_on_cpu is None


def test_code_ends_with_one_newline(capsys):
    assert main(["plan", "gpt2", "--hardware", "T4", "--code"]) == 0
    assert capsys.readouterr().out.endswith("device_map\n")


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("--num-processes 2", "--nproc-per-node 2"),
        ("--multi_gpu --num_processes 2 --same-network", "--nproc-per-node 2"),
        ("--mixed_precision no --rdzv_backend static", "--nproc-per-node"),
        ("--use_cpu", "BIGKIT_USE_CPU=1"),
        ("--use-cpu --num-cpu-threads-per-process 3", "OMP_NUM_THREADS=3"),
    ],
)
def test_options_of_accelerates_command_line(options, shown, capsys):
    from bigkit.cli import main

    assert main(["launch", "--show", *options.split(), "script.py", "--its-own", "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert shown in printed and printed.endswith("script.py --its-own --use_cpu\n")


def test_models_lists_what_ships_and_needs_no_torch():
    done = run("models")
    assert done.returncode == 0 and done.stderr == "False\n"
    assert {"pygpt", "gpt-oss-20b", "kimi-k2"} <= {line.split()[0] for line in done.stdout.splitlines()}
    done = run("models", "mixture", "Mamba")
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["nemotron-3-nano-30b"]
    assert run("models", "no-such-word").returncode == 2


def test_each_model_and_machine_is_listed_with_its_figures(capsys):
    assert main(["models"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [*zoo.names()]
    for name in ("llama-2-7b", "deepseek-v3"):
        size = format_bytes(estimate_memory(name, stored=[describe(name).facts["torch_dtype"]]).inference[0].weights)
        assert size in next(row for row in rows if row.startswith(f"{name} "))
    assert main(["machines"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == len({*HARDWARE} | {machine_of(name).name for name in GPUS})
    for row in rows:
        name = re.split("  +", row)[0]
        for gpu in machine_of(name).gpus[:1]:
            assert format_bytes(gpu.memory) in row and f" {gpu.bandwidth / 1e9:,.0f} " in row
    assert main(["machines", "rtx", "24"]) == 0 and capsys.readouterr().out.splitlines()[2].startswith("1 x RTX 3090")


@pytest.mark.parametrize(
    ("model", "hardware", "said"),
    [
        ("Llama 3.1 8B", "4090", "llama-3.1-8b on 1 x RTX 4090,"),
        ("llama_2_7b", "rtx4090", "llama-2-7b on 1 x RTX 4090,"),
        ("gpt2", "2xh100", "gpt2 on 2 x H100-80GB,"),
        ("gpt2", "2 x 24gb, 128gib ram", "gpt2 on 2 x 24GB (as fast as L4), 128GiB RAM,"),
        ("gpt2", "RTX 4090 48GiB", "gpt2 on 1 x RTX 4090 48GiB,"),
    ],
)
def test_names_as_people_write_them(model, hardware, said, capsys):
    assert main(["advise", model, "--hardware", hardware]) == 0
    assert said in capsys.readouterr().out


def commands():
    """Each command and its parser."""
    [subparsers] = (action for action in _parser()._actions if hasattr(action, "choices") and action.choices)
    return subparsers.choices


def test_every_help_has_an_example_that_is_read():
    for name, parser in commands().items():
        example = parser.format_help().rpartition("example: ")[2].strip()
        words = shlex.split(example)
        assert words[:2] == ["bigkit", name], example
        options, unknown = _parser().parse_known_args(words[1:])
        assert not unknown and options.parser.prog == f"bigkit {name}"


def test_examples_of_what_is_quick_run(capsys):
    for name in ("advise", "estimate-memory", "plan", "models", "machines"):
        example = commands()[name].format_help().rpartition("example: ")[2].strip()
        assert main(shlex.split(example)[1:]) == 0 and capsys.readouterr().out


def test_tables_as_markdown(capsys):
    for asked in (["advise", "llama-2-70b", "--hardware", "4090"], ["estimate-memory", "deepseek-v3"], ["models"]):
        assert main([*asked]) == 0
        plain = capsys.readouterr().out
        assert main([*asked, "--markdown"]) == 0
        lines = capsys.readouterr().out.splitlines()
        tables = sum(set(line) == {"-", " "} for line in plain.splitlines())
        assert tables and sum(set(line) == {"|", "-", " "} for line in lines) == tables
        rows = [line for line in lines if line.startswith("|")]
        assert {line.count(" | ") for line in rows if "stored as" in line} <= {4, 5, 6}
        letters = re.sub(r"[\s|\\-]", "", plain)
        assert re.sub(r"[\s|\\-]", "", "\n".join(lines)) == letters, "nothing is lost"


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
@pytest.mark.parametrize(("seconds", "words"), [(2.5, True), (0, False)])
def test_what_takes_long_says_so_on_a_terminal_and_leaves_nothing_there(seconds, words):
    code = (
        "import time; from bigkit import cli, listings\n"
        f"listings.models = lambda words: time.sleep({seconds}) or 'ok'\n"
        "raise SystemExit(cli.main(['models']))"
    )
    for terminal in (True, False):
        ours, theirs = os.openpty()
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                              stderr=theirs if terminal else subprocess.PIPE, text=True) as process:  # fmt: skip
            os.close(theirs)
            said = b""
            with suppress(OSError):  # the other end is closed
                while terminal and (piece := os.read(ours, 1000)):
                    said += piece
            out, error = process.communicate()
        os.close(ours)
        assert out == "ok\n" and process.returncode == 0 and not error
        assert said == b"" if not (words and terminal) else (
            b"bigkit models is at work: 1 second" in said and said.endswith(b"\r\x1b[K"))  # fmt: skip


def test_dtype_of_the_cache(capsys):
    assert main(["estimate-memory", "llama-2-7b", "--kv_dtype", "int4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv_dtype"] == "int4"
    assert main(["plan", "llama-2-7b", "--hardware", "RTX 4090", "--kv-dtype", "float8", "--code"]) == 0
    assert "kv_dtype='float8'" in capsys.readouterr().out
    assert main(["advise", "llama-2-7b", "--hardware", "RTX 4090", "--kv-dtype", "float8"]) == 0
    assert "KV cache in float8" in capsys.readouterr().out


PYGPT = str(Path(zoo.__file__).parent / "pygpt")
WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "timm", "safetensors", "ipywidgets", "tqdm", "cloudpickle")))
import bigkit, bigkit.widgets
from bigkit.cli import main
for line in sys.argv[1:]:
    print(main(line.split()), flush=True)
for thing, name in ((bigkit, "dispatch_model"), (bigkit.widgets, "PlanExplorer")):
    try:
        getattr(thing, name)
    except ImportError as error:
        print(error)
"""


def test_what_needs_no_torch_runs_without_it_and_the_rest_says_what_to_install():
    """A bare `pip install bigkit` brings no torch: plans and advice work, of folders too."""
    lines = ["advise qwen3-32b --hardware L4", "plan gpt2 --max_memory 0=1GiB", f"estimate-memory {PYGPT}", "env",
             "plan gpt2", "dry-run gpt2 --hardware L4"]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *lines], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert [line for line in said if line in ("0", "2")] == ["0", "0", "0", "0", "2", "2"]
    hint = "pip install 'bigkit[torch]'"
    assert said[-2:] == [f"{what}, which is not installed: {hint}" for what in
                         ("bigkit.dispatch_model needs torch", "widgets.PlanExplorer needs ipywidgets")]  # fmt: skip
    machine, command = done.stderr.splitlines()
    assert machine.startswith("bigkit: only torch knows which GPUs") and machine.endswith(hint)
    assert command == f"bigkit: this command needs torch, which is not installed: {hint}"


def test_a_folder_has_the_same_size_with_and_without_torch():
    code = "import sys; sys.modules['torch'] = None; from bigkit import zoo; print(zoo.describe(sys.argv[1]).bytes())"
    done = subprocess.run([sys.executable, "-c", code, PYGPT], capture_output=True, text=True)
    assert int(done.stdout) == describe("pygpt").bytes()
